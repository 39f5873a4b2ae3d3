"""DiffusionGemma on Apple Silicon, with MLX.

The public names are imported when they are first used, so that `import mlx_diffgemma` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_diffgemma.batch import BatchResponse, batch_generate
    from mlx_diffgemma.checkpoint.loading import load_model
    from mlx_diffgemma.diffusion.config import DiffusionConfig
    from mlx_diffgemma.editing.decide import calibrate, decide
    from mlx_diffgemma.editing.edit import edit
    from mlx_diffgemma.editing.fill import fill
    from mlx_diffgemma.editing.infill import infill
    from mlx_diffgemma.editing.structured import generate_structured
    from mlx_diffgemma.errors import DiffGemmaError
    from mlx_diffgemma.generation import (
        GenerationResponse,
        generate,
        load,
        stream_generate,
    )
    from mlx_diffgemma.text.prompt_settings import PromptSettings

__version__ = "0.1.0"

_HOMES = {
    "BatchResponse": "mlx_diffgemma.batch",
    "DiffGemmaError": "mlx_diffgemma.errors",
    "DiffusionConfig": "mlx_diffgemma.diffusion.config",
    "GenerationResponse": "mlx_diffgemma.generation_response",
    "PromptSettings": "mlx_diffgemma.text.prompt_settings",
    "batch_generate": "mlx_diffgemma.batch",
    "calibrate": "mlx_diffgemma.editing.decide",
    "decide": "mlx_diffgemma.editing.decide",
    "edit": "mlx_diffgemma.editing.edit",
    "fill": "mlx_diffgemma.editing.fill",
    "generate": "mlx_diffgemma.generation",
    "generate_structured": "mlx_diffgemma.editing.structured",
    "infill": "mlx_diffgemma.editing.infill",
    "load": "mlx_diffgemma.generation",
    "load_model": "mlx_diffgemma.checkpoint.loading",
    "stream_generate": "mlx_diffgemma.generation",
}

__all__ = [
    "BatchResponse",
    "DiffGemmaError",
    "DiffusionConfig",
    "GenerationResponse",
    "PromptSettings",
    "batch_generate",
    "calibrate",
    "decide",
    "edit",
    "fill",
    "generate",
    "generate_structured",
    "infill",
    "load",
    "load_model",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
