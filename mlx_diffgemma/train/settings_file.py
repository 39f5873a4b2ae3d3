"""The settings of a run from a YAML file in mlx-lm's form, or from an earlier run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.train.config import OPTIMIZERS, LoraParameters, TrainConfig

RUN_KEYS = (
    "model", "revision", "data", "adapter_path", "resume_adapter_file", "test", "test_batches",
    "report_to", "project_name", "trust_remote_code", "eval_generate", "chat_template",
)  # fmt: skip
"""Keys of a settings file that are about the run rather than the training."""

_IGNORED = ("train", "config", "fingerprint")
_SCHEDULES = {"cosine_decay": "cosine", "linear_schedule": "linear"}


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a settings file, checked by `normalized`.

    Raises:
        UsageError: the file cannot be read, or holds keys or values that mean nothing.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UsageError(f"--config {path} cannot be read ({reason}); check the path.") from None
    except (RecursionError, ValueError):
        raise UsageError(
            f"--config {path} cannot be read (nested too deep, or a null byte)."
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "not YAML"
        raise UsageError(f"--config {path}{where}: {reason}.") from None
    if not isinstance(content, Mapping):
        raise UsageError(f"--config {path}: must hold 'key: value' lines.")
    try:
        return normalized(content)
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from None


def normalized(content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under our names, from mlx-lm's: its learning-rate schedules and its optimizer
    arguments by optimizer become ours.

    Raises:
        UsageError: a key is unknown, or a schedule or `lora_parameters` are malformed.
    """
    known = {field.name for field in fields(TrainConfig)}
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key in _IGNORED or value is None:
            continue
        if key == "hf_dataset":
            raise UsageError("hf_dataset is not supported; name the data set with data.")
        if key not in known and key not in RUN_KEYS:
            known_keys = ", ".join(sorted({*known, *RUN_KEYS}))
            raise UsageError(f"unknown key '{key}'; known are {known_keys}.")
        found[key] = _number(value)
    if isinstance(found.get("lr_schedule"), Mapping):
        found |= _schedule(found.pop("lr_schedule"))
    arguments = found.get("optimizer_config")
    if isinstance(arguments, Mapping) and arguments and set(arguments) <= set(OPTIMIZERS):
        name = found.get("optimizer", TrainConfig.optimizer)
        found["optimizer_config"] = arguments.get(name) or {}
    if "lora_parameters" in found:
        found["lora_parameters"] = lora_parameters(found["lora_parameters"])
    return found


def lora_parameters(content: Any) -> dict[str, Any]:
    """`rank`, `scale`, `dropout` and `keys`, as far as they are given.

    Raises:
        UsageError: a key is unknown, or the content is malformed.
    """
    known = {field.name for field in fields(LoraParameters)}
    if not isinstance(content, Mapping):
        raise UsageError("lora_parameters must hold rank, scale, dropout and perhaps keys.")
    for key in content:
        if key not in known:
            hint = " (scale is alpha / rank)" if key == "alpha" else ""
            raise UsageError(f"lora_parameters: unknown key '{key}'{hint}; known are rank, scale, "
                             "dropout, keys.")  # fmt: skip
    keys = content.get("keys")
    if keys is not None and (
        not isinstance(keys, (list, tuple)) or not all(isinstance(key, str) for key in keys)
    ):
        raise UsageError("lora_parameters: keys must be a list of names.")
    found = {key: _number(value) for key, value in content.items() if value is not None}
    return {**found, "keys": tuple(keys)} if keys else found


def _schedule(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that mlx-lm's `lr_schedule` of a name, arguments and a warm-up stands for."""
    name, arguments = content.get("name"), [_number(a) for a in content.get("arguments") or ()]
    if name not in _SCHEDULES or not arguments:
        raise UsageError(
            f"lr_schedule '{name}' is unknown or has no arguments; known are "
            f"{', '.join(_SCHEDULES)}, or write lr_schedule: cosine."
        )
    first = arguments[0]
    end = (arguments[2:3] if name == "cosine_decay" else arguments[1:2]) or [0.0]
    return {
        "lr_schedule": _SCHEDULES[name],
        "learning_rate": first,
        "final_learning_rate": end[0] / first if first else 0.0,
        "warmup": content.get("warmup", 0),
    }


def _number(value: Any) -> Any:
    """The number that a text such as "1e-5" spells, since YAML takes 1e-5 for a text; any other
    value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value) if "e" in value.lower() else value
    except ValueError:
        return value
