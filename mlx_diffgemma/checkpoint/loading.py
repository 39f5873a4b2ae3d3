"""Loading a checkpoint into a model; each way in which a checkpoint can be broken has its error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import proxy

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_diffgemma import cpu
from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.checkpoint.locate import locate
from mlx_diffgemma.checkpoint.names import (
    CLIP_BOUNDS,
    VISION_ROOT,
    canonical_name,
    expected_shapes,
    expert_piece,
    is_vision,
    vision_shapes,
)
from mlx_diffgemma.checkpoint.quantization import Format, formats_from_config
from mlx_diffgemma.checkpoint.shards import StoredTensor, stored_tensors
from mlx_diffgemma.checks import check_flag
from mlx_diffgemma.config import ModelConfig, TextConfig, check_generation_ids
from mlx_diffgemma.errors import CheckpointError, PromptError, UsageError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.vision import Vision
from mlx_diffgemma.reading import is_there, read_object, shown

_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_FLOATS = ("F64", "F32", "F16", "BF16")
_ITEM_BYTES = {"F64": 8, "F32": 4, "U32": 4, "F16": 2, "BF16": 2, "U8": 1}


def load_model(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    lazy: bool = False,
    dtype: mx.Dtype | None = None,
    check: bool = False,
    name: str | None = None,
    vision: bool | None = None,
) -> tuple[DiffusionGemma, dict[str, Any]]:
    """Load a model without its tokenizer, for work on token ids.

    Reads the layout of Hugging Face and the converted layout of MLX.

    Args:
        path_or_repo: a folder, a Hugging Face repository, "demo" or "demo-image".
        revision: a branch, tag or commit of the repository; None takes its main branch.
        lazy: leave the weights on disk until they are used.
        dtype: type of the weights that are not quantized, and so of the activations. None keeps
            that of the checkpoint on a GPU and takes float32 on a CPU, where MLX is fast in no
            other.
        check: look for NaN and infinity in every weight.
        name: what errors call the model; None takes `path_or_repo`.
        vision: whether to load the vision tower, which pictures need. None leaves it on disk until
            a picture comes, and False refuses pictures.

    Returns:
        The model and its `config.json` (with the content of `generation_config.json` under the key
        of that name).

    Raises:
        UsageError: an argument is of another type.
        CheckpointError, ConfigError: the checkpoint cannot be found, or is incomplete, damaged or
            of another kind.
        MemoryShortageError: the model does not fit into memory.
    """
    check_flag("lazy", lazy)
    opened = open_checkpoint(
        path_or_repo, revision=revision, dtype=dtype, check=check, name=name, vision=vision
    )
    if not lazy:
        opened.require_memory(opened.config.text, opened.stored)
    opened.compare_shapes()
    model = DiffusionGemma(opened.config)
    opened.prepare(model, opened.stored, opened.formats())
    if not cpu.is_device():
        model.compile()
    if lazy:
        # What is read later may be read in any thread, and other streams are one thread's own.
        with mx.stream(mx.new_thread_unsafe_stream(mx.cpu)):
            weights = _read(opened.stored, opened.dtype)
        model.read_weights = _Unread(model)
    else:
        weights = _read(opened.stored, opened.dtype)
    opened.fill(model, weights, lazy=lazy)
    return model, dict(opened.raw)


def open_checkpoint(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    dtype: mx.Dtype | None = None,
    check: bool = False,
    name: str | None = None,
    vision: bool | None = None,
) -> Checkpoint:
    """Find a checkpoint and read all of it but the weights. Arguments and errors are those of
    `load_model`."""
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"dtype must be float32, float16 or bfloat16 of mlx, not {shown(dtype)}.")
    for flag, value in (("check", check), ("vision", vision)):
        if value is not None:
            check_flag(flag, value)
    folder = locate(path_or_repo, revision)
    raw = read_config(folder)
    config = ModelConfig.from_dict(raw)
    if raw.get("generation_config") is not None:
        inside = not (folder / "generation_config.json").exists()
        check_generation_ids(raw["generation_config"], config.text.vocab_size, inside_config=inside)
    every = stored_tensors(folder)
    stored = _text_tensors(every)
    dtype = _fast_dtype() if dtype is None else dtype
    eyes = _Eyes(
        _tower_tensors(config, every), config, dtype, check=check, name=name or str(path_or_repo)
    )
    if vision and not eyes.stored:
        raise CheckpointError(eyes.missing())
    return Checkpoint(config, raw, stored, dtype, check, vision, eyes)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found and whose headers were read, and the steps by which a
    model, or a part of one, is loaded from it.

    Attributes:
        raw: the content of `config.json`, as `load_model` returns it.
        stored: the tensors of the text model, by the name of the parameter they fill.
        dtype: type of the weights that are not quantized; None keeps that of the checkpoint.
        check: whether to look for NaN and infinity in every weight.
        vision: whether to load the vision tower; None leaves it on disk until a picture comes, and
            False refuses pictures.
        eyes: the vision tower.
    """

    config: ModelConfig
    raw: dict[str, Any]
    stored: dict[str, StoredTensor]
    dtype: mx.Dtype | None
    check: bool
    vision: bool | None
    eyes: _Eyes

    def sizes(
        self, stored: Mapping[str, StoredTensor] | None = None, *, as_stored: bool = False
    ) -> dict[str, int]:
        """Bytes of each tensor in `stored` (of all of the text model, if it is None) once it is
        loaded, or as it is on disk."""
        dtype = None if as_stored else self.dtype
        tensors = self.stored if stored is None else stored
        return {name: _loaded_bytes(tensor, dtype) for name, tensor in tensors.items()}

    def require_memory(self, text: TextConfig, stored: Mapping[str, StoredTensor]) -> None:
        """Refuse to load `stored` into a model of the sizes in `text`, and the vision tower if it
        is wanted at once, where they do not fit.

        Raises:
            MemoryShortageError: they do not fit into memory.
        """
        size = sum(self.sizes(stored).values())
        if self.vision:
            size += self.eyes.nbytes
        estimate = memory.estimate(
            text,
            size,
            canvas_length=self.config.canvas_length,
            activation_bytes=2 if self.dtype is None else self.dtype.size,
        )
        memory.require(estimate, self.eyes.name)

    def compare_shapes(self) -> None:
        """Compare stored matrices with the shapes of the config, before a model of these is made.

        Raises:
            CheckpointError: naming the first tensor of another shape.
        """
        _compare_shapes(expected_shapes(self.config), self.stored)

    def formats(self) -> dict[str, Format]:
        """The format of every quantized module of the text model, by its path.

        Raises:
            CheckpointError: config and stored tensors contradict each other.
        """
        return _formats(self.config, self.stored)

    def prepare(
        self,
        model: DiffusionGemma,
        stored: Mapping[str, StoredTensor],
        formats: Mapping[str, Format],
    ) -> None:
        """Make `model` ready for the tensors in `stored`: quantize its modules, and give it the
        forms for a CPU where it runs on one. Names, shapes and paths are those of `model`.

        Raises:
            CheckpointError: naming the first tensor that is missing, wrong or extra.
        """
        _quantize_modules(model, formats)
        _require_shapes(model, stored)
        if cpu.is_device():
            cpu.use(model)

    def fill(
        self, model: DiffusionGemma, weights: Mapping[str, mx.array], *, lazy: bool = False
    ) -> None:
        """Put weights into a model that is prepared, and the vision tower if it is wanted at once.

        Raises:
            CheckpointError: a weight holds NaN or infinity, or the tower is damaged.
        """
        model.load_weights(list(weights.items()))
        model.eval()
        if self.check:
            _check_finite(model)
        if not lazy:
            mx.eval(model.parameters())
        config, eyes = self.config, self.eyes
        model.reads_pictures = bool(eyes.stored) and self.vision is not False
        if eyes.stored:
            ids = (config.image_token_id, config.boi_token_id, config.eoi_token_id)
            model.never_drawn = tuple(
                token for token in ids if token is not None and token < config.text.vocab_size
            )
        model.load_vision = eyes.closed if self.vision is False else eyes.load
        if self.vision:
            model.require_vision()


