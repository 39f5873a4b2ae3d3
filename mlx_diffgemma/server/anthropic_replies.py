"""Messages as Anthropic's clients read them, whole and event by event."""

from __future__ import annotations

import json
from collections.abc import Mapping
from secrets import token_hex
from typing import Any

from mlx_diffgemma.server.pieces import Call, Ended, Piece, Started, Text, Thought

SIGNATURE = "unsigned"
"""The text in place of the signature of a thought, since clients drop thoughts that have none."""


class Reply:
    """A message while it is written.

    Args:
        model: the name of the model that answers.
        shows_thoughts: whether thoughts are told, or only that there were some.
        single: whether only the first call of a tool is told.

    Attributes:
        message: the message as far as it is written.
    """

    def __init__(self, model: str, *, shows_thoughts: bool = True, single: bool = False) -> None:
        self._shows_thoughts, self._single = shows_thoughts, single
        self._open = False  # whether the last block goes on
        self._called = False
        self.message: dict[str, Any] = {
            "id": f"msg_{token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "container": None,
            "diagnostics": None,
            "usage": {
                "input_tokens": 0,
                "output_tokens": 0,
                "cache_read_input_tokens": 0,
                "cache_creation_input_tokens": 0,
                "cache_creation": None,
                "output_tokens_details": None,
                "server_tool_use": None,
                "inference_geo": None,
                "service_tier": "standard",
                "speed": None,
            },
        }

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        """Take in a piece of the answer, and return the events that tell it."""
        if self._single and self._called and not isinstance(piece, Ended):
            return []
        if isinstance(piece, Started):
            self._count(piece)
            return [{"type": "message_start", "message": _copied(self.message)}]
        if isinstance(piece, Text) and piece.text:
            return self._grow("text", "text", piece.text)
        if isinstance(piece, Thought):
            return self._grow("thinking", "thinking", piece.text if self._shows_thoughts else "")
        if isinstance(piece, Call):
            return self._call(piece)
        if isinstance(piece, Ended):
            return self._end(piece)
        return []

    def _grow(self, kind: str, key: str, text: str) -> list[dict[str, Any]]:
        content, events = self.message["content"], []
        if not self._open or content[-1]["type"] != kind:
            more = {"signature": ""} if kind == "thinking" else {"citations": None}
            events = [*self._close(), self._begin({"type": kind, key: "", **more})]
        content[-1][key] += text
        return [*events, self._delta({"type": f"{kind}_delta", key: text})] if text else events

    def _call(self, piece: Call) -> list[dict[str, Any]]:
        self._called = True
        block = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
        events = [*self._close(), self._begin({**block, "caller": {"type": "direct"}})]
        self.message["content"][-1]["input"] = piece.arguments
        said = json.dumps(piece.arguments, ensure_ascii=False)
        delta = self._delta({"type": "input_json_delta", "partial_json": said})
        return [*events, delta, *self._close()]

    def _end(self, piece: Ended) -> list[dict[str, Any]]:
        events = self._close()
        self._count(piece)
        usage = self.message["usage"]
        usage["output_tokens"] = piece.completion_tokens
        usage["output_tokens_details"] = {"thinking_tokens": piece.thought_tokens}
        end = {"stop_reason": _stop_reason(piece), "stop_sequence": piece.stop_string}
        self.message |= end
        delta = {**end, "stop_details": None, "container": None}
        told = (
            "input_tokens", "output_tokens", "cache_read_input_tokens",
            "cache_creation_input_tokens", "output_tokens_details", "server_tool_use",
        )  # fmt: skip
        counts = {key: usage[key] for key in told}
        return [
            *events,
            {"type": "message_delta", "delta": delta, "usage": counts},
            {"type": "message_stop"},
        ]

    def _count(self, piece: Started | Ended) -> None:
        """Note the tokens of the prompt: those that had to be encoded, and those that were
        cached."""
        usage = self.message["usage"]
        usage["cache_read_input_tokens"] = piece.cached_tokens
        usage["input_tokens"] = piece.prompt_tokens - piece.cached_tokens

    def _begin(self, block: dict[str, Any]) -> dict[str, Any]:
        self.message["content"].append(block)
        self._open = True
        return {"type": "content_block_start", "index": self._index, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> list[dict[str, Any]]:
        if not self._open:
            return []
        self._open = False
        events = []
        last = self.message["content"][-1]
        if last["type"] == "thinking":
            last["signature"] = SIGNATURE
            events = [self._delta({"type": "signature_delta", "signature": SIGNATURE})]
        return [*events, {"type": "content_block_stop", "index": self._index}]

    @property
    def _index(self) -> int:
        return len(self.message["content"]) - 1


def _stop_reason(piece: Ended) -> str:
    if piece.reason == "tool_calls":
        return "tool_use"
    if piece.reason == "length":
        return "model_context_window_exceeded" if piece.context_full else "max_tokens"
    return "end_turn" if piece.stop_string is None else "stop_sequence"


def _copied(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": [], "usage": dict(message["usage"])}
