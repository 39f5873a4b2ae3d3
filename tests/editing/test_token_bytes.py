"""What each token stands for, masks of tokens, and what is kept of a tokenizer."""

from __future__ import annotations

import gc
import weakref
from functools import cache
from typing import Any

import numpy as np
import pytest
from big_vocabulary import EOS, SIZE, big
from small_models import PIECES, demo
from text.gemma_like import build
from tiny_models import make_config, make_model, make_weights
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.diffusion.lookahead import tokens_in
from mlx_diffgemma.editing.grammar import choices_matcher, json_schema_matcher, regex_matcher
from mlx_diffgemma.editing.infill import infill
from mlx_diffgemma.editing.structured import generate_structured
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.text.tokenizer import hf_tokenizer

KINDS = {
    "text": lambda piece: True,
    "line": lambda piece: b"\n" not in piece and b"\r" not in piece,
    "digits": bytes.isdigit,
    "word": lambda piece: piece.decode(errors="replace").isalpha(),
}
EDGES = [b"", b"a", b" ", b"  ", b" " * 9, b"\n", b"\xf0\x9f", b"\x00", b"12", b"no such", b"ai"]


@cache
def big_model() -> Any:
    """A random model of 262,144 words."""
    raw = make_config(5, vocab_size=SIZE, head_dim=8, hidden_size=16)
    config = ModelConfig.from_dict(raw | {"canvas_length": 16})
    return make_model(config, make_weights(config, 5))


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind, with added tokens that are no spelling of bytes, and one that is."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("Ã", "©"), ("a", "b")]
    names = alphabet + [a + b for a, b in merges]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    backend.add_tokens([AddedToken("two words"), AddedToken("<table>"), AddedToken("漢字")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", clean_up_tokenization_spaces=False
    )


def metaspace() -> PreTrainedTokenizerFast:
    """A Unigram with U+2581, without bytes; `<0x41>` stands for itself."""
    names = ["<unk>", "</s>", "\u2581", "\u2581a", "a", "b", "ab\u2581", "<0x41>", "é"]
    backend = Tokenizer(models.Unigram([(name, -1.0) for name in names], unk_id=0))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("\u2581\u2581")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def demo_tokenizer() -> Any:
    return hf_tokenizer(demo()[1])


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    return Vocabulary(tokenizer, len(tokenizer), EOS if tokenizer is big() else [1])


@pytest.mark.parametrize("load", [build, byte_level, metaspace, demo_tokenizer, big])
def test_pieces_are_what_the_decoder_writes(load):
    """Every token but those that stand for no text, between two letters."""
    tokenizer = load()
    vocabulary = vocabulary_of(tokenizer)
    backend = tokenizer.backend_tokenizer
    # A letter that is a byte of its own would be read with the bytes beside it.
    names = tokenizer.convert_ids_to_tokens(range(vocabulary.size))
    letter = next(i for i, name in enumerate(names) if name == "a")
    texts = [token for token, piece in enumerate(vocabulary.pieces) if piece]
    written = backend.decode_batch([[letter, i, letter] for i in texts], skip_special_tokens=False)
    expected = [f"a{vocabulary.decode([token])}a" for token in texts]
    assert written == expected
    assert len(texts) > 0.9 * (vocabulary.size - 130)


def test_control_and_reserved_tokens_stand_for_no_text():
    vocabulary = vocabulary_of(big())
    silent = [token for token in range(SIZE) if not vocabulary.pieces[token]]
    assert silent == [*range(5), *range(6, 107)]
    assert vocabulary.end == 106
    assert vocabulary.pieces[138:168] == [b" " * count for count in range(2, 32)]


@pytest.mark.parametrize("load", [build, byte_level, demo_tokenizer, big])
def test_masks_are_those_of_every_piece(load):
    vocabulary = vocabulary_of(load())
    pieces = list(enumerate(vocabulary.pieces))
    for kind, holds in KINDS.items():
        right = [token for token, piece in pieces if piece and holds(piece)]
        assert tokens_in(vocabulary.kind(kind)) == right
        assert tokens_in(vocabulary.mask(holds)) == right
    rng = np.random.default_rng(0)
    some = [vocabulary.pieces[i] for i in rng.integers(0, vocabulary.size, 20)]
    for edge in [*EDGES, *some, *(piece.encode() for piece in PIECES)]:
        begin = [token for token, piece in pieces if piece and piece.startswith(edge)]
        end = [token for token, piece in pieces if piece and piece.endswith(edge)]
        assert tokens_in(vocabulary.starting_with(edge)) == begin
        assert tokens_in(vocabulary.ending_with(edge)) == end
        if edge in vocabulary.pieces and edge:
            assert vocabulary.token_of(edge) == vocabulary.pieces.index(edge)
    for byte, token in vocabulary.single_bytes.items():
        assert token == vocabulary.pieces.index(bytes([byte]))
    with pytest.raises(ValueError, match="no token stands for"):
        vocabulary.token_of(b"no such piece")


@pytest.mark.parametrize(
    "names",
    [
        {"a": 0, "b": 1, "c": 2},
        {"a": 0, "b": 1, "c": 4},  # ids without a name
        {"a": 0, "b c": 1, "d": 2},  # a name with a space
        {"a": 0, "b c": 1, "d": 3, "e": 4, "f": 6},  # as many spaces as ids without a name
        {"a": 0, "b\uffffc": 1, "": 2, "d": 3},  # a noncharacter, an empty name
    ],
)
def test_names_are_told_apart(names):
    backend = Tokenizer(models.WordLevel(names, unk_token="a"))
    backend.add_tokens([AddedToken("two words", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="a")
    found = tokenizer.get_vocab()
    for size in (2, 5, 9):
        expected = [b""] * size
        for name, token in found.items():
            if 0 < token < size:
                expected[token] = name.encode()
        assert Vocabulary(tokenizer, size, [0]).pieces == expected


def test_what_is_known_of_a_tokenizer_is_read_once():
    tokenizer = build()
    first, second = vocabulary_of(tokenizer), vocabulary_of(tokenizer)
    assert first.pieces is second.pieces
    assert first.text is second.text
    assert first.starting_with(b"a") is second.starting_with(b"a")
    assert first.ending_with(b"a") is second.ending_with(b"a")
    assert first.mask(bytes.isdigit) is second.mask(bytes.isdigit)
    assert first.grammar_tokenizer is second.grammar_tokenizer
    assert Vocabulary(tokenizer, 300, [1]).size == 300
    assert Vocabulary(tokenizer, 300, [0]).eos == (0,)
    with pytest.raises(ValueError, match="read-only"):
        first.text[0] = 0


def test_tokens_that_are_added_later_are_read():
    tokenizer = build()
    assert b"<later>" not in vocabulary_of(tokenizer).pieces
    tokenizer.add_tokens(["<later>"])
    assert vocabulary_of(tokenizer).pieces[-1] == b"<later>"


def test_a_tokenizer_is_freed_with_what_is_known_of_it():
    tokenizer = build()
    vocabulary = vocabulary_of(tokenizer)
    matcher = regex_matcher(vocabulary, "ab+")
    assert matcher.forced() and vocabulary.starting_with(b"a").any()
    tokenizer_left, known_left = weakref.ref(tokenizer), weakref.ref(vocabulary._kept)
    del tokenizer, vocabulary
    gc.collect()
    assert matcher.copy().forced()  # it still needs the tokenizer
    del matcher
    gc.collect()
    assert tokenizer_left() is None and known_left() is None


def test_remembered_masks_are_bounded():
    vocabulary = vocabulary_of(build())
    for number in range(300):
        vocabulary.starting_with(b"%d" % number)
        vocabulary.mask(lambda piece, number=number: len(piece) == number)
    assert vocabulary._kept.starting_with.cache_info().currsize < 128
    assert vocabulary._kept.mask.cache_info().currsize < 128


def test_runs_of_spaces_satisfy_a_grammar():
    vocabulary = vocabulary_of(big())
    text = "a  b   c"
    for matcher in (regex_matcher(vocabulary, text), choices_matcher(vocabulary, [text])):
        tokens = matcher.forced()
        assert vocabulary.decode(tokens) == text and 138 in tokens
        matcher.advance(tokens)
        assert matcher.must_end
    schema = {
        "type": "object",
        "properties": {text: {"const": text}},
        "required": [text],
        "additionalProperties": False,
    }
    matcher = json_schema_matcher(vocabulary, schema)
    tokens = vocabulary.encode(f'{{"{text}": "{text}"}}')
    assert matcher.matching(tokens) == len(tokens)


@pytest.mark.slow
def test_editing_writes_spaces_for_runs_of_spaces():
    model, tokenizer = big_model(), big()
    settings = {"prompt": "x", "raw": True, "max_denoising_steps": 2, "eos_token_ids": EOS}
    for seed in range(3):
        done = infill(
            model, tokenizer, "def f():\n  [[?]]  1", lengths=[2, 4], seed=seed, **settings
        )
        assert "\u2581" not in done.text
        assert done.text.startswith("def f():\n  ") and done.text.endswith("  1")
    settings.pop("prompt")
    for constraint in (
        {"regex": "a  b"},
        {"choices": ["a  b"]},
        {"json_schema": {"const": "a  b"}},
    ):
        found = generate_structured(model, tokenizer, "x", 12, seed=0, **constraint, **settings)
        assert found.text.strip('"') == "a  b"


def test_what_the_vocabulary_lacks_is_said_in_one_line():
    model, tokenizer = demo()
    with pytest.raises(UsageError) as error:
        generate_structured(model, tokenizer, "x", 20, choices=["größe", "a"], seed=0)
    assert str(error.value) == (
        "the model's vocabulary cannot write the choice 'größe'; choose another word."
    )
    # What can be written instead is.
    settings = {"max_denoising_steps": 3, "seed": 0}
    found = generate_structured(model, tokenizer, "x", 20, regex="größe|a", **settings)
    assert found.text == "a"
    schema = {"enum": ["größe", "b"]}
    found = generate_structured(model, tokenizer, "x", 20, json_schema=schema, **settings)
    assert found.value == "b"


def test_small_tokenizers_of_every_kind_spell_themselves():
    for tokenizer in (build(), byte_level()):
        vocabulary = vocabulary_of(tokenizer)
        for text in ["a  b", "é\n漢字", "two words <table>", "\x00\x7f"]:
            assert vocabulary.spells(text)
    assert not vocabulary_of(demo_tokenizer()).spells("größe")


def test_a_token_of_thousands_of_bytes_is_not_used_under_a_grammar():
    tokenizer = build()
    tokenizer.add_tokens(["x" * 3000])
    words = Vocabulary(tokenizer, len(tokenizer), (1, 5))
    matcher = regex_matcher(words, "x{3000}")
    assert len(words.encode("x" * 3000)) == 1
    assert words.decode(matcher.way_out(4096, thorough=True)) == "x" * 3000
