"""The files around the weights: config, index, and what is copied from the source."""

from __future__ import annotations

import errno
import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

from mlx_diffgemma.checkpoint.names import is_quantizable, is_vision, module_path
from mlx_diffgemma.checkpoint.quantization import FLOATS, quantization_entry
from mlx_diffgemma.config import ModelConfig, both_spellings, check_generation_ids
from mlx_diffgemma.disk import write_atomically
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.reading import os_reason, read_object
from mlx_diffgemma_convert.plan import FLOAT_DTYPES, Plan
from mlx_diffgemma_convert.source import GENERATION

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk without room says
INDEX = "model.safetensors.index.json"


def converted_config(plan: Plan) -> dict[str, Any]:
    """`config.json` of the output: the source's, with both spellings of the attention sizes and the
    formats of the modules."""
    config = both_spellings(plan.source.config)
    without = ("vision_config",) if plan.settings.get("vision") is False else ()
    for key in ("quantization", "quantization_config", "_name_or_path", *without):
        config.pop(key, None)
    names = {stored: FLOATS[fmt] for fmt, stored in FLOAT_DTYPES.items()}
    dtypes = {target.dtype for target in plan.targets if not is_vision(target.name)}
    if len(dtypes) == 1:
        config["dtype"] = names[dtypes.pop()]
        config["text_config"]["dtype"] = config["dtype"]
        config.pop("torch_dtype", None)
    modules = [
        t
        for t in plan.targets
        # What reads the tower elsewhere takes each module that has scales for packed.
        if is_quantizable(t.name, len(t.shape)) or (is_vision(t.name) and t.format.quantized)
    ]
    block = quantization_entry(
        {module_path(t.name): t.format for t in modules},
        {module_path(t.name): t.rows * t.columns for t in modules},
    )
    if block is not None:
        config["quantization"] = config["quantization_config"] = block
    config["text_config"] = dict(sorted(config["text_config"].items()))
    return dict(sorted(config.items()))


def weight_index(plan: Plan) -> dict[str, Any]:
    """`model.safetensors.index.json`, with totals as mlx-lm writes them."""
    text = [t for t in plan.targets if not is_vision(t.name)]
    weight_map = {
        stored.name: file
        for file, targets in plan.shards.items()
        for target in targets
        for stored in target.stored(plan.hugging_face)
    }
    return {
        "metadata": {
            "total_size": plan.stored_bytes(),
            "total_parameters": sum(t.rows * t.columns for t in text),
        },
        "weight_map": dict(sorted(weight_map.items())),
    }


def check_side_files(plan: Plan) -> None:
    """Check what is copied and read again when the result is loaded, before any work is done.

    Raises:
        CheckpointError, ConfigError: `generation_config.json` is damaged, or names an id outside
            the vocabulary.
    """
    path = plan.source.side_files().get(GENERATION)
    if path is not None:
        vocab_size = ModelConfig.from_dict(plan.source.config).text.vocab_size
        check_generation_ids(read_object(path), vocab_size)


def write_side_files(plan: Plan, folder: Path) -> dict[str, str]:
    """Write config and index, and copy the other files of the source. Returns the sha256 of each
    file, including that of the model card."""
    for name, content in (("config.json", converted_config(plan)), (INDEX, weight_index(plan))):
        write_atomically(folder / name, json_bytes(content))
    names = ["README.md", "config.json", INDEX]
    for name, path in plan.source.side_files().items():
        _copy(path, folder / name)
        names.append(name)
    return {name: file_digest(folder / name) for name in names}


def _copy(path: Path, target: Path) -> None:
    try:
        shutil.copyfile(path, target)
    except OSError as error:
        if error.errno in FULL:
            raise
        raise CheckpointError(
            f"{path} cannot be copied ({os_reason(error)}); check the path and who may read it."
        ) from None


def json_bytes(content: Any) -> bytes:
    """JSON in the layout of every file that the converter writes."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def file_digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
