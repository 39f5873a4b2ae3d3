"""The answers of a server in the form in which those of a loaded model are shown."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from mlx_diffgemma.text.tool_calls import ToolCall


def pieces(response: Any) -> list[tuple[str, str]]:
    """A draft in two pieces, thought and text; servers do not tell the tokens of a draft apart."""
    if not response.canvas:
        return [("text", "")]
    return [("thought", response.draft_thought), ("text", response.draft)]


def answers_of(told: Mapping[str, Any], questions: Sequence[Any]) -> dict[str, Any]:
    """The answers in a server's JSON, by name, with the fields of an `Answer`."""
    found = {}
    for question in questions:
        answer = told["answers"][question.name]
        if question.kind == "noul":
            probabilities = (answer["noul"], 1 - answer["noul"])
            spread = (answer["spread"],) * 2
        else:
            probabilities = tuple(answer["probabilities"][each] for each in question.options)
            spread = tuple(answer["spread"][each] for each in question.options)
        found[question.name] = SimpleNamespace(
            question=question,
            probabilities=probabilities,
            spread=spread,
            confidence=answer["confidence"],
            score=answer.get("score"),
        )
    return found


class Reading:
    """Makes responses out of the events of a stream.

    Args:
        about: the answer of the server's `/health`.
    """

    def __init__(self, about: Mapping[str, Any]) -> None:
        self._canvas = int(about.get("canvas_length") or 0)
        self._start = time.perf_counter()
        self._first = 0.0
        self._block = 0
        self._calls: list[ToolCall] = []
        self._end: dict[str, Any] = {}
        self._usage: dict[str, Any] = {}

    def add(self, event: Mapping[str, Any]) -> Iterator[Any]:
        """The responses that an event makes."""
        self._first = self._first or time.perf_counter()
        self._usage = event.get("usage") or self._usage
        if event.get("type") == "diffusion_frame":
            self._block = event["block"]
            yield self._response(
                draft=event["text"],
                draft_thought=event.get("reasoning_content", ""),
                canvas=[0],
                entropy=[0.0],
                step=event["step"],
            )
            return
        for choice in event.get("choices", ()):
            delta = choice.get("delta", choice)
            text = delta.get("content") or delta.get("text") or ""
            thought = delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls") or ():
                function = call["function"]
                arguments = json.loads(function["arguments"])
                self._calls.append(ToolCall(function["name"], arguments, function["arguments"]))
            if text or thought:
                yield self._response(text=text, thought=thought)
            if choice.get("finish_reason"):
                self._end = {**choice.get("diffusion", {}), "reason": choice["finish_reason"]}

    def last(self) -> Any:
        """The response that ends the answer."""
        end, tokens = self._end, self._usage.get("completion_tokens", 0)
        prompt = self._usage.get("prompt_tokens", 0)
        took = time.perf_counter() - self._first
        return self._response(
            finish_reason=end.get("reason"),
            tool_calls=tuple(self._calls),
            prompt_tokens=prompt,
            prompt_tps=prompt / max(1e-9, self._first - self._start),
            generation_tokens=tokens,
            generation_tps=tokens / max(1e-9, took),
            denoising_steps=tuple(end.get("denoising_steps", ())),
            tokens_per_forward=end.get("tokens_per_forward") or 0.0,
            stop_string=end.get("stop"),
            tokens=tuple(end.get("tokens", ())),
            stop_token=end.get("stop_token"),
            converged=end.get("converged", True),
            context_full=end.get("context_full", False),
            seed=end.get("seed", 0),
        )

    def _response(self, **told: Any) -> Any:
        return SimpleNamespace(**{**_EMPTY, "canvas_index": self._block, **self._committed, **told})

    @property
    def _committed(self) -> dict[str, int]:
        return {"generation_tokens": self._block * self._canvas}


_EMPTY: dict[str, Any] = {
    "failed_calls": (),
    "images": 0,
    "image_seconds": 0.0,
    "parts": None,
    "peak_memory": 0.0,
    "text": "",
    "thought": "",
    "tool_calls": (),
    "draft": "",
    "draft_thought": "",
    "canvas": [],
    "entropy": [],
    "step": 0,
    "token": None,
    "tokens": (),
    "stop_token": None,
    "finish_reason": None,
    "prompt_tokens": 0,
    "prompt_tps": 0.0,
    "generation_tps": 0.0,
    "denoising_steps": (),
    "tokens_per_forward": 0.0,
    "stop_string": None,
    "converged": True,
    "context_full": False,
    "seed": 0,
}
