"""The model that a plan is for: released ones from built-in shapes, all others from headers."""

from __future__ import annotations

from pathlib import Path

from mlx_diffgemma.checkpoint import locate
from mlx_diffgemma.checkpoint.quantization import (
    RECIPES,
    formats_from_config,
    parameter_bytes,
    recipe_formats,
)
from mlx_diffgemma.cli.settings import DEFAULT_MODEL
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.distributed.plan import STORED, PlannedModel, model_in

RECIPE_OF = {DEFAULT_MODEL: "4bit", locate.RELEASE: "bf16"}
"""Released repositories, with the recipe that each follows."""


def released(recipe: str) -> PlannedModel:
    """The released model in the formats of a recipe."""
    from mlx_diffgemma.bench.presets import config_like

    shapes = ModelConfig.from_dict(config_like(locate.RELEASE))
    formats = recipe_formats(shapes, RECIPES[recipe])
    note = f"{recipe}, from the shapes of the release; activations in bf16, as on a GPU"
    return PlannedModel(shapes, formats, parameter_bytes(shapes, formats), 2, note)


def planned_model(name: str, revision: str | None = None, *, here: bool = False) -> PlannedModel:
    """The model that a user names; no weights are downloaded or loaded.

    Args:
        name: a folder, a repository or "demo".
        here: whether to count what a folder's weights take as loaded on this machine; else they
            count as stored.

    Raises:
        CheckpointError, ConfigError: there is no such model, or it is damaged.
    """
    if name in RECIPE_OF:
        return released(RECIPE_OF[name])
    if name == locate.DEMO or Path(name).expanduser().is_dir():
        return model_in(locate.locate(name), here=here)
    return _on_the_hub(name, revision)


def _on_the_hub(name: str, revision: str | None) -> PlannedModel:
    from mlx_diffgemma.checkpoint.names import canonical_name, is_vision
    from mlx_diffgemma_convert.hub import open_source

    source = open_source(name, revision)
    config = ModelConfig.from_dict(source.config)
    named = ((canonical_name(each.name), each) for each in source.tensors.values())
    text = {own: each for own, each in named if own is not None and not is_vision(each.name)}
    formats = formats_from_config(config, {own: each.shape for own, each in text.items()})
    sizes = {own: each.nbytes for own, each in text.items()}
    return PlannedModel(config, formats, sizes, 2, STORED)
