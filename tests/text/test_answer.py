"""Stop strings cut text and tokens alike, however the answer is cut into canvases."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import release_like
from hypothesis import given, settings
from hypothesis import strategies as st
from release_like import ends, ids

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.text.answer import Answer, Said

TOKENIZER = release_like.build()
ENDS = ends(TOKENIZER)
CUTS = st.lists(st.integers(0, 40), max_size=4)


def run(tokens: list[int], cuts: list[int], **options: Any) -> tuple[str, str, int, list[Said]]:
    """Text, thought and kept tokens of an answer that is committed in pieces."""
    answer = Answer(TOKENIZER, **options)
    said: list[Said] = []
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    for a, b in pairwise(edges):
        ending = answer.would_stop(tokens[a:b])
        said.append(answer.add(tokens[a:b]))
        assert ending == (said[-1].stop_string is not None)
        if ending:
            break
    else:
        said.append(answer.add([], "length"))
    text = "".join(each.text for each in said)
    return text, "".join(each.thought for each in said), said[-1].tokens, said


@pytest.mark.parametrize(
    ("written", "stop", "text", "kept"),
    [
        ("one two END three", ["END"], "one two ", "one two "),
        ("one two EN", ["END"], "one two EN", "one two EN"),
        ("END", ["END"], "", ""),
        ("xyz", ["xyzw", "y"], "x", "x"),
        ("xabc", ["c", "abc"], "x", "x"),
        ("aaab", ["aab"], "a", "a"),
        ("x ab.", ["b"], "x a", "x ab"),  # " ab" is one token
        ("🦊🦊é.", ["é"], "🦊🦊", "🦊🦊"),
        ("é🦊.", ["🦊"], "é", "é"),
        ("<|channel>thought\nEND<channel|>P END m", ["END"], "P ", None),
        ("<|channel>thought\nplan<channel|>END m", "END", "", "<|channel>thought\nplan<channel|>"),
        ('<|tool_call>call:f{a:<|"|>END<|"|>}<tool_call|>A END', ["END"], "A ", None),
    ],
)
@settings(max_examples=30, deadline=None)
@given(cuts=CUTS)
def test_stop_strings(written, stop, text, kept, cuts):
    tokens = ids(TOKENIZER, written)
    found, _, count, said = run(tokens, cuts, stop=stop)
    assert found == text
    # What was part of the answer stays part of it.
    counts = [each.tokens for each in said]
    assert counts == sorted(counts)
    if kept is not None:
        assert tokens[:count] == ids(TOKENIZER, kept)
    else:
        assert count == len(ids(TOKENIZER, written[: written.rindex("END")]))


def test_the_token_that_holds_a_last_character_is_kept():
    tokens = TOKENIZER.convert_tokens_to_ids(["x", "▁ab", "."])
    text, _, count, said = run(tokens, [], stop="b")
    assert (text, count, said[-1].stop_string) == ("x a", 2, "b")


@pytest.mark.parametrize(
    ("written", "text", "thought", "kept"),
    [
        ("plan<channel|>P END m", "P ", "plan", "plan<channel|>P "),
        ("plan<channel|>END", "", "plan", "plan<channel|>"),
        ("P END m<|channel>thought\nx", "P ", "", "P "),
    ],
)
@settings(max_examples=20, deadline=None)
@given(cuts=CUTS)
def test_what_it_begins_with_is_decided_before_it_is_stopped(written, text, thought, kept, cuts):
    tokens = ids(TOKENIZER, written)
    found, thoughts, count, _ = run(tokens, cuts, stop="END", thinking=True)
    assert (found, thoughts, tokens[:count]) == (text, thought, ids(TOKENIZER, kept))


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(st.integers(0, len(TOKENIZER) - 1) | st.sampled_from([8, 9, 10]), max_size=25),
    stop=st.lists(st.text("ab ", min_size=1, max_size=3), max_size=2),
    cuts=CUTS,
    thinking=st.booleans(),
)
def test_streaming_equals_whole(tokens, stop, cuts, thinking):
    tokens = [token for token in tokens if token not in ENDS]
    tokens += ids(TOKENIZER, "a b ab")
    whole = run(tokens, [], stop=stop, thinking=thinking)[:3]
    assert run(tokens, cuts, stop=stop, thinking=thinking)[:3] == whole
    assert run(tokens, list(range(len(tokens))), stop=stop, thinking=thinking)[:3] == whole


def test_a_draft_is_cut_and_commits_nothing():
    answer = Answer(TOKENIZER, stop="END")
    first, second = ids(TOKENIZER, "one EN"), ids(TOKENIZER, "D two")
    assert answer.add(first).text == "one "
    draft = answer.peek(second)
    assert (draft.text, draft.stop_string) == ("", "END")
    assert draft.tokens == len(ids(TOKENIZER, "one "))
    assert answer.peek(ids(TOKENIZER, "x")).text == "ENx"
    assert answer.would_stop(second) and not answer.would_stop(second[1:])
    assert answer.add(ids(TOKENIZER, "x")).text == "ENx"


@pytest.mark.parametrize("stop", [[""], "", [1]])
def test_a_stop_string_that_is_none(stop):
    if stop == "":
        stop = ("a", "")
    with pytest.raises(UsageError, match="a stop string must be a text of at least one character"):
        Answer(TOKENIZER, stop=stop)
