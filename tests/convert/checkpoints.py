"""Small checkpoints in every layout that the converter reads, and ways to run it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx

from mlx_diffgemma.checkpoint.quantization import RECIPES, Recipe
from mlx_diffgemma_convert.job import Outcome, convert
from mlx_diffgemma_convert.journal import Journal
from mlx_diffgemma_convert.plan import Plan, make_plan
from mlx_diffgemma_convert.source import FolderSource

ROOT = Path(__file__).parents[2]


def _script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny = _script("make_tiny_checkpoint")


def write_tiny(
    folder: Path, *, layers: int = 3, seed: int = 0, shard_bytes: int = 1 << 40, **text
) -> Path:
    """A small random checkpoint in Hugging Face form, with a tokenizer's files beside it."""
    config = tiny.make_config({**tiny.SMALL, **text}, tiny.SMALL_VISION, layers)
    tiny.write_checkpoint(folder, config, seed=seed, shard_bytes=shard_bytes)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nbase_model: someone/base\nlanguage: en\n---\n\n# Theirs\n"
    )
    return folder


def read_weights(folder: Path) -> dict[str, mx.array]:
    weights = {}
    for path in sorted(folder.glob("model*.safetensors")):
        weights.update(mx.load(str(path)))
    return weights


def write_weights(folder: Path, weights: dict[str, mx.array]) -> None:
    """Replace the weights of a folder by these, in one file without an index."""
    mx.eval(weights)
    for path in (*folder.glob("model*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})


def edit_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def plan_of(folder: Path, recipe: str | Recipe = "4bit", **options) -> Plan:
    recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
    return make_plan(FolderSource(folder), recipe, **options)


def convert_to(target: Path, plan: Plan, **options) -> Outcome:
    with Journal(target) as journal:
        return convert(plan, journal, **options)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mlx_diffgemma_convert", *map(str, arguments)]


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    environment = {**os.environ, "COLUMNS": "100", **options.pop("env", {})}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment, timeout=120, **options
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
