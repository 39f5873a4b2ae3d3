"""Texts that tokenizers stumble over."""

from __future__ import annotations

from hypothesis import strategies as st

PIECES = [
    "a", " ", "  ", "\n", "\n\n", "\r\n", "\t", "ab", " ab", "é", "e\u0301", "🦊", "漢字", "▁",
    "👩\U0001f3fd\u200d🚀", "\ufffd", "\x00", "<", "<|", "|>", "<table>", "\ue000", "\ue001",
    "\u202e", "\u00a0", "{{ x }}", "{% if %}",
]  # fmt: skip
SPELLINGS = [
    "<turn|>", "<|turn>", "<bos>", "<eos>", "<pad>", "<unk>", "<|turn>x", "<|image|>", "<|channel>",
    "<channel|>", "<|turn", "turn|>", "<turn", "<<turn|>>", "<tur", "n|>", "<|tool_response>",
]  # fmt: skip


def texts(pieces: list[str]) -> st.SearchStrategy[str]:
    """Pieces and arbitrary characters, mixed."""
    characters = st.characters(exclude_categories=["Cs"])
    return st.lists(st.sampled_from(pieces) | characters, max_size=24).map("".join)


plain_texts = texts(PIECES)
spelling_texts = texts(PIECES + SPELLINGS)
