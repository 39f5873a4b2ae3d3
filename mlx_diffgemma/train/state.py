"""A run on the disk: what was trained, and what it takes to go on as if it had never stopped.

`adapters.safetensors` holds the trainable parameters under their names, for `--adapter-path`;
`state.safetensors` holds them again with the optimizer's state and how far the run is. Each file
is replaced in one rename, and the state alone is read on resuming, so a run can be killed at any
moment. What data and random numbers come next follows from the step and the settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_diffgemma import disk
from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma.reading import Section, os_reason, parse_object, shown
from mlx_diffgemma.train.config import TrainConfig

ADAPTERS = "adapters.safetensors"
STATE = "state.safetensors"
_ANEW = "choose another folder to begin anew"

# These settings must stay as they were when a run goes on; the others may change.
_FIXED = (
    "batch_size", "grad_accumulation_steps", "sorted_batches", "seed", "optimizer",
    "fine_tune_type", "num_layers",
)  # fmt: skip

Tree = dict[str, Any]


@dataclass(frozen=True)
class RunState:
    """A run after `step` optimizer steps, which saw `tokens` ids. `parameters` and `optimizer` are
    trees of arrays: what is trained, and the state of the optimizer."""

    step: int
    tokens: int
    parameters: Tree
    optimizer: Tree


def save(folder: Path, state: RunState, config: TrainConfig) -> None:
    """Write `adapters.safetensors` and `state.safetensors` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters, optimizer = _flat(state.parameters), _flat(state.optimizer)
    arrays = {f"parameters.{name}": value for name, value in parameters.items()}
    arrays |= {f"optimizer.{name}": value for name, value in optimizer.items()}
    run = {"step": state.step, "tokens": state.tokens, "config": asdict(config)}
    _replace(folder / STATE, arrays, {"run": json.dumps(run)})
    _replace(folder / ADAPTERS, parameters, {"format": "mlx"})


def load(folder: Path, parameters: Tree, config: TrainConfig) -> RunState | None:
    """The state in `folder`, or None where there is none. `parameters` are the model's trainable
    ones, whose names and shapes the state must have.

    Raises:
        CheckpointError, ConfigError: the file is damaged.
        UsageError: the state is of a run with other settings or parameters.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        arrays, metadata = _read(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is not the state of a run ({os_reason(error)}).") from None
    if "run" not in metadata:
        raise CheckpointError(f"{path} is not the state of a run (it names none); {_ANEW}.")
    run = Section(parse_object(metadata["run"], path, mend=_ANEW), "", str(path), _ANEW)
    step, tokens = run.count("step"), run.count("tokens")
    begun = run.section("config").data
    for name in _FIXED:
        if begun.get(name) != getattr(config, name):
            raise UsageError(
                f"{path} was begun with {name} {shown(begun.get(name))}, not "
                f"{getattr(config, name)}; go on with that, or choose another folder."
            )
    saved = _within(arrays, "parameters.")
    expected = _flat(parameters)
    if {n: a.shape for n, a in saved.items()} != {n: a.shape for n, a in expected.items()}:
        raise UsageError(
            f"{path} holds other parameters than are trained now; use the same model and targets, "
            "or choose another folder."
        )
    return RunState(
        step=step,
        tokens=tokens,
        # In the order of the model, in which the norm of the gradients is summed.
        parameters=tree_unflatten([(name, saved[name]) for name in expected]),
        optimizer=tree_unflatten(list(_within(arrays, "optimizer.").items())),
    )


def _flat(tree: Tree) -> dict[str, mx.array]:
    return dict(tree_flatten(tree))


def _within(arrays: Mapping[str, mx.array], prefix: str) -> dict[str, mx.array]:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _replace(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Write a file so that `path` is either the old or the new one, whatever happens."""
    partial = path.with_name(f".{path.stem}.part.safetensors")
    mx.save_safetensors(str(partial), arrays, metadata)
    disk.sync(partial)
    disk.put_in_place(partial, path)


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    mx.eval(loaded[0])  # the file is replaced later, so no array may still have to be read from it
    return loaded
