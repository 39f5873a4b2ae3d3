"""Where pictures stand in a prompt: as transformers' processor puts them, by whatever way."""

from __future__ import annotations

from typing import Any

import gemma_like
import numpy as np
import pytest
from tiny_models import make_config
from tiny_pictures import PLAIN, drawn

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import CheckpointError, PromptError, UsageError
from mlx_diffgemma.pictured import PicturedIds, pictures_of
from mlx_diffgemma.text.prompt import encode_prompt

WITH_IMAGES = gemma_like.TEMPLATE.replace(
    "{% endif %}{% endfor %}",
    "{% elif part['type'] == 'image' %}<|image|>{% endif %}{% endfor %}",
)
TRIMMING = WITH_IMAGES.replace("{{ part['text'] }}", "{{ part['text'] | trim }}")
TOKENIZERS = {
    "with images": gemma_like.build(WITH_IMAGES),
    "without images": gemma_like.build(),
    "plain content": gemma_like.build(
        "{% for m in messages %}<|turn>{{ m['role'] }}\n{{ m['content'] }}<turn|>\n{% endfor %}"
    ),
}
IMAGE = TOKENIZERS["with images"].convert_tokens_to_ids("<|image|>")
BEGIN, END = 250, 251
PICTURE, OTHER = drawn(96, 144), drawn(300, 100)


def model_config(**top: Any) -> ModelConfig:
    raw = {**make_config(0), "vision_config": PLAIN, "image_token_id": IMAGE}
    marks = {"boi_token_id": BEGIN, "eoi_token_id": END}
    return ModelConfig.from_dict({**raw, **marks, **top})


CONFIG = model_config()


def asked(tokenizer: Any, prompt: Any, images: Any = (), config=CONFIG, **settings: Any):
    return encode_prompt(
        tokenizer, prompt, images=images, config=config, image_tokens=70, **settings
    )


def parts(*content: Any) -> list[dict[str, Any]]:
    made = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in content
    ]
    return [{"role": "user", "content": made}]


def without_pictures(ids: PicturedIds) -> list[int]:
    """The ids with one image token in the place of every picture and its marks."""
    found = list(ids)
    for span in reversed(ids.pictures):
        assert found[span.start - 1] == BEGIN and found[span.stop] == END
        assert set(found[span.start : span.stop]) == {IMAGE}
        found[span.start - 1 : span.stop + 1] = [IMAGE]
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_picture_stands_before_the_text(name):
    tokenizer = TOKENIZERS[name]
    ids = asked(tokenizer, "What is this?", [PICTURE, OTHER])
    assert [len(span) for span in ids.pictures] == [6 * 10, 4 * 14] or len(ids.pictures) == 2
    text = "<|image|><|image|>What is this?"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    assert without_pictures(ids) == tokenizer.encode(rendered, add_special_tokens=False)


def test_pictures_stand_where_messages_have_them():
    tokenizer = TOKENIZERS["with images"]
    ids = asked(tokenizer, parts("a", PICTURE, "b", OTHER, "c"))
    expected = tokenizer.apply_chat_template(
        parts("a", None, "b", None, "c"), add_generation_prompt=True, return_dict=False
    )
    assert without_pictures(ids) == expected
    keys = [span.key for span in ids.pictures]
    assert keys == [
        span.key for one in (PICTURE, OTHER) for span in asked(tokenizer, "a", [one]).pictures
    ]


def test_text_that_spells_the_token_of_a_picture_is_text():
    for name in ("with images", "without images"):
        ids = asked(TOKENIZERS[name], "look: <|image|>!", [PICTURE])
        assert len(ids.pictures) == 1
        assert ids.count(IMAGE) == len(ids.pictures[0])
    assert not pictures_of(asked(TOKENIZERS["with images"], "<|image|>"))