@dataclass(frozen=True)
class _Eyes:
    """The vision tower of a checkpoint, on disk.

    Attributes:
        stored: its tensors by name; none where the checkpoint has no tower.
        dtype: type of the weights that are not quantized; None keeps that of the checkpoint.
        check: whether to look for NaN and infinity in every weight.
        name: what errors call the model.
    """

    stored: dict[str, StoredTensor]
    config: ModelConfig
    dtype: mx.Dtype | None
    check: bool
    name: str

    @property
    def nbytes(self) -> int:
        """Bytes that it takes once it is loaded."""
        return sum(_loaded_bytes(tensor, self.dtype) for tensor in self.stored.values())

    def missing(self) -> str:
        return (
            f"{self.name} has no vision tower, so it reads no pictures; take a checkpoint that "
            "was converted with one."
        )

    def closed(self) -> Vision:
        raise PromptError(
            f"{self.name} was loaded without its vision tower, so it reads no pictures."
        )

    def load(self) -> Vision:
        """The tower, from disk.

        Raises:
            PromptError: the checkpoint has none.
            CheckpointError: it is incomplete or damaged.
            MemoryShortageError: it does not fit.
        """
        config = self.config.vision
        if config is None or not self.stored:
            raise PromptError(self.missing())
        memory.require(memory.MemoryEstimate(self.nbytes, 0, 0, 0), f"the tower of {self.name}")
        size = self.config.text.hidden_size
        _compare_shapes(vision_shapes(config, size), self.stored)
        vision = Vision(config, size)
        own = {name.removeprefix(VISION_ROOT): tensor for name, tensor in self.stored.items()}
        formats = _formats(self.config, self.stored).items()
        _quantize_modules(vision, {path.removeprefix(VISION_ROOT): fmt for path, fmt in formats})
        _require_shapes(vision, own)
        if cpu.is_device():
            cpu.use(vision)
        vision.load_weights(list(_read(own, self.dtype).items()))
        vision.eval()
        if self.check:
            _check_finite(vision)
        mx.eval(vision.parameters())
        return vision


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`, with that of `generation_config.json`, where there is one,
    under the key "generation_config".

    Raises:
        CheckpointError: a file is missing or damaged, or the folder holds adapters and no model.
    """
    if not is_there(folder / "config.json") and is_there(folder / "adapter_config.json"):
        raise CheckpointError(
            f"{folder} holds adapters and no model; name their base with --model and this folder "
            "with --adapter-path."
        )
    raw = read_object(folder / "config.json")
    generation = folder / "generation_config.json"
    if is_there(generation):
        raw["generation_config"] = read_object(generation)
    return raw


def weight_bytes(folder: Path) -> int:
    """Bytes of the text model's weights as `load_model` loads them on this machine."""
    tensors = _text_tensors(stored_tensors(folder)).values()
    return sum(_loaded_bytes(tensor, _fast_dtype()) for tensor in tensors)


def _fast_dtype() -> mx.Dtype | None:
    """The type to load weights in that are not quantized; None for that of the checkpoint."""
    return mx.float32 if cpu.is_device() else None


def _tower_tensors(
    config: ModelConfig, every: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The stored tensors of the vision tower by name; none where the checkpoint has no tower."""
    if config.vision is None:
        return {}
    tensors = {name: tensor for name, tensor in every.items() if is_vision(name)}
    if config.vision.use_clipped_linears:
        return tensors
    # Some repositories carry bounds that nothing is clipped to.
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(CLIP_BOUNDS)}


def _text_tensors(every: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The stored tensors of the text model, by the name of the parameter they fill."""
    tensors: dict[str, StoredTensor] = {}
    for stored in every.values():
        parameter = canonical_name(stored.name)
        if parameter is None or is_vision(stored.name):
            continue
        if expert_piece(stored.name) is not None:
            raise CheckpointError(
                f"{stored.shard.name} stores its experts one by one ({stored.name}); "
                "join them with mlx-diffgemma-convert."
            )
        tensors[parameter] = stored
    return tensors


def _loaded_bytes(tensor: StoredTensor, dtype: mx.Dtype | None) -> int:
    size = _ITEM_BYTES.get(tensor.dtype, 4)
    if dtype is not None and tensor.dtype in _FLOATS:
        size = dtype.size
    for extent in tensor.shape:
        size *= extent
    return size


def _formats(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> dict[str, Format]:
    """The format of every module of which scales are stored, by its path in the checkpoint."""
    if config.quantization is None:
        return {}
    return formats_from_config(config, {name: tensor.shape for name, tensor in stored.items()})


def _quantize_modules(model: nn.Module, formats: Mapping[str, Format]) -> None:
    """Turn the modules of `model` that have a format, by their path in it, into their quantized
    form."""
    if not formats:
        return

    def parameters(path: str, module: nn.Module) -> bool | dict[str, Any]:
        fmt = formats.get(path)
        return False if fmt is None else fmt.parameters

    nn.quantize(model, class_predicate=parameters)


def _compare_shapes(
    shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor]
) -> None:
    """Raise CheckpointError, naming the first tensor of another shape."""
    for name, shape in shapes.items():
        tensor = stored.get(name)
        packed = tensor is not None and tensor.dtype not in _FLOATS
        if tensor is not None and not packed and tensor.shape != shape:
            raise _of_another_shape(tensor, shape)


def _of_another_shape(tensor: StoredTensor, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"tensor {tensor.name} in {tensor.shard.name} has shape {list(tensor.shape)}, config.json "
        f"asks for {list(shape)}; they are of different models."
    )


def _require_shapes(model: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Every parameter must be stored, in its shape and a type that it can take; nothing else may.

    Raises:
        CheckpointError: naming the first tensor that is missing, wrong or extra.
    """
    expected: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, parameter in expected.items():
        if name not in stored:
            raise CheckpointError(f"tensor {name} is missing; fetch or convert the weights again.")
        tensor = stored[name]
        if tensor.shape != parameter.shape:
            raise _of_another_shape(tensor, parameter.shape)
        packed = not mx.issubdtype(parameter.dtype, mx.floating)
        kind = "U8" if parameter.dtype == mx.uint8 else "U32"
        fits = tensor.dtype == kind if packed else tensor.dtype in _FLOATS
        if not fits:
            kind = "packed integers" if packed else "floating-point numbers"
            raise CheckpointError(
                f"tensor {tensor.name} in {tensor.shard.name} is of type {tensor.dtype}, not "
                f"{kind}; convert the weights again."
            )
    extra = next((name for name in stored if name not in expected), None)
    if extra is not None:
        tensor = stored[extra]
        raise CheckpointError(
            f"tensor {tensor.name} in {tensor.shard.name} has no place in the model that "
            "config.json describes; they are of different models."
        )


def _read(stored: Mapping[str, StoredTensor], dtype: mx.Dtype | None) -> dict[str, mx.array]:
    """The arrays, still on disk (MLX reads them when they are first used)."""
    shards: dict[Path, dict[str, mx.array]] = {}
    weights = {}
    for name, tensor in stored.items():
        if tensor.shard not in shards:
            shards[tensor.shard] = mx.load(str(tensor.shard))  # type: ignore[assignment]
        array = shards[tensor.shard][tensor.name]
        if dtype is not None and mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(dtype)
        weights[name] = array
    return weights


class _Unread:
    """Reads the weights of a model that are still on disk at the first call; calls from other
    threads wait meanwhile."""

    def __init__(self, model: DiffusionGemma) -> None:
        self._model: Any = proxy(model)
        self._lock = Lock()

    def __call__(self) -> None:
        with self._lock:
            if self._model.read_weights is not None:
                mx.eval(self._model.parameters())
                self._model.read_weights = None


def _check_finite(model: nn.Module) -> None:
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, parameter in parameters.items():
        if mx.issubdtype(parameter.dtype, mx.floating) and not mx.isfinite(parameter).all().item():
            raise CheckpointError(
                f"tensor {name} holds NaN or infinity; fetch or convert the weights again."
            )
