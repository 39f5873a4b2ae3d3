"""Pictures on the command line: from files and stdin to the library, and what is refused."""

from __future__ import annotations

import pytest
from PIL import Image

from mlx_diffgemma.cli.settings import Pictures
from mlx_diffgemma.errors import UsageError


def test_pictures_and_videos_go_to_the_model_in_order(program):
    options = ["--image", "a.png", "--image", "b.jpg", "--image-tokens", "560"]
    video = ["--video", "c.mp4", "--fps", "0.5", "--max-frames", "9"]
    result = program("generate", "-p", "what?", *options, *video)
    assert result.exit_code == 0
    (call,) = program.script.calls
    part = {"type": "video", "video": "c.mp4", "fps": 0.5, "max_frames": 9}
    assert call["images"] == ["a.png", "b.jpg", part]
    assert (call["prompt"], call["image_tokens"]) == ("what?", 560)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["--image-tokens", "100"],
            "--image-tokens must be one of 70, 140, 280, 560, 1120, not 100.",
        ),
        (["--fps", "2"], "--fps and --max-frames are for a --video: add it, or drop them."),
        (["--video", "a", "--fps", "nan"], "--fps must be a number above 0, not nan."),
        (["--video", "a", "--max-frames", "0"], "--max-frames must be at least 1, not 0."),
        (
            ["--video", "a", "--raw"],
            "--video needs a chat template, and --raw uses none: drop one.",
        ),
        (
            ["--image", "-", "--image", "-"],
            "--image - reads stdin, which there is once: give it once.",
        ),
    ],
)
def test_options_that_cannot_be(program, options, line):
    result = program("generate", "-p", "a", *options)
    assert (result.exit_code, result.stderr) == (2, f"error: {line}\n")


def test_stdin_holds_one_thing(monkeypatch):
    class Stdin:
        class buffer:  # noqa: N801 - as sys.stdin has it
            read = staticmethod(lambda most: b"picture")

    monkeypatch.setattr("sys.stdin", Stdin)
    assert Pictures(image=("-", "a.png")).read("what?") == [b"picture", "a.png"]
    for prompt in (None, "-"):
        with pytest.raises(UsageError, match="both come from stdin"):
            Pictures(image=("-",)).read(prompt)


def test_a_chat_shows_pictures_with_the_next_question(tmp_path):
    from tiny_models import make_config
    from tiny_pictures import PLAIN

    from mlx_diffgemma.cli.chat import Chat
    from mlx_diffgemma.config import ModelConfig
    from mlx_diffgemma.errors import PromptError

    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")

    class Model:
        config = ModelConfig.from_dict({**make_config(0), "vision_config": PLAIN})

        def make_cache(self) -> None: ...

    class Opened:
        model = Model()

    class Denoising:
        seed = None

        def config(self, model: Model) -> None: ...

    chat = Chat(Opened(), denoising=Denoising())
    chat._command(f"/image {tmp_path / 'a.png'}", False)
    asked = chat.messages("what?")[-1]["content"]
    assert [part["type"] for part in asked] == ["image", "text"]
    assert asked[0]["image"].soft_tokens == 256
    with pytest.raises(PromptError, match="is not there"):
        chat._command("/image /nowhere.png", False)
    chat._command("/reset", False)
    assert chat.messages("again")[-1]["content"] == "again"
