"""What `tune` tries: rules that spend fewer passes, as settings of `DiffusionConfig`."""

from __future__ import annotations

from mlx_diffgemma.diffusion.profiles import BALANCED, PROFILES

Settings = dict[str, object]

REFERENCE = "exact"
"""The candidate that all others are compared with."""

_STOP: Settings = {**BALANCED, "certain_below": 0.2, "stable_after": 3}

CANDIDATES: dict[str, Settings] = {
    **{name: PROFILES[name] for name in ("exact", "balanced", "fast")},
    "sure": {**BALANCED, "certain_below": 0.2},
    "same": {**BALANCED, "stable_after": 3},
    "stop": _STOP,
}
