"""What a model writes through `stream_generate`: a stand-in for the denoising commits what it is
told, canvas by canvas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from text import release_like

import mlx_diffgemma.generation as generation
from mlx_diffgemma import batch, batch_generate, generate, infill, load, stream_generate
from mlx_diffgemma.diffusion.events import CanvasCommitted, DenoisingStep, PrefillProgress
from mlx_diffgemma.diffusion.generate import cut
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.text.tokenizer import add_end_tokens

TOKENIZER = release_like.build()
PROMPT = [7, 8, 9]


class Scripted:
    """Takes the place of `generate_canvases`: each canvas is written in one step.

    Attributes:
        canvases: the tokens of each canvas; the eos may be among them.
        made: how many of them were made.
    """

    def __init__(self) -> None:
        self.canvases: list[list[int]] = []
        self.made = 0

    def __call__(
        self, model: Any, prompts: Any, config: Any, noise: Any, *, ends: Callable, **_: Any
    ) -> Iterator[Any]:
        config = config[0] if isinstance(config, list) else config
        yield PrefillProgress(0, len(prompts[0]), len(prompts[0]))
        self.made, room = 0, config.max_tokens
        for index, tokens in enumerate(self.canvases):
            self.made += 1
            draft = np.array(tokens, np.int64)
            canvas = SimpleNamespace(
                index=index,
                passes=1,
                draft=draft,
                entropy=np.arange(len(tokens)) / 8,
                probability=1 / np.arange(1, len(tokens) + 1),
            )
            kept, reason = cut(tokens, config.eos_token_ids, room)
            stop_token = tokens[len(kept)] if reason == "stop" else None
            if reason is None and ends(0, kept):
                reason = "stop"
            room -= len(kept)
            yield DenoisingStep(0, canvas)  # type: ignore[arg-type]
            yield CanvasCommitted(0, index, tuple(kept), 1, True, reason, stop_token)
            if reason is not None:
                return


@pytest.fixture(scope="module")
def model() -> Any:
    return load("demo")[0]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    script = Scripted()
    for room in (generation, batch):
        monkeypatch.setattr(room, "generate_canvases", script)
    return script


def ids(text: str) -> list[int]:
    return release_like.ids(TOKENIZER, text)


def respond(model: Any, case: dict[str, Any], tokens: int, **more: Any) -> list[Any]:
    return list(
        stream_generate(
            model,
            TOKENIZER,
            PROMPT,
            case.get("max_tokens") and tokens,
            eos_token_ids=release_like.ends(TOKENIZER),
            stop=case.get("stop"),
            seed=0,
            **more,
        )
    )


@pytest.mark.parametrize("case", release_like.cases(), ids=lambda case: case["name"])
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.none() | st.lists(st.integers(0, 60), max_size=4))
def test_the_cases(model, script, monkeypatch, case, cuts):
    written = case["tokens"]
    canvases = [ids(text) for text in ([written] if isinstance(written, str) else written)]
    tokens = [token for canvas in canvases for token in canvas]
    if cuts is not None:
        edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
        canvases = [tokens[a:b] for a, b in pairwise(edges)]
    script.canvases = canvases
    # Token ids as a prompt say nothing of thinking: the caller's wish is taken from its setting.
    real = generation.Answer
    thinking = case.get("thinking", False)
    with monkeypatch.context() as patched:
        patched.setattr(
            generation, "Answer", lambda *a, **k: real(*a, **{**k, "thinking": thinking})
        )
        responses = respond(model, case, len(tokens))
    last = responses[-1]
    assert "".join(each.text for each in responses) == case["text"]
    assert "".join(each.thought for each in responses) == case["thought"]
    calls = [call for each in responses for call in each.tool_calls]
    assert [{"name": call.name, "arguments": call.arguments} for call in calls] == case["calls"]
    assert last.finish_reason == case["finish"]
    failed = [call.error for each in responses for call in each.failed_calls]
    assert failed == ([case["says"]] if "says" in case else [])
    counts = [each.generation_tokens for each in responses]
    assert counts == sorted(counts)


def test_the_text_alone_is_returned(model, script):
    script.canvases = [ids("<|channel>thought\nplan<channel|>Paris.<turn|>")]
    options: dict[str, Any] = {"eos_token_ids": release_like.ends(TOKENIZER), "seed": 0}
    assert generate(model, TOKENIZER, PROMPT, **options) == "Paris."
    assert batch_generate(model, TOKENIZER, [PROMPT], **options).texts == ["Paris."]


def test_a_draft_tells_thought_from_text(model, script):
    script.canvases = [ids("<|channel>thought\nplan"), ids(" on<channel|>Yes.<turn|>")]
    drafts = [(each.draft_thought, each.draft) for each in respond(model, {}, 0) if each.canvas]
    assert drafts == [("plan", ""), (" on", "Yes.")]


def test_a_stop_string_ends_without_a_further_canvas(model, script):
    script.canvases = [ids("one EN"), ids("D two"), ids("never")]
    *_, first, step, last = respond(model, {"stop": ["END"]}, 0)
    one = tuple(ids("one "))
    assert script.made == 2
    assert (first.text, first.tokens) == ("one ", one)
    assert (step.draft, step.canvas, step.entropy) == ("", [], [])
    assert (last.text, last.tokens, last.generation_tokens) == ("", one, len(one))
    assert (last.finish_reason, last.stop_string, last.stop_token) == ("stop", "END", None)


def test_a_stop_string_cuts_the_canvas_and_its_entropy(model, script):
    script.canvases = [ids("one END two<turn|>")]
    step, last = respond(model, {"stop": "END"}, 0, draft=False)
    one = ids("one ")
    assert (step.draft, step.canvas, step.entropy) == ("", one, [i / 8 for i in range(len(one))])
    assert (last.text, list(last.tokens), last.stop_token) == ("one ", one, None)


def test_which_token_ended_it(model, script):
    script.canvases = [ids("<|tool_call>call:f{}<tool_call|><|tool_response>")]
    *_, last = respond(model, {}, 0)
    assert (last.finish_reason, last.stop_token) == ("tool_calls", release_like.TOOL_RESPONSE)


@pytest.mark.parametrize("thinking", [False, True])
def test_the_beginning_that_was_given_is_part_of_the_answer(model, script, monkeypatch, thinking):
    # The tokenizer knows more words than the model that stands in for the release.
    for room in (generation, batch):
        monkeypatch.setattr(
            room, "fit_to_context", lambda model, prompts, config, **_: [config] * len(prompts)
        )
    script.canvases = [ids("ris. END<turn|>")]
    options: dict[str, Any] = {
        "prefill_response": "It is Pa END ", "eos_token_ids": release_like.ends(TOKENIZER),
        "thinking": thinking, "stop": "END", "seed": 0,
    }  # fmt: skip
    first, *rest = stream_generate(model, TOKENIZER, "q", **options)
    assert (first.text, first.tokens, first.step, first.canvas) == ("It is Pa END", (), 0, [])
    assert "".join(each.text for each in rest) == "ris. "
    assert list(rest[-1].tokens) == ids("ris. ")
    assert generate(model, TOKENIZER, "q", **options) == "It is Pa ENDris. "
    assert batch_generate(model, TOKENIZER, ["q"], **options).texts == ["It is Pa ENDris. "]


def test_an_end_that_the_tokenizer_learns_later_counts(model, script):
    own = release_like.build()
    tokenizer = TokenizerWrapper(own, eos_token_ids=release_like.ends(own))
    script.canvases = [ids("one<table>two<turn|>")]
    assert generate(model, tokenizer, PROMPT, seed=0) == "one<table>two"
    table = own.convert_tokens_to_ids("<table>")
    add_end_tokens(tokenizer, ["<table>", "7"])
    assert {7, table} <= tokenizer.eos_token_ids
    *_, last = stream_generate(model, tokenizer, PROMPT, seed=0)
    assert (last.tokens, last.stop_token) == (tuple(ids("one")), table)
    assert batch_generate(model, tokenizer, [PROMPT], seed=0).texts == ["one"]
    # What is given with the call is what counts.
    turn = release_like.ends(own)[1]
    assert generate(model, tokenizer, PROMPT, seed=0, eos_token_ids=(turn,)) == "one<table>two"
    for wrong in ("<tabel>", "-1", "999999", "\u0661"):
        with pytest.raises(UsageError, match="is no token of this tokenizer"):
            add_end_tokens(tokenizer, [wrong])


def test_what_goes_with_free_answers_only(model):
    for setting in ({"stop": ["a"]}, {"prefill_response": "a"}):
        with pytest.raises(UsageError, match=f"{next(iter(setting))} goes with free answers only"):
            infill(model, TOKENIZER, "a [[?]]", **setting)


def test_a_stop_string_must_be_a_text(model):
    with pytest.raises(UsageError, match="a stop string must be a text"):
        stream_generate(model, TOKENIZER, PROMPT, stop=[""])


@pytest.mark.parametrize(("max_tokens", "full"), [(5, False), (10**6, True)])
def test_a_context_that_is_full_is_told_from_max_tokens(model, script, max_tokens, full):
    script.canvases = [ids("a") * 2 * model.config.text.max_position_embeddings]
    *_, last = stream_generate(model, TOKENIZER, PROMPT, max_tokens, seed=0, eos_token_ids=(1,))
    assert (last.finish_reason, last.context_full) == ("length", full)


def test_drafts_are_read_by_the_parts_before_them(model, script):
    """The name of a channel is in neither part, though the marker was committed a canvas ago."""
    script.canvases = [ids("<|channel>"), ids("thought\nplan<channel|>Paris.<turn|>")]
    ends = release_like.ends(TOKENIZER)
    found = list(stream_generate(model, TOKENIZER, PROMPT, seed=0, eos_token_ids=ends))
    second = next(each for each in found if each.canvas and each.canvas_index == 1)
    pieces = second.parts.pieces(second.canvas[:-1])
    said = {kind: "".join(p.text for p in pieces if p.kind == kind) for kind in ("text", "thought")}
    assert said == {"text": "Paris.", "thought": "plan"}