def test_a_raw_prompt_and_token_ids():
    tokenizer = TOKENIZERS["with images"]
    raw = asked(tokenizer, "abc", [PICTURE], raw=True)
    assert without_pictures(raw)[-4:] == [IMAGE, *tokenizer.encode("abc", add_special_tokens=False)]
    marked = asked(tokenizer, "a<|image|>b", [PICTURE], raw=True, markers=True)
    assert without_pictures(marked) == tokenizer.encode("a<|image|>b")
    one = asked(tokenizer, [300, IMAGE, 301], [PICTURE])
    assert without_pictures(one) == [300, IMAGE, 301]
    again = asked(tokenizer, list(one), [PICTURE])
    assert again == one and again.pictures == one.pictures
    with pytest.raises(PromptError, match="2 places for 1 picture"):
        asked(tokenizer, [IMAGE, 300, IMAGE], [PICTURE])


def test_a_checkpoint_without_marks_has_none():
    ids = asked(
        TOKENIZERS["with images"],
        "a",
        [PICTURE],
        model_config(boi_token_id=None, eoi_token_id=None),
    )
    span = ids.pictures[0]
    assert ids[span.start - 1] not in (BEGIN, IMAGE) and ids[span.stop] not in (END, IMAGE)


@pytest.mark.parametrize(
    ("prompt", "images", "config", "message"),
    [
        ("a", [PICTURE], None, "pictures need a model; give encode_prompt its config"),
        ("a", [PICTURE], model_config(vision_config=None), "reads text only"),
        ("a", ["/nowhere.png"], CONFIG, "/nowhere.png is not there"),
        (
            [{"role": "assistant", "content": "a"}],
            [PICTURE],
            CONFIG,
            "belong to a message of a user",
        ),
        (parts(b""), [], CONFIG, "the picture is empty"),
        (
            [{"role": "user", "content": [{"type": "audio", "audio": b"x"}]}],
            [],
            CONFIG,
            "audio data",
        ),
    ],
)
def test_pictures_that_cannot_be_asked_about(prompt, images, config, message):
    with pytest.raises(PromptError, match=message):
        asked(TOKENIZERS["with images"], prompt, images, config)


def test_other_tokenizers_and_settings_are_refused():
    with pytest.raises(CheckpointError, match="no token 999999"):
        asked(TOKENIZERS["with images"], "a", [PICTURE], model_config(image_token_id=999_999))
    with pytest.raises(UsageError, match="list of pictures"):
        asked(TOKENIZERS["with images"], "a", "a.png")
    with pytest.raises(UsageError, match="chat template"):
        asked(TOKENIZERS["with images"], "a", [{"type": "video", "video": "a"}], raw=True)


def test_frames_of_a_video_with_their_times(tmp_path):
    av = pytest.importorskip("av")
    from mlx_diffgemma.text.video import read_frames, sampled

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height = 96, 64
        for number in range(130):
            frame = np.full((64, 96, 3), number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    frames = read_frames(path, max_frames=3)
    assert [frame.stamp for frame in frames] == ["00:00", "00:21", "00:43"]
    shown = [int(frame.pixels.mean()) for frame in frames]
    assert np.abs(np.array(shown) - [0, 43, 86]).max() <= 4
    assert len(read_frames(path, fps=0.1)) == 6 and len(read_frames(path)) == 32
    assert sampled(10, 24.0, 100.0, 32) == list(range(10))
    part = {"type": "video", "video": str(path), "max_frames": 3}
    for template in (WITH_IMAGES, TRIMMING):
        tokenizer = gemma_like.build(template)
        ids = asked(tokenizer, [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}])
        text = "00:00 <|image|> 00:21 <|image|> 00:43 <|image|>"
        spoken = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{text}?"}], add_generation_prompt=True, return_dict=False
        )
        assert without_pictures(ids) == spoken
        assert all(len(span) <= 70 for span in ids.pictures)
    (tmp_path / "b.mp4").write_bytes(b"no video at all")
    with pytest.raises(PromptError, match=r"b\.mp4 is no video that can be read"):
        read_frames(tmp_path / "b.mp4")
    with pytest.raises(PromptError, match="is not there, or no file"):
        read_frames(tmp_path)
