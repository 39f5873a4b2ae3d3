"""What will be written, worked out from the headers of the source before a weight is read.

A target is one parameter of the output: a matrix (or a stack of them, seen as rows x columns) that
is filled from pieces of source tensors. So whole tensors, stacks of gates and ups, and one tensor
per expert are all handled alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory

from mlx_diffgemma.checkpoint.names import (
    expected_shapes,
    is_quantizable,
    is_vision,
    is_vision_quantizable,
    module_path,
    to_hugging_face,
)
from mlx_diffgemma.checkpoint.quantization import (
    FLOATS,
    KEEP,
    Format,
    Recipe,
    formats_from_config,
    named_format,
)
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma_convert.pieces import Piece, gather, pieces_of
from mlx_diffgemma_convert.source import ITEM_BYTES, Source, SourceTensor, tensors_digest

FLOAT_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_PARTS = ("weight", "scales", "biases")


@dataclass(frozen=True)
class Stored:
    """A tensor of the output file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Target:
    """One parameter of the output.

    Attributes:
        name: its name in MLX.
        shape: its shape before quantization.
        format: how it is stored; one that does not quantize stores it in `dtype`.
        dtype: type of the values, or of scales that are floats.
        parts: pieces of the source by part: "weight" and, where that is quantized, "scales" and
            "biases".
        source_format: format in which the source stores it; None where it is not quantized.
    """

    name: str
    shape: tuple[int, ...]
    format: Format
    dtype: str
    parts: Mapping[str, tuple[Piece, ...]]
    source_format: Format | None = None

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1]) if self.shape else 1

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def source_bytes(self) -> int:
        return sum(p.rows * p.tensor.row_bytes for pieces in self.parts.values() for p in pieces)

    @property
    def shards(self) -> frozenset[str]:
        return frozenset(p.tensor.shard for pieces in self.parts.values() for p in pieces)

    @property
    def source_names(self) -> list[str]:
        return list(dict.fromkeys(p.tensor.name for part in self.parts.values() for p in part))

    def stored(self, hugging_face: bool = False) -> tuple[Stored, ...]:
        """The tensors of the output file that hold the parameter."""
        if not self.format.quantized:
            name = to_hugging_face(self.name) if hugging_face else self.name
            return (Stored(name, self.dtype, self.shape),)
        lead, path = self.shape[:-1], module_path(self.name)
        affine = self.format.mode == "affine"
        groups = (*lead, self.columns // self.format.group_size)
        scales = self.dtype if affine else "U8"
        packed = (*lead, self.columns * self.format.bits // 32)
        tensors = [
            Stored(f"{path}.weight", "U32", packed),
            Stored(f"{path}.scales", scales, groups),
        ]
        if affine:
            tensors.append(Stored(f"{path}.biases", self.dtype, groups))
        return tuple(tensors)


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of the output.

    Attributes:
        shards: the targets of each file, in the order in which they are written.
        fingerprint: equal for two plans that write the same bytes from the same headers.
        settings: the part of the fingerprint that the user chose, for messages.
    """

    source: Source
    config: ModelConfig
    recipe: Recipe
    shards: Mapping[str, tuple[Target, ...]]
    hugging_face: bool
    settings: Mapping[str, Any]
    fingerprint: str

    @property
    def targets(self) -> list[Target]:
        return [target for shard in self.shards.values() for target in shard]

    @property
    def source_bytes(self) -> int:
        return sum(target.source_bytes for target in self.targets)

    @property
    def in_float16(self) -> bool:
        """Whether the result computes in float16: its activations have the type of its norms."""
        return any(t.dtype == "F16" and len(t.shape) == 1 for t in self.targets)

    def stored_bytes(self, shard: str | None = None) -> int:
        targets = self.targets if shard is None else self.shards[shard]
        return sum(s.nbytes for t in targets for s in t.stored(self.hugging_face))


def make_plan(
    source: Source,
    recipe: Recipe,
    *,
    dtype: str | None = None,
    dequantize: bool = False,
    keep_formats: bool = False,
    hugging_face: bool = False,
    shard_size: int | str = "5GB",
    vision: bool = True,
) -> Plan:
    """Decide what becomes of every tensor of `source`.

    Args:
        recipe: formats of the modules; ignored when dequantizing.
        dtype: "bf16", "fp16" or "fp32" for what is not quantized; None keeps what the source has.
        dequantize: whether the source is quantized and the output is not.
        keep_formats: whether every module keeps the format in which the source stores it; the
            recipe is only a name then.
        hugging_face: whether to write the names of the reference implementation.
        shard_size: most bytes of a file.
        vision: whether the output holds the vision tower.

    Raises:
        CheckpointError: a tensor is missing, extra or of the wrong shape.
        UsageError: a format does not fit a module, or the source is quantized already.
    """
    config = ModelConfig.from_dict(source.config)
    if config.quantization is not None and not (dequantize or keep_formats):
        raise UsageError(
            f"{source.name} is quantized already; convert from the original weights, or add "
            "--dequantize."
        )
    if dequantize:
        recipe = Recipe("dequantized", ())
    if hugging_face and not vision:
        raise UsageError("transformers loads no checkpoint without its vision tower; keep it.")
    targets = _targets(source, config, recipe, dtype, keep_formats)
    if not vision:
        targets = [target for target in targets if not is_vision(target.name)]
    if hugging_face and any(target.format.quantized for target in targets):
        raise UsageError("the Hugging Face layout is unquantized; leave out the recipe.")
    targets.sort(key=lambda t: min((p.tensor.shard, p.tensor.start) for p in t.parts["weight"]))
    split = split_state_dict_into_shards_factory(
        {target.name: target for target in targets},
        get_storage_size=lambda t: sum(s.nbytes for s in t.stored(hugging_face)),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    by_name = {target.name: target for target in targets}
    shards = {
        file: tuple(by_name[name] for name in names)
        for file, names in split.filename_to_tensors.items()
    }
    settings = {
        "recipe": recipe.name,
        "rules": [str(rule) for rule in recipe.rules],
        "dtype": dtype,
        "layout": "hugging_face" if hugging_face else "mlx",
        "shard_size": str(shard_size),
        **({} if vision else {"vision": False}),
    }
    fingerprint = _fingerprint(source, settings)
    return Plan(source, config, recipe, shards, hugging_face, settings, fingerprint)


def _fingerprint(source: Source, settings: Mapping[str, Any]) -> str:
    config = json.dumps(source.config, sort_keys=True)
    content = json.dumps([settings, config, tensors_digest(source)], sort_keys=True)
    return sha256(content.encode()).hexdigest()


def _targets(
    source: Source, config: ModelConfig, recipe: Recipe, dtype: str | None, keep_formats: bool
) -> list[Target]:
    gathered = gather(source.tensors.values())
    names = {t.name: t.shape for t in source.tensors.values()}
    stored_as = (
        formats_from_config(
            config,
            {name: names[parts[0].name] for name, parts in gathered.items() if len(parts) == 1},
        )
        if config.quantization is not None
        else {}
    )
    expected = expected_shapes(config)
    layers = config.text.num_hidden_layers
    targets = []
    for name, shape in expected.items():
        path = module_path(name)
        before = stored_as.get(path)
        keys = {"weight": name}
        if before is not None:
            keys |= {part: f"{path}.{part}" for part in _PARTS[1:] if f"{path}.{part}" in gathered}
        tensors = {part: gathered.pop(key, []) for part, key in keys.items()}
        if not tensors["weight"]:
            raise CheckpointError(
                f"tensor {to_hugging_face(name)} is missing; fetch the weights again."
            )
        if before is not None:
            _check_packed(path, shape, before, tensors)
        parts = {
            part: pieces_of(keys[part], shape if before is None else found[0].shape, found)
            for part, found in tensors.items()
        }
        fmt = (
            recipe.format_for(path, layers) if is_quantizable(name, len(shape)) else _other(recipe)
        )
        if keep_formats:
            fmt = before or Format(KEEP)
        fmt.check_fits(path, shape)
        kept = tensors["scales" if before is not None and before.mode == "affine" else "weight"][0]
        targets.append(
            Target(name, shape, fmt, _value_dtype(kept, fmt, dtype, before), parts, before)
        )
    packed = {} if keep_formats else _packed_vision(config, gathered)
    for name, found in gathered.items():
        path = module_path(name)
        if path in packed:
            if name.endswith(".weight"):
                targets.append(_unpacked(name, packed[path], gathered, dtype))
            continue
        if not is_vision(name):
            raise CheckpointError(
                f"tensor {found[0].name} in {found[0].shard} has no place in the model that "
                "config.json describes; they are of different models."
            )
        shape = found[0].shape
        whole = {"weight": pieces_of(name, shape, found)}
        fmt = Format(KEEP)
        if is_vision_quantizable(name, len(shape)) and not keep_formats:
            fmt = recipe.format_for_vision(path, shape[-1])
        kind = found[0].dtype if fmt.mode == KEEP else _value_dtype(found[0], fmt, dtype, None)
        targets.append(Target(name, shape, fmt, kind, whole))
    return targets


def _check_packed(
    path: str, shape: tuple[int, ...], fmt: Format, tensors: Mapping[str, list[SourceTensor]]
) -> None:
    """Raise CheckpointError where packed weights, scales or biases are not of the type and shape
    that their format has."""
    groups = (*shape[:-1], shape[-1] // fmt.group_size)
    wanted = {
        "weight": (*shape[:-1], shape[-1] * fmt.bits // 32),
        "scales": groups,
        "biases": groups,
    }
    floats = tuple(FLOAT_DTYPES.values())
    kinds = {"weight": ("U32",), "scales": floats if fmt.mode == "affine" else ("U8",)}
    for part, found in tensors.items():
        for tensor in found:
            known = kinds.get(part, floats)
            if tensor.dtype not in known or tensor.shape != wanted[part]:
                raise CheckpointError(
                    f"tensor {tensor.name} in {tensor.shard} is {tensor.dtype} of shape "
                    f"{list(tensor.shape)}, and {fmt.name} has {' or '.join(known)} of shape "
                    f"{list(wanted[part])} there; fetch or convert the weights again."
                )
    missing = next((part for part, found in tensors.items() if not found), None)
    if missing is not None:
        raise CheckpointError(f"tensor {path}.{missing} is missing; fetch the weights again.")


def _packed_vision(
    config: ModelConfig, gathered: Mapping[str, list[SourceTensor]]
) -> dict[str, Format]:
    """The format of every packed matrix of the vision tower, by path. It is taken from the config,
    since no expected shapes are known to check it with."""
    formats = {}
    for name in gathered:
        path = module_path(name)
        if is_vision(name) and name.endswith(".scales") and f"{path}.weight" in gathered:
            formats[path] = named_format(config, path)
    return formats


def _unpacked(
    name: str, fmt: Format, gathered: Mapping[str, list[SourceTensor]], dtype: str | None
) -> Target:
    """The target that stores a packed matrix of the vision tower as a plain one."""
    path, packed = module_path(name), gathered[name][0]
    shape = (*packed.shape[:-1], packed.columns * 32 // fmt.bits)
    tensors = {part: gathered.get(f"{path}.{part}", []) for part in _PARTS}
    if fmt.mode != "affine":
        del tensors["biases"]
    _check_packed(path, shape, fmt, tensors)
    parts = {
        part: pieces_of(found[0].name, found[0].shape, found) for part, found in tensors.items()
    }
    kept = tensors["scales" if fmt.mode == "affine" else "weight"][0]
    keep = Format(KEEP)
    return Target(name, shape, keep, _value_dtype(kept, keep, dtype, fmt), parts, fmt)


def _other(recipe: Recipe) -> Format:
    """The format of parameters that are never quantized, such as norms: a recipe that makes plain
    numbers of all modules converts these parameters too."""
    plain = (r.format for r in recipe.rules if r.selector == "all" and r.format.mode in FLOATS)
    return next(plain, Format(KEEP))


def _value_dtype(
    tensor: SourceTensor, fmt: Format, dtype: str | None, before: Format | None
) -> str:
    if fmt.mode in FLOATS:
        return FLOAT_DTYPES[fmt.mode]
    if dtype is not None:
        return FLOAT_DTYPES[dtype]
    if tensor.dtype in FLOAT_DTYPES.values():
        return tensor.dtype
    if before is not None and before.mode != "affine":
        return "BF16"
    raise CheckpointError(
        f"tensor {tensor.name} in {tensor.shard} is of type {tensor.dtype}; convert from weights "
        "in bf16, fp16 or fp32."
    )
