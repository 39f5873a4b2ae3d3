"""Answers in parts: what is a thought, a call or text is decided by ids, however canvases cut."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import gemma_like
import pytest
import release_like
from hypothesis import given, settings
from hypothesis import strategies as st
from release_like import cases, ends, ids
from text_strategies import spelling_texts

from mlx_diffgemma.text.detokenize import StreamingText, token_strings
from mlx_diffgemma.text.markers import markers_of
from mlx_diffgemma.text.parts import End, Part, Parts, Text, Thought, ToolCall
from mlx_diffgemma.text.parts import _joined as joined

TOKENIZER = release_like.build()
ENDS = ends(TOKENIZER)
CUTS = st.lists(st.integers(0, 200), max_size=5)


def run(
    tokens: list[int],
    cuts: Sequence[int] = (),
    tokenizer: Any = TOKENIZER,
    **options: Any,
) -> list[Part]:
    """All parts of an answer that is committed in pieces, its eos found as in a generation."""
    end = next((i for i, token in enumerate(tokens) if token in ENDS), None)
    kept = tokens if end is None else tokens[:end]
    parts = Parts(tokenizer, **options)
    out: list[Part] = []
    edges = [0, *sorted(min(cut, len(kept)) for cut in cuts), len(kept)]
    for a, b in pairwise(edges):
        out += parts.add(kept[a:b])
    if end is None:
        return joined(out + parts.finish("length"))
    return joined(out + parts.finish("stop", tokens[end]))


def said(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Text))


def thought(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Thought))


def of(text: str, **options: Any) -> list[Part]:
    return run(ids(TOKENIZER, text), **options)


WHOLE = [case for case in cases() if "stop" not in case]


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case["name"])
@settings(max_examples=25, deadline=None)
@given(cuts=CUTS)
def test_the_cases_in_every_cut(case, cuts):
    written = case["tokens"]
    canvases = [written] if isinstance(written, str) else written
    tokens = [token for canvas in canvases for token in ids(TOKENIZER, canvas)]
    parts = run(tokens, cuts, thinking=case.get("thinking", False))
    assert said(parts) == case["text"]
    assert thought(parts) == case["thought"]
    calls = [part for part in parts if isinstance(part, ToolCall)]
    assert [
        {"name": call.name, "arguments": call.arguments} for call in calls if call.error is None
    ] == case["calls"]
    assert isinstance(parts[-1], End) and parts[-1].reason == case["finish"]
    if "says" in case:
        assert [call.error for call in calls] == [case["says"]]


def pieces(tokenizer: Any) -> st.SearchStrategy[list[int]]:
    markers = st.sampled_from([[token] for token in sorted(markers_of(tokenizer).ids)])
    words = st.sampled_from(["thought\n", "call:f{a:", "}", "b", "final\n", "\n", " ", "🦊", "é"])
    texts = (words | spelling_texts).map(
        lambda text: tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    )
    noise = st.lists(st.integers(0, len(tokenizer) - 1), max_size=4)
    return st.lists(markers | markers | texts | noise, max_size=14).map(
        lambda lists: [token for each in lists for token in each if token not in ENDS]
    )


@settings(max_examples=300, deadline=None)
@given(tokens=pieces(TOKENIZER), cuts=CUTS, thinking=st.booleans())
def test_streaming_equals_whole(tokens, cuts, thinking):
    whole = run(tokens, thinking=thinking)
    assert run(tokens, cuts, thinking=thinking) == whole
    assert run(tokens, list(range(len(tokens))), thinking=thinking) == whole
    parts = Parts(TOKENIZER, thinking=thinking)
    cut = cuts[0] if cuts else 0
    before = parts.add(tokens[:cut])
    # A draft shows what there would be, and changes nothing.
    assert joined(before + parts.peek(tokens[cut:])) == whole[:-1]
    assert joined(before + parts.add(tokens[cut:]) + parts.finish("length")) == whole


@settings(max_examples=150, deadline=None)
@given(tokens=st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30), cuts=CUTS)
def test_without_markers_the_text_is_that_of_the_tokens(tokens, cuts):
    markers = markers_of(TOKENIZER).ids
    tokens = [token for token in tokens if token not in ENDS and token not in markers]
    stream = StreamingText(TOKENIZER)
    assert said(run(tokens, cuts)) == stream.add(tokens) + stream.finish()


def test_spelt_markers_are_text():
    text = "<|channel>thought\nplan<channel|><|tool_call>call:a{}<tool_call|>"
    tokens = TOKENIZER.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert run(tokens) == [Text(text), End("length")]


@pytest.mark.parametrize(
    ("written", "text", "thoughts"),
    [
        ("<|channel>thought\na<|channel>thought\nb<channel|>C.", "C.", "a\nb"),
        ("<|channel>thought plan<channel|>A.", "A.", "plan"),
        ("<|channel>thoughtful words<channel|>A.", "thoughtful wordsA.", ""),
        ("<|channel>thought<channel|>A.", "A.", ""),
        ("<|channel>thou", "", ""),
        ("<|channel><channel|>A.", "A.", ""),
        ("<|channel>\nB<channel|>A.", "\nBA.", ""),
        ("<|channel>no name here<channel|>A.", "no name hereA.", ""),
        ("<|channel>" + "x" * 60 + "\n<channel|>A.", "x" * 60 + "\nA.", ""),
        ("<|channel>thought\n\n\n  plan \n more\n\n<channel|>\nA.", "\nA.", "plan \n more"),
        ("plan<channel|>A.", "planA.", ""),
        ("A<tool_call|>B", "AB", ""),
        ("A<|channel>thought\nb<|tool_call>call:f{}<tool_call|>C", "AC", "b"),
    ],
)
def test_channels(written, text, thoughts):
    parts = of(written)
    assert (said(parts), thought(parts)) == (text, thoughts)


def test_a_thought_never_opened_may_name_itself():
    parts = of("thought\nplan<channel|>A.", thinking=True)
    assert (said(parts), thought(parts)) == ("A.", "plan")


def test_thinking_that_does_not_come_is_text():
    assert of("A. B.", thinking=True) == [Text("A. B."), End("length")]
    assert said(of("A.<|channel>thought\nb<channel|>C.", thinking=True)) == "A.C."


@pytest.mark.parametrize("open_line", ["<|channel>thought\n", "<|channel>thou", "<|channel>"])
def test_a_prompt_may_leave_a_thought_open(open_line):
    prompt = ids(TOKENIZER, f"<bos><|turn>user\nq<turn|>\n<|turn>model\n{open_line}")
    rest = "thought\n".removeprefix(open_line.removeprefix("<|channel>"))
    parts = of(f"{rest}plan<channel|>A.", prompt=prompt)
    assert (said(parts), thought(parts)) == ("A.", "plan")


def test_a_closed_channel_of_the_prompt_is_not_open():
    prompt = ids(TOKENIZER, "<|turn>model\n<|channel>thought\n<channel|>")
    assert of("A.", prompt=prompt) == [Text("A."), End("length")]
    prompt = ids(TOKENIZER, "<|channel>thought\n<|turn>model\n")
    assert of("A.", prompt=prompt) == [Text("A."), End("length")]


Q = '<|"|>'


@pytest.mark.parametrize(
    ("inside", "arguments"),
    [
        ("", {}),
        (" ", {}),
        ("a:1", {"a": 1}),
        ("a:-2.5e3,b:0", {"a": -2500.0, "b": 0}),
        ("a:true,b:false,c:null", {"a": True, "b": False, "c": None}),
        ("unit:celsius, at:10:30", {"unit": "celsius", "at": "10:30"}),
        ("a:007,b:1e999,c:NaN", {"a": "007", "b": "1e999", "c": "NaN"}),
        ("a:[],b:{},c:[[1],[{d:2}]]", {"a": [], "b": {}, "c": [[1], [{"d": 2}]]}),
        (f"a:{Q}{Q}", {"a": ""}),
        (f"a:{Q} }},]{{ call:b\n{Q},b:1", {"a": " },]{ call:b\n", "b": 1}),
        (f"a:{Q}<tool_call|><|channel>{Q}", {"a": "<tool_call|><|channel>"}),
        (f"a:[{Q}x{Q},{Q}y 🦊{Q}]", {"a": ["x", "y 🦊"]}),
        (f"{Q}a key{Q}:1", {"a key": 1}),
        ('"a":"b, c","d":"}"', {"a": "b, c", "d": "}"}),
        ("a : 1 ,\n b : [ 1 , 2 ]", {"a": 1, "b": [1, 2]}),
    ],
)
def test_arguments(inside, arguments):
    call, end = of(f"<|tool_call>call:f{{{inside}}}<tool_call|><|tool_response>")
    raw = f"call:f{{{inside}}}"
    assert call == ToolCall("f", arguments, raw)
    assert end == End("tool_calls", release_like.TOOL_RESPONSE)


@pytest.mark.parametrize(
    ("raw", "name", "why"),
    [
        ("", "", "its arguments do not begin with a brace"),
        ("call:f", "", "its arguments do not begin with a brace"),
        ("f{a:1}", "", "it does not begin with call:NAME"),
        ("call:{a:1}", "", "it does not begin with call:NAME"),
        ("call:a b{}", "", "it does not begin with call:NAME"),
        ("call:f{a:1", "f", "} is missing"),
        ("call:f{a:[1}", "f", "a comma is missing"),
        ("call:f{a}", "f", "a key is missing"),
        ("call:f{a:1,}", "f", "a key is missing"),
        ("call:f{a:}", "f", "a value is missing"),
        (f"call:f{{a:1{Q}x{Q}}}", "f", "a comma is missing"),
        ("call:f{} and more", "", "its arguments do not begin with a brace"),
        ("call:f{a:" + "[" * 100 + "}", "f", "its arguments are nested more than 64 deep"),
    ],
)
def test_a_malformed_call_has_its_raw_text_and_what_is_wrong(raw, name, why):
    call, text, end = of(f"<|tool_call>{raw}<tool_call|>So.<turn|>")
    assert call == ToolCall(name, {}, raw, f"a tool call is malformed: {why}")
    assert (text, end.reason) == (Text("So."), "stop")


def test_a_call_without_its_closing_marker():
    both = of("<|tool_call>call:a{}<|tool_call>call:b{}")
    assert both[:-1] == [ToolCall("a", {}, "call:a{}"), ToolCall("b", {}, "call:b{}")]
    two = of("<|tool_call>call:a{}call:b{x:1}<tool_call|>")
    assert [(call.name, call.arguments) for call in two[:-1]] == [("a", {}), ("b", {"x": 1})]


def test_a_string_that_is_never_closed_costs_its_call_alone():
    call, second, text, _ = of(
        f"<|tool_call>call:a{{x:{Q}y}}<tool_call|><|tool_call>call:b{{}}<tool_call|>Done."
    )
    assert call.raw == f"call:a{{x:{Q}y}}" and "malformed" in call.error
    assert (second, text) == (ToolCall("b", {}, "call:b{}"), Text("Done."))


def test_the_channels_and_calls_of_other_tokenizers():
    tokenizer = gemma_like.build(
        controls=[*gemma_like.CONTROLS, "<tool_call>", "</tool_call>"],
        unflagged=["<think>", "</think>"],
    )
    written = '<think>\nplan\n</think>\n\nA.<tool_call>{"name": "f", "arguments": {"a": 1}}'
    tokens = ids(tokenizer, written)
    parts = run(tokens, tokenizer=tokenizer)
    assert (said(parts)[:4], thought(parts)) == ("\n\nA.", "plan")

    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from mlx_lm.tool_parsers import json_tools

    wrapped = TokenizerWrapper(
        tokenizer,
        tool_parser=json_tools.parse_tool_call,
        tool_call_start="<tool_call>",
        tool_call_end="</tool_call>",
    )
    *_, call, _ = run([*tokens, *ids(tokenizer, "</tool_call>")], tokenizer=wrapped)
    assert (call.name, call.arguments, call.error) == ("f", {"a": 1}, None)
    *_, call, _ = run(tokens[:-3], tokenizer=wrapped)
    assert call.error == "a tool call was cut off"


def test_markers_are_looked_up_once(monkeypatch):
    tokenizer = release_like.build()
    first = markers_of(tokenizer)
    monkeypatch.setattr(tokenizer, "convert_tokens_to_ids", None)
    assert markers_of(tokenizer) is first
    assert None not in (first.opened, first.closed, first.call, first.called, first.quote)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("cut", range(7))
def test_the_pieces_of_a_draft_are_its_parts(thinking, cut):
    """The name of a channel and the markers are never shown, whatever is committed already."""
    text = "<|channel>thought\nplan b<channel|>Yes.<|tool_call>call:f{a:1}<tool_call|>"
    tokens = ids(TOKENIZER, text)
    parts = Parts(TOKENIZER, thinking=thinking)
    before = parts.add(tokens[:cut])
    pieces = parts.pieces(tokens[cut:])
    assert len(pieces) == len(tokens) - cut + 1
    said = {"text": "", "thought": "", "call": ""}
    for part in before:
        said["thought" if isinstance(part, Thought) else "text"] += part.text
    for kind, piece in pieces:
        said[kind] += piece
    assert (said["text"], said["thought"]) == ("Yes.", "plan b")
    assert said["call"] == "call:f{a:1}"
    assert parts.pieces(tokens[cut:]) == pieces, "a draft commits nothing"


def test_a_direct_answer_is_in_the_draft_though_a_thought_was_asked_for():
    tokens = ids(TOKENIZER, "Paris is it.")
    parts = Parts(TOKENIZER, thinking=True)
    assert parts.add(tokens[:2]) == []
    assert "".join(piece.text for piece in parts.pieces(tokens[2:])) == "Paris is it."
    assert {piece.kind for piece in parts.pieces(tokens[2:])} == {"text"}


def test_a_drawn_frame_asks_nothing_of_the_tokenizer_that_belongs_to_it(monkeypatch):
    tokenizer = release_like.build()
    asked = []
    kind = type(tokenizer)
    for name in ("added_tokens_decoder", "all_special_ids", "all_special_tokens"):
        made = getattr(kind, name, None)
        if isinstance(made, property):
            counted = property(lambda self, n=name, f=made.fget: (asked.append(n), f(self))[1])
            monkeypatch.setattr(kind, name, counted)
    for name in ("get_vocab", "get_added_vocab"):
        real = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, n=name, f=real: (asked.append(n), f(self))[1])
    tokens = ids(tokenizer, "Paris is it.")
    parts = Parts(tokenizer)
    token_strings(tokenizer, tokens)
    first = len(asked)
    assert first, "nothing was counted"
    for _ in range(5):
        Parts(tokenizer).pieces(tokens)
        parts.fork().pieces(tokens)
        token_strings(tokenizer, tokens, tokens)
    assert len(asked) == first


def test_a_piece_of_a_draft_takes_two_decodings(monkeypatch):
    decoded = []
    real = type(TOKENIZER).decode
    monkeypatch.setattr(
        type(TOKENIZER), "decode", lambda self, *a, **k: (decoded.append(1), real(self, *a, **k))[1]
    )
    tokens = ids(TOKENIZER, "one two three four five six seven")
    Parts(TOKENIZER).pieces(tokens)
    # Two a token for its text and for what the next one follows, and as many to see how the whole
    # draft reads.
    assert 0 < len(decoded) <= 2 * len(tokens) + 6


@pytest.mark.parametrize("thinking", [False, True])
def test_marks_of_several_tokens_are_read(thinking):
    """mlx-lm's pair of this kind, cut anywhere; half a mark is no mark."""
    tokenizer = gemma_like.build(
        controls=[*gemma_like.CONTROLS, "<|open|>", "<|sep|>", "<|close|>"], unflagged=[]
    )
    for written, said in (
        ("<|open|>think<|sep|>plan<|close|>think<|sep|>A.", [Thought("plan"), Text("A.")]),
        ("A<|open|>think<|sep|>plan", [Text("A"), Thought("plan")]),
        ("A<|open|>thin", [Text("Athin")]),
        ("A<|close|>", [Text("A")]),
    ):
        tokens = ids(tokenizer, written)
        for cut in range(len(tokens) + 1):
            found = run(tokens, [cut], tokenizer, thinking=thinking)
            assert found == [*said, End("length")], (written, cut)
    prompt = ids(tokenizer, "<|open|>think<|sep|>")
    parts = Parts(tokenizer, prompt=prompt)
    assert parts.add(ids(tokenizer, "plan<|close|>think<|sep|>A.")) + parts.finish("length") == [
        Thought("plan"), Text("A."), End("length"),
    ]  # fmt: skip
