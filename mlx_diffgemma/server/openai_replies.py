"""Answers as OpenAI's clients read them, whole and chunk by chunk."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_diffgemma.server.pieces import Call, Ended, Frame, Piece, Started, Text, Thought, TokenInfo


class Choice:
    """One of the answers, as far as it is known."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.text = self.thought = ""
        self.calls: list[dict[str, Any]] = []
        self.infos: list[TokenInfo] = []
        self.end: Ended | None = None


class Reply(ABC):
    """What the answers to one request have in common.

    Args:
        model: what clients call the model.
        count: number of answers.
        top: number of alternatives named for each token, 0 or 1 (the token itself); None where log
            probabilities are not given.

    Attributes:
        tells_usage: whether the last chunk says how many tokens there were.
        framed: name of the request's field that asks for frames.
    """

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    framed = "diffusion_frames"

    def __init__(self, model: str, count: int, *, top: int | None = None) -> None:
        self.model, self.top, self.tells_usage = model, top, False
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.choices = [Choice(index) for index in range(count)]
        self.prompts: dict[int, Started] = {}

    def add(self, piece: Piece) -> None:
        """Take in a piece of an answer."""
        choice = self.choices[piece.index]
        if isinstance(piece, Started):
            self.prompts[piece.index] = piece
        elif isinstance(piece, Text):
            choice.text += piece.text
            choice.infos += piece.tokens
        elif isinstance(piece, Thought):
            choice.thought += piece.text
        elif isinstance(piece, Call):
            choice.calls.append(_called(piece))
        elif isinstance(piece, Ended):
            choice.end = piece

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": [self.choice(each) for each in self.choices],
            "usage": self.usage(),
            "system_fingerprint": None,
        }

    @abstractmethod
    def choice(self, choice: Choice) -> dict[str, Any]:
        """One answer as a whole."""

    @abstractmethod
    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """What is sent of a piece."""

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        """The chunks that follow all answers."""
        if self.tells_usage:
            yield self.chunk([], usage=self.usage())

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One chunk with `choices` in it, and `more` as further fields."""
        told = {
            "id": self.id,
            "object": self.chunk_object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }
        return {**told, "usage": None} if self.tells_usage and "usage" not in told else told

    def usage(self) -> dict[str, Any]:
        """Tokens of prompts and answers. A prompt that several answers begin from counts once."""
        ends = [each.end for each in self.choices if each.end is not None]
        prompts = self.counted(ends)
        prompt = sum(each.prompt_tokens for each in prompts)
        completion = sum(each.completion_tokens for each in ends)
        cached = sum(each.cached_tokens for each in prompts)
        thought = sum(each.thought_tokens for each in ends)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": thought},
        }

    def counted(self, ends: Sequence[Ended]) -> Sequence[Ended]:
        """The answers whose prompts count."""
        return ends[:1]


class ChatReply(Reply):
    """Answers in the shape of a chat.

    Args:
        single: whether no more than one call of a tool is given.
        diffusing: whether every piece of content is the whole text as it stands, which the client
            puts in the place of the last (Mercury's form).
    """

    def __init__(
        self,
        model: str,
        count: int,
        *,
        top: int | None = None,
        single: bool = False,
        diffusing: bool = False,
    ) -> None:
        super().__init__(model, count, top=top)
        self.single, self.diffusing = single, diffusing
        self.framed = "diffusing" if diffusing else self.framed

    def choice(self, choice: Choice) -> dict[str, Any]:
        """One answer as a whole."""
        calls = choice.calls[:1] if self.single else choice.calls
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.thought:
            message["reasoning_content"] = choice.thought
        if calls:
            message["tool_calls"] = calls
            message["content"] = choice.text or None
        told = {
            "index": choice.index,
            "message": message,
            "finish_reason": choice.end.reason if choice.end else None,
            "logprobs": self._logprobs(choice.infos),
        }
        return {**told, "diffusion": _figures(choice.end)} if choice.end else told

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """What is sent of a piece."""
        self.add(piece)
        choice = self.choices[piece.index]
        if isinstance(piece, Started):
            yield self._delta(piece.index, {"role": "assistant", "content": ""})
        elif isinstance(piece, Text):
            text = choice.text if self.diffusing else piece.text
            logprobs = self._logprobs(piece.tokens)
            yield self._delta(piece.index, {"content": text}, logprobs=logprobs)
        elif isinstance(piece, Thought):
            yield self._delta(piece.index, {"content": "", "reasoning_content": piece.text})
        elif isinstance(piece, Call):
            if not self.single or piece.number == 0:
                call = {"index": piece.number, **_called(piece)}
                yield self._delta(piece.index, {"content": "", "tool_calls": [call]})
        elif isinstance(piece, Frame):
            if self.diffusing:
                yield self._delta(piece.index, {"content": choice.text + piece.text})
            else:
                yield self._frame(piece)
        elif isinstance(piece, Ended):
            yield self._delta(piece.index, {"content": choice.text if self.diffusing else ""},
                              piece.reason, diffusion=_figures(piece))  # fmt: skip

    def _frame(self, piece: Frame) -> dict[str, Any]:
        """A chunk with a frame, which adds no text for clients that do not know frames."""
        frame = {
            "type": "diffusion_frame",
            "block": piece.block,
            "step": piece.step,
            "total": piece.total,
            "text": piece.text,
        }
        if piece.thought:
            frame["reasoning_content"] = piece.thought
        return {**self._delta(piece.index, {"content": ""}), **frame}

    def _delta(
        self, index: int, delta: dict[str, Any], reason: str | None = None, **more: Any
    ) -> dict[str, Any]:
        if more.get("logprobs") is None:
            more.pop("logprobs", None)
        return self.chunk([{"index": index, "delta": delta, "finish_reason": reason, **more}])

    def _logprobs(self, infos: Sequence[TokenInfo]) -> dict[str, Any] | None:
        if self.top is None:
            return None
        told = []
        for info in infos:
            token = {
                "token": info.text,
                "logprob": info.log_probability,
                "bytes": list(info.spelled),
            }
            top = [dict(token)] * self.top
            told.append({**token, "entropy": info.entropy, "top_logprobs": top})
        return {"content": told, "refusal": None}


class TextReply(Reply):
    """Answers in the shape of completions.

    Args:
        begun: text of the prompt that each answer repeats at its beginning, "" for none.
        each: number of answers to one prompt.
    """

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, model: str, *, begun: Sequence[str], each: int = 1, top: int | None = None
    ) -> None:
        super().__init__(model, len(begun), top=top)
        self.begun, self.each = begun, each
        self._offsets = [0] * len(begun)

    def choice(self, choice: Choice) -> dict[str, Any]:
        """One answer as a whole."""
        return self._told(
            choice.index,
            self.begun[choice.index] + choice.text,
            choice.infos,
            choice.end,
            choice.thought,
        )

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """What is sent of a piece."""
        self.add(piece)
        if isinstance(piece, Started) and self.begun[piece.index]:
            yield self.chunk([self._told(piece.index, self.begun[piece.index])])
        elif isinstance(piece, Text):
            yield self.chunk([self._told(piece.index, piece.text, piece.tokens)])
        elif isinstance(piece, Thought):
            yield self.chunk([self._told(piece.index, "", thought=piece.text)])
        elif isinstance(piece, Frame):
            frame = {"block": piece.block, "step": piece.step, "total": piece.total}
            yield self.chunk(
                [self._told(piece.index, "")], type="diffusion_frame", **frame, text=piece.text
            )
        elif isinstance(piece, Ended):
            yield self.chunk([self._told(piece.index, "", end=piece)])

    def counted(self, ends: Sequence[Ended]) -> Sequence[Ended]:
        """The answers whose prompts count: the first of each prompt."""
        return ends[:: self.each]

    def _told(
        self,
        index: int,
        text: str,
        infos: Sequence[TokenInfo] = (),
        end: Ended | None = None,
        thought: str = "",
    ) -> dict[str, Any]:
        told: dict[str, Any] = {
            "text": text,
            "index": index,
            "finish_reason": None if end is None else end.reason,
            "logprobs": None if self.top is None else self._logprobs(index, infos),
        }
        if thought:
            told["reasoning_content"] = thought
        return {**told, "diffusion": _figures(end)} if end is not None else told

    def _logprobs(self, index: int, infos: Sequence[TokenInfo]) -> dict[str, Any]:
        offsets = []
        for info in infos:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(info.text)
        return {
            "tokens": [info.text for info in infos],
            "token_logprobs": [info.log_probability for info in infos],
            "top_logprobs": [{info.text: info.log_probability} for info in infos]
            if self.top
            else None,
            "text_offset": offsets,
            "entropy": [info.entropy for info in infos],
        }


def _called(call: Call) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def _figures(end: Ended) -> dict[str, Any]:
    """Figures that only text diffusion has, and the tokens where they were asked for."""
    steps = sum(end.steps)
    told = {
        "seed": end.seed,
        "denoising_steps": list(end.steps),
        "tokens_per_forward": round(end.completion_tokens / steps, 3) if steps else None,
        "converged": end.converged,
        "stop": end.stop_string,
        "context_full": end.context_full,
    }
    return {**told, "tokens": list(end.ids), "stop_token": end.stop_token} if end.ids else told
