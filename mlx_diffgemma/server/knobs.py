"""Fields that requests of all protocols share: how a canvas is denoised."""

from __future__ import annotations

from typing import Any

from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.profiles import PROFILES
from mlx_diffgemma.server.fields import Fields
from mlx_diffgemma.settings import settings_of

MOST_STEPS = 4096
"""Most denoising steps of one canvas that a request may ask for."""
_PREFIX = "diffusion_"
_NAMES = {f"{_PREFIX}{name}": name for name in settings_of(DiffusionConfig) if name != "max_tokens"}
_NAMES[f"{_PREFIX}max_steps"] = "max_denoising_steps"
ELSEWHERE = {
    f"{_PREFIX}{name}": "is about a canvas of its own; send it to /v1/canvas."
    for name in ("seed_canvas", "pinned", "read_only", "constrained")
}
"""Fields about one canvas, which are refused where whole answers are asked for."""


def knobs(fields: Fields) -> dict[str, Any]:
    """The `settings` and the `profile` of what is asked: `diffusion_NAME` gives the field NAME of
    `DiffusionConfig`, and `diffusion_profile` the name of a profile.

    Raises:
        RefusedError: there are too many steps, or the profile is unknown (400).
    """
    settings = {}
    for key, name in _NAMES.items():
        value = fields.get(key)
        if value is not None:
            settings[name] = most_steps(fields, key) if name == "max_denoising_steps" else value
    return {"settings": settings, "profile": fields.choice(f"{_PREFIX}profile", PROFILES)}


def most_steps(fields: Fields, key: str) -> int | None:
    """The most denoising steps of a canvas that a field asks for; None where it is left out.

    Raises:
        RefusedError: it is no number of steps, or there are too many (400).
    """
    steps = fields.integer(key, 1)
    if steps is not None and steps > MOST_STEPS:
        raise fields.refused(key, f"must be {MOST_STEPS} at most.")
    return steps
