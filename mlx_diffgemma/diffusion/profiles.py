"""Named trade-offs between speed and fidelity to the reference, as settings of `DiffusionConfig`.

Each adds to the one before. What they cost and gain on the demo model is in the README, with the
command that measures it.
"""

from __future__ import annotations

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.reading import shown

EXACT: dict[str, object] = {}
BALANCED: dict[str, object] = {
    **EXACT,
    "stop_at_eos": True,
    "soft_cutoff": 10.0,
    "forbid_empty": True,
}
FAST: dict[str, object] = {**BALANCED, "max_denoising_steps": 24, "confident_after": 12}
TURBO: dict[str, object] = {**FAST, "settled_after": 3}  # an experiment

PROFILES: dict[str, dict[str, object]] = {
    "exact": EXACT,
    "balanced": BALANCED,
    "fast": FAST,
    "turbo": TURBO,
}
DEFAULT = "balanced"


def profile_settings(name: str) -> dict[str, object]:
    """The settings of a profile.

    Raises:
        UsageError: there is no such profile.
    """
    if not isinstance(name, str) or name not in PROFILES:
        raise UsageError(f"unknown profile {shown(name)}; known are {', '.join(PROFILES)}.")
    return dict(PROFILES[name])
