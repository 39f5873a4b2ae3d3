"""What the engine does for a request: it runs functions of the library and makes pieces of results.

The works run on the engine's thread; `encoding` and `work_of`, which make them, run on any thread.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from mlx_diffgemma.diffusion.encode import encode as encode_prefix
from mlx_diffgemma.diffusion.events import DenoisingStep
from mlx_diffgemma.diffusion.generate import cut
from mlx_diffgemma.editing.infill import infill, unused_hole
from mlx_diffgemma.editing.structured import Structured, generate_structured
from mlx_diffgemma.editing.validated import UnmetConstraintError
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.generation import stream_generate
from mlx_diffgemma.generation_response import GenerationResponse
from mlx_diffgemma.server.jobs import Seat, Work
from mlx_diffgemma.server.pieces import (
    Call,
    Ended,
    Frame,
    Piece,
    Reason,
    Started,
    Text,
    Thought,
    TokenInfo,
)
from mlx_diffgemma.server.preparing import Prepared
from mlx_diffgemma.server.refusals import RefusedError
from mlx_diffgemma.server.tokens import Committed, infos_of, thinking, within
from mlx_diffgemma.text.prompt import Encoded
from mlx_diffgemma.text.tool_calls import ToolCall

TRIES = 4
"""Most answers that are tried, each with the next seed, under a schema that says more than a
grammar can enforce."""
_BEHIND = 16  # pieces that a client has not read, from which it is shown no frames


def encoding(prepared: Prepared) -> Work:
    """The work that only encodes a prompt. It yields how many of its tokens were known."""

    def work(seat: Seat) -> Iterator[int]:
        ids = prepared.encoded.ids
        for _ in encode_prefix(seat.model, seat.cache, ids, marks=(len(ids),)):
            pass
        yield seat.cached_tokens

    return work


def work_of(prepared: Prepared, number: int, index: int, known: int | None) -> Work:
    """The work that gives one answer to a request.

    Args:
        number: which of the request's answers it is, from 0; it is added to the request's seed.
        index: the `index` of its pieces.
        known: tokens of the prompt that were known before the first answer; None takes as many as
            this answer finds.
    """

    def work(seat: Seat) -> Iterator[Piece]:
        return _Work(seat, prepared, number, index, known).pieces()

    return work


class _Work:
    """One answer while it is written."""

    def __init__(
        self, seat: Seat, prepared: Prepared, number: int, index: int, known: int | None
    ) -> None:
        self.seat, self.prepared, self.index = seat, prepared, index
        self.asked, self.config = prepared.asked, prepared.config
        self.seed = prepared.seed + number
        self._known = known
        self._started = False
        self._calls = 0

    def pieces(self) -> Iterator[Piece]:
        asked = self.asked
        if asked.suffix is not None:
            yield from self._filled()
        elif self.prepared.names:
            yield from self._called()
        elif asked.json_schema not in (None, False) or asked.regex is not None:
            yield from self._constrained()
        else:
            yield from self._free()

    @cached_property
    def words(self) -> Vocabulary:
        """The tokens as bytes, and those that end an answer."""
        size = self.seat.model.config.text.vocab_size
        return Vocabulary(self.seat.tokenizer, size, self.config.eos_token_ids)

    @property
    def count(self) -> int:
        """Number of tokens of the prompt; where there is a suffix, of the one that the library
        makes."""
        made = self.asked.suffix is not None
        return self.seat.prompt_tokens if made else len(self.prepared.encoded.ids)

    @property
    def cached(self) -> int:
        """How many tokens of the prompt were known."""
        known = self.seat.cached_tokens if self._known is None else self._known
        return min(known, self.count)

    def start(self) -> None:
        """Emit `Started` on the first call; further calls do nothing."""
        if not self._started:
            self._started = True
            self.seat.emit(Started(self.index, self.count, self.cached))

    def ended(
        self, reason: Reason, tokens: int, stop: str | None, steps: Sequence[int], **more: Any
    ) -> Ended:
        return Ended(
            self.index,
            reason,
            self.count,
            self.cached,
            tokens,
            stop,
            steps=tuple(steps),
            **{"seed": self.seed, **more},
        )

    @property
    def shares(self) -> dict[str, Any]:
        """The arguments that every function of the library takes from the seat."""
        return {"denoiser": self.seat.denoiser, "prefix_cache": self.seat.cache}

    # These methods write free text, with the calls that the model makes of itself.

    def _free(self) -> Iterator[Piece]:
        asked, encoded = self.asked, self.prepared.encoded
        responses = stream_generate(
            self.seat.model,
            self.seat.tokenizer,
            encoded,
            config=self.config,
            seed=self.seed,
            draft=asked.frames,
            stop=asked.stop or None,
            on_prefill=lambda done, total: self.start(),
            **self.shares,
        )
        tokens = Committed(self.words) if asked.logprobs else None
        given, thought_tokens = bool(encoded.prefill), 0
        latest: GenerationResponse | None = None
        for response in responses:
            if given and not response.step and not response.denoising_steps:
                given = False
                continue  # the beginning, which the client has
            if response.step:
                latest = response
                if asked.frames and self.seat.backlog < _BEHIND:
                    yield self._frame(response)
                continue
            if tokens is not None and latest is not None:
                tokens.take(latest)
            if response.thought:
                thought_tokens += thinking(latest, self.config.eos_token_ids)
                yield Thought(self.index, response.thought)
            text = response.text + "".join(call.raw for call in response.failed_calls)
            calls = response.tool_calls
            if asked.tool_choice == "none" or not asked.tools:
                text, calls = text + "".join(call.raw for call in calls), ()
            if text:
                infos = () if tokens is None else tokens.up_to(response.generation_tokens)
                yield Text(self.index, text, infos)
            yield from self._made(calls)
            if response.finish_reason is not None:
                reason = response.finish_reason
                if reason == "tool_calls" and not self._calls:
                    reason = "stop"
                yield self.ended(
                    reason,
                    response.generation_tokens,
                    response.stop_string,
                    response.denoising_steps,
                    converged=response.converged,
                    context_full=response.context_full,
                    thought_tokens=thought_tokens,
                    ids=response.tokens if asked.frames or asked.logprobs else (),
                    stop_token=response.stop_token,
                )

    def _frame(self, response: GenerationResponse) -> Frame:
        return Frame(
            self.index,
            response.canvas_index,
            response.step,
            self.config.max_denoising_steps,
            response.draft,
            response.draft_thought,
        )

    def _made(self, calls: Sequence[ToolCall]) -> Iterator[Call]:
        for call in calls:
            name = f"call_{uuid.uuid4().hex[:24]}"
            yield Call(self.index, self._calls, name, call.name, call.arguments)
            self._calls += 1

    # These methods write answers whose form is given.

    def _structured(self, prompt: Encoded, **constraint: Any) -> Structured:
        def show(step: DenoisingStep) -> None:
            self.start()
            if self.asked.frames and self.seat.backlog < _BEHIND:
                draft = step.canvas.draft.tolist()
                draft = cut(draft, self.config.eos_token_ids, len(draft))[0]
                frame = Frame(
                    self.index,
                    step.canvas.index,
                    step.canvas.passes,
                    self.config.max_denoising_steps,
                    self.words.decode(draft),
                )
                self.seat.emit(frame)

        try:
            found = generate_structured(
                self.seat.model,
                self.seat.tokenizer,
                prompt,
                config=constraint.pop("config", self.config),
                seed=self.seed,
                on_step=show,
                **constraint,
                **self.shares,
            )
        except UnmetConstraintError as error:
            raise RefusedError(422, str(error)) from None
        except (re.error, RecursionError) as error:  # from the check of what was written
            raise UsageError(f"the JSON schema cannot be used: {error}.") from None
        self.start()
        return found

    def _constrained(self) -> Iterator[Piece]:
        asked = self.asked
        constraint: dict[str, Any] = {"regex": asked.regex, "thinking": asked.thinking or None}
        if asked.json_schema is True:
            constraint |= {"json_schema": {"type": "object"}}
        elif asked.json_schema is not None:
            constraint |= {"json_schema": asked.json_schema, "validate": TRIES}
        found = self._structured(self.prepared.encoded, **constraint)
        if found.thought:
            yield Thought(self.index, found.thought)
        infos = infos_of(self.words, found)
        yield from self._whole(
            found.text,
            infos,
            found.denoising_steps,
            thought_tokens=len(found.thought_tokens),
            seed=found.seed,
        )

    def _whole(
        self,
        text: str,
        infos: Sequence[TokenInfo],
        steps: Sequence[int],
        *,
        reason: Reason = "stop",
        thought_tokens: int = 0,
        **more: Any,
    ) -> Iterator[Piece]:
        """The pieces of a text that comes at once: the text up to the first stop string, and its
        end."""
        found = [(text.find(stop), stop) for stop in self.asked.stop if stop in text]
        stopped: str | None = None
        if found:
            place, stopped = min(found)
            text, reason = text[:place], "stop"
            infos = within(infos, len(text.encode()))
        if text:
            yield Text(self.index, text, tuple(infos) if self.asked.logprobs else ())
        count = thought_tokens + len(infos)
        ids = tuple(info.token for info in infos) if self.asked.logprobs else ()
        yield self.ended(
            reason, count, stopped, steps, thought_tokens=thought_tokens, ids=ids, **more
        )

    def _called(self) -> Iterator[Piece]:
        """A call that must be made: its name among those that may be called, then its arguments as
        JSON under the schema of that function. Both stand where the model writes a call."""
        encoded, names = self.prepared.encoded, self.prepared.names
        ids = [*encoded.ids, *self.prepared.pinned]
        steps: tuple[int, ...] = ()
        name, written = next(iter(names)), 0
        if len(names) > 1:
            chosen = self._structured(replace(encoded, ids=ids), choices=list(names))
            name, steps, written = chosen.text, chosen.denoising_steps, len(chosen.tokens)
        ids += self.words.encode(name)
        room = max(1, self.config.max_tokens - written)
        found = self._structured(
            replace(encoded, ids=ids),
            json_schema=names[name],
            validate=TRIES,
            config=replace(self.config, max_tokens=room),
        )
        steps += found.denoising_steps
        yield from self._made([ToolCall(name, arguments_in(found.text), found.text)])
        yield self.ended("tool_calls", written + len(found.tokens), None, steps, seed=found.seed)

    # This method writes what stands between two texts.

    def _filled(self) -> Iterator[Piece]:
        before, after = str(self.asked.prompt), self.asked.suffix or ""
        hole = unused_hole(before + after)

        def show(step: DenoisingStep) -> None:
            self.start()

        lengths = self.prepared.lengths
        found = infill(
            self.seat.model,
            self.seat.tokenizer,
            before + hole + after,
            hole=hole,
            lengths=lengths,
            prompt=self.asked.instruction,
            config=self.config,
            seed=self.seed,
            on_step=show,
            **self.shares,
        )
        self.start()
        (filled,) = found.holes
        infos = infos_of(self.words, filled)
        limited = self.asked.max_tokens is not None and lengths[-1] == self.asked.max_tokens
        reason: Reason = "length" if limited and len(filled.tokens) >= lengths[-1] else "stop"
        yield from self._whole(filled.text, infos, [filled.steps], reason=reason)


def arguments_in(text: str) -> dict[str, Any]:
    """The arguments of a call, from JSON.

    Raises:
        RefusedError: a number is beyond what clients can read (422).
    """

    def number(word: str) -> float:
        value = float(word)
        if not math.isfinite(value):
            raise RefusedError(
                422, f"the call that was written has a number out of range, {word:.40}; ask again."
            )
        return value

    def integer(word: str) -> float:
        return int(word) if len(word) < 300 else number(word)

    arguments: dict[str, Any] = json.loads(text, parse_float=number, parse_int=integer)
    return arguments
