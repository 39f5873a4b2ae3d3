"""Works for the engine that write what the page asks for: answers of a chat, changes of a document,
templates. Each is made from a request, and yields the text as it forms, in the page's own form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_diffgemma.diffusion.events import DenoisingStep
from mlx_diffgemma.editing.edit import around_lines, edit
from mlx_diffgemma.editing.files import split_lines
from mlx_diffgemma.editing.fill import fill
from mlx_diffgemma.editing.infill import LENGTHS, infill, unused_hole
from mlx_diffgemma.editing.template import parse_template
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.generation import stream_generate
from mlx_diffgemma.generation_response import GenerationResponse
from mlx_diffgemma.server.fields import Fields
from mlx_diffgemma.server.knobs import most_steps

if TYPE_CHECKING:
    from mlx_diffgemma.server.engine import Engine
    from mlx_diffgemma.server.jobs import Seat

Make = Callable[["Engine", Fields], Callable[["Seat"], Iterator[Any]]]
Run = list[Any]
"""Some text of one kind and one tint: [text, number of the tint from 0 (see `LEVELS`), kind]."""

LEVELS = (1, 5, 10, 20, 40, 70, 110, 160, 220)
"""Entropies, in hundredths of nats, at which one tint ends and the next begins."""
_ROLES = ("system", "user", "assistant")
_SHARE_OF_CONTEXT = 4  # characters around a change are at most the context over this number
_MOST_AROUND = 12_000  # characters of a document that the model is shown on each side
_AHEAD = 4  # values that a client has not read, from which steps are left out


def chat(engine: Engine, fields: Fields) -> Callable[[Seat], Iterator[Any]]:
    """A work that answers `messages`; with `prefill`, the answer begins with it."""
    messages = [
        {
            "role": each.choice("role", _ROLES, required=True),
            "content": each.text("content", required=True),
        }
        for each in fields.objects("messages", required=True)
    ]
    options = _options(fields)
    options |= {
        "max_tokens": min(fields.integer("max_tokens", 1) or 1024, engine.context),
        "prefill_response": _near(fields.text("prefill") or "", _room(engine), end=True) or None,
        "thinking": fields.flag("thinking") or None,
        "max_denoising_steps": most_steps(fields, "steps"),
    }

    def work(seat: Seat) -> Iterator[Any]:
        given = len(options["prefill_response"] or "")
        responses = stream_generate(
            seat.model, seat.tokenizer, messages, draft=False, **options, **_shared(seat)
        )
        for response in responses:
            said, given = response.text[given:], max(0, given - len(response.text))
            if said or response.thought:
                yield {"text": said, "thought": response.thought}
            if response.canvas and response.finish_reason is None and seat.backlog <= _AHEAD:
                yield _draft(response)
            if response.finish_reason is not None:
                yield _statistics(response)

    return work


def rewrite(engine: Engine, fields: Fields) -> Callable[[Seat], Iterator[Any]]:
    """A work that rewrites the lines of `text` from `first` to `last` as the `instruction` says."""
    text = fields.text("text", required=True) or ""
    first = fields.integer("first", 1, required=True) or 1
    last = fields.integer("last", 1, required=True) or 1
    instruction = fields.text("instruction") or "improve it"
    strength = fields.number("strength", 0.0)
    options = _options(fields) | {"prompt": fields.text("prompt") or None}
    left, present, right = around_lines(text, (first, last))
    near, behind = _near(left, _room(engine), end=True), _near(right, _room(engine))

    def work(seat: Seat) -> Iterator[Any]:
        line = len(split_lines(near)) if near else 0
        count = last - first + 1
        found = _formed(
            seat,
            lambda on_step: edit(
                seat.model,
                seat.tokenizer,
                near + present + behind,
                instruction,
                (line + 1, line + count),
                strength=1.0 if strength is None else min(1.0, strength),
                on_step=on_step,
                **options,
                **_shared(seat),
            ),
        )
        yield {
            "before": present,
            "after": found.filled.text,
            "start": len(left),
            "passes": found.passes,
            "seed": found.seed,
            "cut": found.cut,
        }

    return work


def hole(engine: Engine, fields: Fields) -> Callable[[Seat], Iterator[Any]]:
    """A work that writes what stands between `left` and `right`, in at most `tokens` tokens."""
    left, right = fields.text("left") or "", fields.text("right") or ""
    most = fields.integer("tokens", 1) or LENGTHS[-1]
    options = _options(fields) | {"prompt": fields.text("prompt") or None}
    near, behind = _near(left, _room(engine), end=True), _near(right, _room(engine))
    mark = unused_hole(near + behind)

    def work(seat: Seat) -> Iterator[Any]:
        found = _formed(
            seat,
            lambda on_step: infill(
                seat.model,
                seat.tokenizer,
                near + mark + behind,
                hole=mark,
                lengths=[n for n in LENGTHS if n <= most] or [most],
                on_step=on_step,
                **options,
                **_shared(seat),
            ),
        )
        yield {
            "before": "",
            "after": found.holes[0].text,
            "passes": found.passes,
            "seed": found.seed,
            "cut": found.cut,
        }

    return work


def template(engine: Engine, fields: Fields) -> Callable[[Seat], Iterator[Any]]:
    """A work that fills the slots of a `template`, except those of which `keep` has the text."""
    text = fields.text("template", required=True) or ""
    keep = {name: str(value) for name, value in (fields.mapping("keep") or {}).items()}
    options = _options(fields) | {"prompt": fields.text("prompt") or None}
    open_ones = _with_kept(text, keep)

    def work(seat: Seat) -> Iterator[Any]:
        found = _formed(
            seat,
            lambda on_step: fill(
                seat.model,
                seat.tokenizer,
                open_ones,
                on_step=on_step,
                **options,
                **_shared(seat),
            ),
        )
        literals, slots = parse_template(text)
        yield {
            "literals": literals,
            "slots": [slot.name for slot in slots],
            "values": {**keep, **found.slots},
            "text": found.text,
            "passes": found.passes,
            "seed": found.seed,
        }

    return work


MAKERS: dict[str, Make] = {
    "chat": chat,
    "rewrite": rewrite,
    "hole": hole,
    "template": template,
}


def _options(fields: Fields) -> dict[str, Any]:
    return {"seed": fields.integer("seed", 0), "system_prompt": fields.text("system") or None}


def _shared(seat: Seat) -> dict[str, Any]:
    return {"denoiser": seat.denoiser, "prefix_cache": seat.cache}


def _formed(seat: Seat, run: Callable[[Callable[[DenoisingStep], None]], Any]) -> Any:
    """What `run` returns. After each of its steps the client is told what stands in the open
    places."""
    vocabulary: list[Vocabulary] = []

    def on_step(step: DenoisingStep) -> None:
        if seat.backlog > _AHEAD:
            return
        canvas = step.canvas
        if not vocabulary:
            size = seat.model.config.text.vocab_size
            vocabulary.append(Vocabulary(seat.tokenizer, size, canvas.settings.eos_token_ids))
        is_open = np.ones(len(canvas), bool) if canvas.layout is None else canvas.layout.open
        pieces = [
            (vocabulary[0].decode([int(canvas.draft[place])]), float(canvas.entropy[place]), "text")
            for place in np.flatnonzero(is_open).tolist()
        ]
        total = canvas.settings.max_denoising_steps
        seat.emit({"runs": _runs(pieces), "step": canvas.passes, "total": total})

    return run(on_step)


def _draft(response: GenerationResponse) -> dict[str, Any]:
    """The canvas of an answer as it stands: runs of its text, each with its tint."""
    pieces: Sequence[Any] = [] if response.parts is None else response.parts.pieces(response.canvas)
    entropies = [0.0, *response.entropy]
    return {
        "runs": _runs([
            (piece.text, nats, piece.kind) for piece, nats in zip(pieces, entropies, strict=False)
        ]),
        "step": response.step,
        "block": response.canvas_index,
    }  # fmt: skip


def _statistics(response: GenerationResponse) -> dict[str, Any]:
    return {
        "end": response.finish_reason,
        "tokens": response.generation_tokens,
        "prompt": response.prompt_tokens,
        "steps": list(response.denoising_steps),
        "rate": round(response.generation_tps, 1),
        "each": round(response.tokens_per_forward, 2),
        "converged": response.converged,
        "full": response.context_full,
        "seed": response.seed,
    }


def _runs(pieces: Sequence[tuple[str, float, str]]) -> list[Run]:
    """Runs of texts, made from (text, entropy in nats, kind); neighbours of one tint and kind are
    joined."""
    runs: list[Run] = []
    for text, nats, kind in pieces:
        if not text:
            continue
        level = int(np.searchsorted(LEVELS, 100 * nats, side="right"))
        if runs and runs[-1][1:] == [level, kind]:
            runs[-1][0] += text
        else:
            runs.append([text, level, kind])
    return runs


def _room(engine: Engine) -> int:
    return min(_MOST_AROUND, engine.context // _SHARE_OF_CONTEXT)


def _near(text: str, most: int, *, end: bool = False) -> str:
    """The whole lines at the beginning of a text, or at its `end`, that have at most `most`
    characters together; a line that is longer than that is cut."""
    if len(text) <= most:
        return text
    if end:
        cut = text[-most:]
        return cut[cut.find("\n") + 1 :] if "\n" in cut[:-1] else cut
    cut = text[:most]
    return cut[: cut.rfind("\n") + 1] if "\n" in cut[1:] else cut


def _with_kept(text: str, keep: dict[str, str]) -> str:
    """The template `text`, with the slots that `keep` names replaced by their texts."""
    literals, slots = parse_template(text)
    made = _escaped(literals[0])
    described: set[str] = set()
    for slot, literal in zip(slots, literals[1:], strict=True):
        if slot.name in keep:
            made += _escaped(keep[slot.name])
        elif slot.kind == "line" or slot.name in described:
            made += f"{{{slot.name}}}"
        elif slot.kind == "choices":
            made += f"{{{slot.name}:{'|'.join(slot.choices)}}}"
        elif slot.kind == "regex":
            made += f"{{{slot.name}:/{slot.pattern}/}}"
        else:
            made += f"{{{slot.name}:{slot.kind}}}"
        described.add(slot.name)
        made += _escaped(literal)
    return made


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
