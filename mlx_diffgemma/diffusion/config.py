"""How a canvas is denoised: `generation_config.json` plus what the caller overrides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Any

from mlx_diffgemma.checks import (
    check_flag,
    check_integer,
    check_number,
    check_share,
    overridden,
)
from mlx_diffgemma.errors import ConfigError, UsageError
from mlx_diffgemma.reading import Section, shown
from mlx_diffgemma.settings import Setting

SAMPLERS = ("entropy-bound", "confidence-threshold", "block-refinement", "ddim")
_COLDEST = 1e-4
_LARGEST = 3.4e38  # nearly the largest float32
_SAMPLER = "EntropyBoundSamplerConfig"
_LOOP, _SPEED = "Denoising", "What a profile sets"  # headings of a command's help


@dataclass(frozen=True)
class DiffusionConfig:
    """Settings of the denoising loop; the defaults are the reference implementation's.

    The annotation of a field says what it means, here and in the command line's help.

    Attributes:
        eos_token_ids: ids that end a sequence.
        pad_token_id: id that fills the canvases of a batch past the end of a sequence.

    Raises:
        UsageError: a setting is of another type or out of range, or `t_max` is below `t_min`.
    """

    max_tokens: Annotated[
        int, Setting("Most tokens to generate for one answer.", ("--max-tokens", "-m"), _LOOP)
    ] = 256
    max_denoising_steps: Annotated[
        int, Setting("Most denoising steps of one canvas.", ("--steps",), _LOOP)
    ] = 48
    t_min: Annotated[float, Setting("Temperature of the last step.", panel=_LOOP)] = 0.4
    t_max: Annotated[float, Setting("Temperature of the first step.", panel=_LOOP)] = 0.8
    entropy_bound: Annotated[
        float,
        Setting(
            "Nats of entropy that the tokens accepted in one step may hold between them.",
            panel=_LOOP,
        ),
    ] = 0.1
    stability_threshold: Annotated[
        int,
        Setting(
            "Number of previous steps with the same likeliest tokens after which a canvas is done.",
            panel=_LOOP,
        ),
    ] = 1
    confidence_threshold: Annotated[
        float, Setting("Mean entropy in nats below which a canvas may be done.", panel=_LOOP)
    ] = 0.005
    canvas_length: Annotated[
        int | None,
        Setting("Tokens drafted at a time; the model's own number if left out.", panel=_LOOP),
    ] = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    sampler: Annotated[
        str, Setting(f"Sampler that accepts draws: {', '.join(SAMPLERS)}.", panel=_LOOP)
    ] = "entropy-bound"
    accept_threshold: Annotated[
        float,
        Setting(
            "Probability from which the samplers confidence-threshold and block-refinement accept "
            "a draw.",
            panel=_LOOP,
        ),
    ] = 0.9
    draw_likeliest: Annotated[
        bool,
        Setting(
            "Draws that take the likeliest token, so that nothing but the noise is random.",
            panel=_LOOP,
        ),
    ] = False
    stop_at_eos: Annotated[
        bool,
        Setting(
            "End of a canvas judged by what stands before its first certain end-of-text"
            " token alone.",
            panel=_SPEED,
        ),
    ] = False
    eos_certainty: Annotated[
        float,
        Setting(
            "Nats of entropy below which --stop-at-eos takes an end-of-text token for certain.",
            panel=_SPEED,
        ),
    ] = 0.1
    confident_after: Annotated[
        int | None,
        Setting(
            "Step from which confidence alone ends a canvas, without stability; no step"
            " does so if left out.",
            panel=_SPEED,
        ),
    ] = None
    certain_below: Annotated[
        float | None,
        Setting(
            "Nats of entropy summed over a canvas below which it is done at once, whatever changed "
            "in its last step: so many after the first step, half as many after the second, a "
            "third after the third. Never if left out.",
            panel=_SPEED,
        ),
    ] = None
    stable_after: Annotated[
        int | None,
        Setting(
            "Number of previous steps with the same likeliest tokens after which a canvas is done "
            "however unsure it is; never if left out.",
            panel=_SPEED,
        ),
    ] = None
    cooling_steps: Annotated[
        int | None,
        Setting(
            "Steps over which the temperature falls, to stay as it is at their end; as many as "
            "--steps if left out.",
            panel=_SPEED,
        ),
    ] = None
    leap_until: Annotated[
        int | None,
        Setting(
            "Step of the schedule before which a canvas moves on by three steps where its entropy "
            "fell by less than a tenth; it moves on by one if left out.",
            panel=_SPEED,
        ),
    ] = None
    restart_after: Annotated[
        int | None,
        Setting(
            "Number of steps in a row that bring the entropy of a canvas no lower, though it holds "
            "hardly any noise, after which it starts again from noise, if it took no more steps "
            "than a sixth of --steps; it is done the second time, or later in the first half of "
            "the schedule. Never if left out.",
            panel=_SPEED,
        ),
    ] = None
    likeliest_from: Annotated[
        int | None,
        Setting(
            "Step from which draws take the likeliest token, as --draw-likeliest does from the "
            "first one; none if left out.",
            panel=_SPEED,
        ),
    ] = None
    late_bound: Annotated[
        float | None,
        Setting(
            "Entropy bound in nats at the last of the steps over which the temperature falls; it "
            "goes there from --entropy-bound in equal parts, and stays the same if left out.",
            panel=_SPEED,
        ),
    ] = None
    settled_bound: Annotated[
        float | None,
        Setting(
            "Entropy bound in nats where the step before accepted the whole canvas; it goes there "
            "from --entropy-bound with the share accepted, and stays the same if left out.",
            panel=_SPEED,
        ),
    ] = None
    settled_from: Annotated[
        int | None,
        Setting(
            "Step from which --settled-bound counts; from the first one if left out.",
            panel=_SPEED,
        ),
    ] = None
    bound_share: Annotated[
        float | None,
        Setting(
            "Share of the entropy of a canvas that a step may accept where the one before took off "
            "a tenth and more, up to 1 nat, if that is more than the other bounds allow; none is "
            "if left out.",
            panel=_SPEED,
        ),
    ] = None
    run_entropy: Annotated[
        float | None,
        Setting(
            "Nats of entropy below which a draw is accepted beside an accepted one, and so on "
            "along the run; none is if left out.",
            panel=_SPEED,
        ),
    ] = None
    free_behind_eos: Annotated[
        bool,
        Setting(
            "Draws behind the first certain end-of-text token accepted without a part of the "
            "entropy bound.",
            panel=_SPEED,
        ),
    ] = False
    encoder_check: Annotated[
        float | None,
        Setting(
            "Least probability that the encoder must give every token of a draft, for a canvas to "
            "be done before the other rules say so; the end of an answer is not shown to it. Never "
            "if left out.",
            panel=_SPEED,
        ),
    ] = None
    check_below: Annotated[
        float,
        Setting(
            "Nats of entropy summed over a canvas below which --encoder-check asks the encoder.",
            panel=_SPEED,
        ),
    ] = 1.0
    shrink_canvas: Annotated[
        bool, Setting("Canvas of no more tokens than --max-tokens leaves.", panel=_SPEED)
    ] = False
    forbid_empty: Annotated[
        bool,
        Setting(
            "Ban of end-of-text tokens at the first place of an answer, so that no "
            "answer is empty, even one that should be. All profiles but 'exact' set it;"
            " it has no effect where a constraint says what an answer may be.",
            ("--forbid-empty/--allow-empty",),
            _SPEED,
        ),
    ] = False
    soft_cutoff: Annotated[
        float | None,
        Setting(
            "Number N such that tokens e^-N times less likely than the likeliest are "
            "left out of the self-conditioning; all tokens count if it is not given.",
            panel=_SPEED,
        ),
    ] = None
    settled_after: Annotated[
        int | None,
        Setting(
            "Number of steps after which a position that stays certain is computed "
            "rarely (an experiment); every position is computed in every step if left "
            "out.",
            panel=_SPEED,
        ),
    ] = None

    def __post_init__(self) -> None:
        check_integer("max_tokens", self.max_tokens, 1)
        check_integer("max_denoising_steps", self.max_denoising_steps, 1)
        check_integer("stability_threshold", self.stability_threshold, 0)
        if self.canvas_length is not None:
            check_integer("canvas_length", self.canvas_length, 1)
        for name in (
            "confident_after", "settled_after", "stable_after", "cooling_steps", "leap_until",
            "settled_from", "restart_after", "likeliest_from",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        for name in ("soft_cutoff", "certain_below", "late_bound", "settled_bound", "run_entropy"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0.0)
                self._narrow(name)
        for name in ("encoder_check", "bound_share"):
            if getattr(self, name) is not None:
                check_share(name, getattr(self, name))
        if self.sampler not in SAMPLERS:
            raise UsageError(
                f"unknown sampler {shown(self.sampler)}; known are {', '.join(SAMPLERS)}."
            )
        for name in (
            "draw_likeliest", "stop_at_eos", "shrink_canvas", "forbid_empty", "free_behind_eos",
        ):  # fmt: skip
            check_flag(name, getattr(self, name))
        check_number("t_min", self.t_min, 0.0, inclusive=True)
        self._narrow("t_min")
        for name in (
            "accept_threshold", "check_below", "confidence_threshold", "entropy_bound",
            "eos_certainty", "t_max",
        ):  # fmt: skip
            check_number(name, getattr(self, name), 0.0)
            self._narrow(name)
        if not isinstance(self.eos_token_ids, tuple):
            raise UsageError(f"eos_token_ids must be a tuple, not {shown(self.eos_token_ids)}.")
        for token in (*self.eos_token_ids, self.pad_token_id):
            check_integer("a token id", token, 0)
        if self.t_max < _COLDEST:  # logits divided by less leave the range of float32
            raise UsageError(f"t_max must be at least {_COLDEST:g}, not {self.t_max:g}.")
        if self.t_max < self.t_min:
            raise UsageError(f"t_max ({self.t_max:g}) must not be below t_min ({self.t_min:g}).")

    def _narrow(self, name: str) -> None:
        """Make a number a float of the range of float32, in which it is compared and divided by."""
        object.__setattr__(self, name, min(float(getattr(self, name)), _LARGEST))

    def temperature(self, step: int) -> float:
        """Temperature of denoising step `step`, counted from 1.

        The temperature is `t_max` at the first step, and just above `t_min` at the last of the
        steps over which it falls. The reference's `LinearTemperatureScheduleLogitsProcessor`, which
        counts its steps down, gives the same. Steps beyond the last one are as warm as that."""
        return self.t_min + (self.t_max - self.t_min) * self.warmth(step)

    def warmth(self, step: int) -> float:
        """The share of the schedule that is left at step `step`, counted from 1: it is 1 at the
        first step, and above 0 at the last step and beyond."""
        steps = self.cooling_steps or self.max_denoising_steps
        return max(1, steps - step + 1) / steps

    def step_at(self, noise: float) -> int:
        """The step of the schedule, counted from 1, at which a canvas enters it if the share
        `noise` of its tokens is noise: the step at which that share of the schedule is left."""
        steps = self.cooling_steps or self.max_denoising_steps
        return min(steps - ceil(noise * steps) + 1, steps, self.max_denoising_steps)

    def override(self, **settings: Any) -> DiffusionConfig:
        """A copy with the settings that are not None replaced.

        Raises:
            UsageError: a setting is unknown or out of range.
        """
        return overridden(self, settings)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DiffusionConfig:
        """Read a parsed `generation_config.json`; absent settings take the reference's defaults.

        Raises:
            ConfigError: the sampler is unknown or a value is out of range.
        """
        whole = Section(data, file="generation_config.json")
        sampler = whole.section("sampler_config", {}).data
        name = sampler.get("_cls_name", _SAMPLER)
        if name != _SAMPLER:
            raise ConfigError(
                f"generation_config.json: sampler {shown(name)} is unknown; known is '{_SAMPLER}'."
            )
        eos = data.get("eos_token_id")
        settings = {
            "max_tokens": data.get("max_new_tokens"),
            "entropy_bound": sampler.get("entropy_bound"),
            "eos_token_ids": None
            if eos is None
            else tuple(eos if isinstance(eos, list) else [eos]),
        }
        same_name = (
            "max_denoising_steps", "t_min", "t_max", "stability_threshold",
            "confidence_threshold", "pad_token_id",
        )  # fmt: skip
        try:
            return cls().override(**settings, **{key: data.get(key) for key in same_name})
        except UsageError as error:
            raise ConfigError(f"generation_config.json: {error}") from None
