"""Named trade-offs between speed and fidelity to the reference, as settings of `DiffusionConfig`.

Each profile but 'exact' adds settings to another one. docs/guides/speed.md has what was measured of
them on the demo model, with the command that measures it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.disk import write_atomically
from mlx_diffgemma.errors import DiffGemmaError, UsageError
from mlx_diffgemma.reading import shown

EXACT: dict[str, object] = {}
BALANCED: dict[str, object] = {
    **EXACT,
    "stop_at_eos": True,
    "soft_cutoff": 10.0,
    "forbid_empty": True,
}
SWIFT: dict[str, object] = {
    **BALANCED,
    "certain_below": 0.3,
    "stable_after": 3,
    "restart_after": 3,
    "leap_until": 15,
    "bound_share": 0.02,
    "settled_bound": 1.0,
    "settled_from": 9,
    "likeliest_from": 9,
}
FAST: dict[str, object] = {**BALANCED, "max_denoising_steps": 24, "confident_after": 12}
TURBO: dict[str, object] = {**FAST, "settled_after": 3}  # an experiment

PROFILES: dict[str, dict[str, object]] = {
    "exact": EXACT,
    "balanced": BALANCED,
    "swift": SWIFT,
    "fast": FAST,
    "turbo": TURBO,
}
DEFAULT = "balanced"

_FORMAT = 1  # version of a profile's file
_SUFFIX = ".json"


def profile_settings(profile: str, identity: Callable[[], str] | None = None) -> dict[str, object]:
    """The settings of a profile: one of `PROFILES`, or the file that `save_profile` wrote.

    Args:
        identity: returns the fingerprint of the model that a file must be made for; None takes a
            file made for any model.

    Raises:
        UsageError: there is no such profile, or the file is damaged or made for another model.
    """
    if isinstance(profile, str) and profile in PROFILES:
        return dict(PROFILES[profile])
    if not isinstance(profile, str) or not profile.endswith(_SUFFIX):
        raise UsageError(
            f"unknown profile {shown(profile)}; known are {', '.join(PROFILES)}. A file that "
            f"`tune` wrote ends with {_SUFFIX}."
        )
    settings, made_for = _read(Path(profile))
    if identity is not None and identity() != made_for:
        raise UsageError(f"{profile} was tuned for another model; tune this one.")
    return settings


def save_profile(
    path: Path, settings: Mapping[str, object], identity: str, measured: Mapping[str, object]
) -> None:
    """Write settings for the model of a fingerprint, with what was measured of them.

    Raises:
        DiffGemmaError: the file cannot be written.
    """
    made = {
        "format": _FORMAT,
        "model": identity,
        "settings": dict(settings),
        "measured": dict(measured),
    }
    try:
        write_atomically(path, (json.dumps(made, indent=1) + "\n").encode())
    except OSError as error:
        raise DiffGemmaError(f"{path} cannot be written: {error.strerror}.") from None


def _read(path: Path) -> tuple[dict[str, object], str]:
    """The settings of a file, and the fingerprint of the model that they are for."""
    try:
        made = json.loads(path.read_bytes())
        if made["format"] != _FORMAT:
            raise ValueError
        settings, identity = dict(made["settings"]), str(made["model"])
        DiffusionConfig(t_min=0.0).override(**{"t_max": 1e6, **settings})
    except OSError as error:
        raise UsageError(f"profile {path} cannot be read: {error.strerror}.") from None
    except UsageError as error:
        raise UsageError(f"profile {path}: {error}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UsageError(f"{path} is no profile; write one with `mlx-diffgemma tune`.") from None
    return settings, identity
