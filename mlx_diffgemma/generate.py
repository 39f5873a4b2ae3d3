"""The rooms joined: a prompt in, text out, with every denoising step in between."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_diffgemma.diffusion.events import FinishReason


@dataclass(frozen=True)
class GenerationResponse:
    """One moment of a generation: mlx-lm's fields, then those of text diffusion.

    A response comes after every denoising step (`text` is empty then: nothing is committed) and
    after every committed canvas (`text` is what the canvas added). The last one has a
    `finish_reason`.

    Attributes:
        text: text committed since the previous response; never half a character.
        token: the last token committed, or None.
        prompt_tokens: tokens of the prompt.
        prompt_tps: prompt tokens encoded per second.
        generation_tokens: tokens committed so far.
        generation_tps: tokens committed per second of generation so far.
        peak_memory: most memory held so far, in GB (1e9 bytes).
        finish_reason: "stop" (an eos) or "length", on the last response only.
        draft: the text of the canvas as it stands, or "" where nothing is drafted.
        canvas: token ids of the draft, [C].
        entropy: nats of uncertainty of each draft token, [C].
        step: denoising steps run on this canvas, from 1.
        canvas_index: which canvas of the answer, from 0.
        denoising_steps: steps of each canvas so far, the current one included.
        tokens_per_forward: tokens committed per denoising step so far.
        seed: the seed of every random draw of this run.
    """

    text: str
    token: int | None
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: FinishReason | None = None
    draft: str = ""
    canvas: list[int] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    step: int = 0
    canvas_index: int = 0
    denoising_steps: tuple[int, ...] = ()
    tokens_per_forward: float = 0.0
    seed: int = 0
