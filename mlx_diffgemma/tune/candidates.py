"""What `tune` tries: rules that spend fewer passes, as settings of `DiffusionConfig`."""

from __future__ import annotations

from mlx_diffgemma.diffusion.profiles import BALANCED, PROFILES, SWIFT

Settings = dict[str, object]

REFERENCE = "exact"
"""The candidate that all others are compared with."""

_STOPS: Settings = {
    **BALANCED,
    **{name: SWIFT[name] for name in ("certain_below", "stable_after")},
}

CANDIDATES: dict[str, Settings] = {
    **{name: PROFILES[name] for name in ("exact", "balanced", "swift", "fast")},
    "stops alone": _STOPS,
    "stop early": {**_STOPS, "certain_below": 0.5, "stable_after": 1},
    "restarts": {**_STOPS, "restart_after": SWIFT["restart_after"]},
    "leaps": {**_STOPS, "leap_until": SWIFT["leap_until"]},
    "encoder": {**_STOPS, "encoder_check": 0.05},
    "swift, encoder": {**SWIFT, "encoder_check": 0.05},
    "bound": {**_STOPS, "entropy_bound": 0.3},
    "swift, bound": {**SWIFT, "entropy_bound": 0.3},
    "settled": {**_STOPS, "settled_bound": SWIFT["settled_bound"]},
    "runs": {**_STOPS, "run_entropy": 0.1},
    "cool 32": {**_STOPS, "cooling_steps": 32},
    "cool 24": {**_STOPS, "cooling_steps": 24},
    "cool 16": {**_STOPS, "cooling_steps": 16},
    "share": {**_STOPS, "bound_share": SWIFT["bound_share"]},
    "swift, share": {**SWIFT, "bound_share": 0.04},
    "likeliest": {**_STOPS, "draw_likeliest": True},
}
"""The candidates by name. docs/tried-and-left.md has what was measured of such rules on the
demo model."""
