"""What is streamed adds up to the tokenizer's decoding, however an answer is cut into canvases."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import gemma_like
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_strategies import spelling_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_diffgemma.text.detokenize import StreamingText, token_strings
from mlx_diffgemma.text.tokenizer import hf_tokenizer, load_tokenizer

DEMO = Path(__file__).parents[1] / "fixtures" / "demo-hf-tokenizer"


def byte_level() -> PreTrainedTokenizerFast:
    """A vocabulary whose tokens may begin and end within a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space_and_lead, tail = "Ġð", "ŁĶ"  # b" \xf0" and b"\x9f\x94"
    tokens = [*alphabet, "Ġð", "ŁĶ", "<eos>"]
    backend = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            [tuple(space_and_lead), tuple(tail)],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def trimming() -> PreTrainedTokenizerFast:
    """Llama's decoder, which drops the space before the first word."""
    tokenizer = gemma_like.build()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


TOKENIZERS = {
    "demo": load_tokenizer(DEMO),
    "gemma-like": gemma_like.build(),
    "byte-level": byte_level(),
    "trimming": trimming(),
}
each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def flat(parts: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


def decoded(tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def canvases(tokenizer) -> st.SearchStrategy[list[list[int]]]:
    """Text and noise, cut anywhere."""
    noise = st.lists(st.integers(0, len(hf_tokenizer(tokenizer)) - 1), max_size=12)
    words = spelling_texts.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    tokens = st.lists(noise | words, max_size=4).map(flat)

    def cut(ids: list[int]) -> st.SearchStrategy[list[list[int]]]:
        places = st.lists(st.integers(0, len(ids)), max_size=6).map(sorted)
        return places.map(
            lambda at: [ids[a:b] for a, b in zip([0, *at], [*at, len(ids)], strict=True)]
        )

    return tokens.flatmap(cut)


@each_tokenizer
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_the_streamed_text_is_the_decoded_one(name, data):
    tokenizer = TOKENIZERS[name]
    parts = data.draw(canvases(tokenizer))
    stream = StreamingText(tokenizer)
    shown = ""
    for index, part in enumerate(parts):
        committed = flat(parts[:index])
        before = shown
        # A draft shows all that there is, and changes nothing.
        assert before + stream.peek(part) == decoded(tokenizer, committed + part)
        pieces = stream.token_strings(part)
        assert len(pieces) == len(part)
        if part:
            assert "".join(pieces) == stream.peek(part)
            assert token_strings(tokenizer, part, committed) == pieces
        shown += stream.add(part)
        # What was shown stays.
        assert decoded(tokenizer, committed + part).startswith(shown)
    assert shown + stream.finish() == decoded(tokenizer, flat(parts))
    assert stream.finish() == ""


@each_tokenizer
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_token_by_token_is_the_same(name, data):
    tokenizer = TOKENIZERS[name]
    tokens = flat(data.draw(canvases(tokenizer)))
    stream = StreamingText(tokenizer)
    text = "".join(stream.add([token]) for token in tokens) + stream.finish()
    assert text == decoded(tokenizer, tokens)


def test_half_a_character_is_held_back():
    tokenizer = TOKENIZERS["gemma-like"]
    fox = tokenizer.encode("🦊", add_special_tokens=False)
    full_stop = tokenizer.encode(".", add_special_tokens=False)
    assert len(fox) == 4
    stream = StreamingText(tokenizer)
    assert stream.add(fox[:2]) == ""
    assert stream.peek([]) == "\ufffd\ufffd"
    assert stream.peek(fox[2:]) == "🦊"
    assert stream.add(fox[2:] + full_stop) == "🦊."
    assert stream.finish() == ""


def test_what_never_became_a_character_is_shown_at_the_end():
    tokenizer = TOKENIZERS["gemma-like"]
    fox = tokenizer.encode("🦊", add_special_tokens=False)
    stream = StreamingText(tokenizer)
    assert stream.add(fox[:3]) == ""
    assert stream.finish() == "\ufffd\ufffd\ufffd"


def test_tokens_of_one_character_show_it_at_the_last():
    tokenizer = TOKENIZERS["gemma-like"]
    tokens = tokenizer.encode("a🦊 ab<eos><pad>", add_special_tokens=False)
    assert token_strings(tokenizer, tokens) == ["a", "", "", "", "🦊", " ab", "", ""]


def test_control_tokens_are_not_shown_and_do_not_part_characters():
    tokenizer = TOKENIZERS["gemma-like"]
    fox = tokenizer.encode("🦊", add_special_tokens=False)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    stream = StreamingText(tokenizer)
    assert stream.add([eos, *fox[:1], pad, pad, *fox[1:], eos]) == ""
    assert stream.finish() == "🦊"


def test_the_first_word_alone_is_trimmed():
    tokenizer = TOKENIZERS["trimming"]
    tokens = tokenizer.encode(" a a", add_special_tokens=False)
    stream = StreamingText(tokenizer)
    assert [stream.add([token]) for token in tokens] == ["a", " a"]


def test_two_streams_do_not_share_anything():
    tokenizer = TOKENIZERS["gemma-like"]
    fox = tokenizer.encode("🦊.", add_special_tokens=False)
    one, other = StreamingText(tokenizer), StreamingText(tokenizer)
    one.add(fox[:2])
    assert other.add(fox) == "🦊."
    assert one.add(fox[2:]) == "🦊."


@each_tokenizer
def test_a_canvas_that_is_drawn_again_is_not_decoded_again(name, monkeypatch):
    tokenizer = TOKENIZERS[name]
    own, count = hf_tokenizer(tokenizer), []
    cls = type(own)
    for method in ("decode", "convert_ids_to_tokens"):

        def counting(self, *args, _real=getattr(cls, method), **settings):
            count.append(1)
            return _real(self, *args, **settings)

        monkeypatch.setattr(cls, method, counting)
    looked_up = cls.added_tokens_decoder.fget
    monkeypatch.setattr(
        cls, "added_tokens_decoder", property(lambda self: count.append(1) or looked_up(self))
    )
    canvas = list(own.encode("ab cd ef\n", add_special_tokens=False)) * 4
    first = token_strings(tokenizer, canvas, canvas[:3])
    del count[:]
    assert token_strings(tokenizer, canvas, canvas[:3]) == first
    assert not count
    # Where one token changes, those beside it are looked at again, and no others.
    canvas[5] = canvas[0] if canvas[5] != canvas[0] else canvas[1]
    token_strings(tokenizer, canvas, canvas[:3])
    assert len(count) <= 12
