"""How the temperature falls over the denoising steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearTemperature:
    """From `t_max` at the first step to just above `t_min` at the last, as the reference's
    `LinearTemperatureScheduleLogitsProcessor` (which counts its steps down)."""

    t_min: float
    t_max: float
    max_steps: int

    def at(self, step: int) -> float:
        """Temperature of step `step`, from 1 to `max_steps`."""
        remaining = self.max_steps - step + 1
        return self.t_min + (self.t_max - self.t_min) * (remaining / self.max_steps)
