"""A tokenizer of 262,144 words, laid out as Gemma's: control tokens, reserved ones, runs of new
lines and of spaces and HTML tags as added tokens, 256 bytes, then words with U+2581 for a space."""

from __future__ import annotations

from functools import cache
from itertools import product

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SIZE = 262_144
EOS = (1, 106)
CONTROLS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
TURNS = ["<start_of_turn>", "<end_of_turn>"]
LINES = ["\n" * count for count in range(1, 32)]
SPACES = ["\u2581" * count for count in range(2, 32)]
TAGS = ["<table>", "<caption>", "</table>", "<b>", "</b>", "<code>", "</code>", "[multimodal]"]

_ONSETS = ["", *"bcdfghjklmnpqrstvwxyz", "ch", "sh", "th", "tr", "st", "é", "д", "漢"]
_NUCLEI = [*"aeiou", "ai", "ea", "ou", "ö", "и", "字"]


@cache
def big(size: int = SIZE) -> PreTrainedTokenizerFast:
    tokens = CONTROLS + TAGS[-1:] + [f"<unused{number}>" for number in range(99)] + TURNS
    tokens += LINES + SPACES + TAGS[:-1] + [f"<0x{byte:02X}>" for byte in range(256)]
    letters = {*map(chr, range(33, 127)), "\u2581", *"".join(_ONSETS + _NUCLEI), *"ß²٣\u0301🦊…“"}
    tokens += sorted(letters)
    merges: list[tuple[str, str]] = [("\u2581", "\u2581" * count) for count in range(1, 31)]
    known = set(tokens)

    def add(left: str, right: str) -> None:
        if left in known and right in known and left + right not in known:
            known.add(left + right)
            tokens.append(left + right)
            merges.append((left, right))

    syllables = [onset + nucleus for onset, nucleus in product(_ONSETS, _NUCLEI)]
    for syllable in syllables:
        for end in range(2, len(syllable) + 1):
            add(syllable[: end - 1], syllable[end - 1])
        add("\u2581", syllable)
    for first, second in product(syllables, syllables):
        add("\u2581" + first, second)
        add(first, second)
    for number, (first, second) in enumerate(product(syllables, syllables)):
        add("\u2581" + first + second, syllables[number * 7 % len(syllables)])
    for number in range(100, 10**6):
        if len(tokens) >= size:
            break
        digits = str(number)
        add(digits[:1], digits[1:2])
        add(digits[:-1], digits[-1])
    assert len(tokens) >= size and len(known) == len(tokens)
    vocabulary = {token: index for index, token in enumerate(tokens[:size])}
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            [(a, b) for a, b in merges if a + b in vocabulary],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [AddedToken(name, normalized=False, special=True) for name in CONTROLS + TURNS]
    backend.add_special_tokens(special)
    plain = [*tokens[5:105], *LINES, *SPACES, *TAGS]
    backend.add_tokens([AddedToken(name, normalized=False) for name in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
