"""`mlx-diffgemma fuse`: adapters into the weights, as a checkpoint of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from mlx_diffgemma.cli.command import Only, command
from mlx_diffgemma.cli.settings import Loading
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.settings import Setting

if TYPE_CHECKING:
    import mlx.core as mx

_FILE_BYTES = 1 << 30  # of fused weights that wait in memory
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@command(
    "mlx-diffgemma fuse --model demo --adapter-path adapters",
    "mlx-diffgemma fuse --adapter-path adapters --save-path my-model",
    "mlx-diffgemma fuse --adapter-path adapters --dequantize --dtype bfloat16",
)
def fuse(
    *,
    model: Annotated[
        str | None,
        Setting("Base model: folder or repository; that of the training if left out."),
    ] = None,
    loading: Annotated[Loading, Only("revision")],
    adapter_path: Annotated[Path, Setting("Folder that training wrote.")] = Path("adapters"),
    save_path: Annotated[Path, Setting("Folder to make; it must not exist yet.")] = Path(
        "fused_model"
    ),
    dequantize: Annotated[bool, Setting("Plain weights in the layout of transformers.")] = False,
    dtype: Annotated[str | None, Setting(f"Type of plain weights: {', '.join(_DTYPES)}.")] = None,
    upload_repo: Annotated[
        str | None, Setting("Hugging Face repository to upload the result to.")
    ] = None,
) -> None:
    """Write base and adapters as one checkpoint.

    A quantized base keeps its formats: what the adapters added is rounded to them. With
    --dequantize, or a base that is not quantized, the result also loads in transformers.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype} is unknown; known are {', '.join(_DTYPES)}.")
    target = save_path.expanduser()
    if target.exists():
        raise UsageError(f"{target} exists already; remove it or choose another --save-path.")
    if upload_repo is not None:
        from mlx_diffgemma_convert.hub import prepare_upload

        prepare_upload(upload_repo)
    _fuse(model, loading.revision, adapter_path.expanduser(), target, dequantize, dtype)
    if upload_repo is not None:
        from mlx_diffgemma_convert.converting import run_upload

        run_upload(target, upload_repo, dry_run=False, as_json=False)


def _fuse(
    model: str | None,
    revision: str | None,
    adapters: Path,
    target: Path,
    dequantize: bool,
    dtype: str | None,
) -> None:
    from mlx_diffgemma.checkpoint.adapters import (
        fingerprint,
        load_adapters,
        read_adapter_config,
    )
    from mlx_diffgemma.checkpoint.loading import load_model
    from mlx_diffgemma.checkpoint.locate import locate

    base = model or read_adapter_config(adapters).get("model")
    if not base:
        raise UsageError(f"{adapters} does not say of which model it is; name it with --model.")
    folder = locate(base, revision)
    mark = fingerprint(load_model(folder, lazy=True)[0], release=True)
    loaded, _ = load_model(folder, lazy=True)
    load_adapters(loaded, adapters, base=mark)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as room:
        files = _write_fused(loaded, folder, adapters, Path(room), dequantize, dtype)
        del loaded
        _convert(folder, files, f"{base} with {adapters.name}", target, dequantize, dtype)


def _write_fused(
    model: Any, base: Path, adapters: Path, room: Path, dequantize: bool, dtype: str | None
) -> list[Path]:
    """Write the weights that change into a few files in `room`, layer by layer, so that a large
    model is never in memory as a whole. Returns the files."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_diffgemma.checkpoint.adapters import WEIGHTS, adapted_modules
    from mlx_diffgemma.train.fuse import fused_arrays

    types = _stored_types(base)
    floats = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}

    def type_of(name: str) -> mx.Dtype:
        """The type that was asked for, else that of a stored tensor; bf16 where that is no
        float."""
        return floats[_DTYPES[dtype]] if dtype else floats.get(types[name], mx.bfloat16)

    files: list[Path] = []
    waiting: dict[str, mx.array] = {}

    def flush(least: int) -> None:
        if waiting and sum(array.nbytes for array in waiting.values()) >= least:
            files.append(room / f"fused-{len(files)}.safetensors")
            mx.save_safetensors(str(files[-1]), waiting)
            waiting.clear()

    layers = adapted_modules(model)
    for path, module in layers.items():
        values = "scales" if hasattr(module.linear, "bits") else "weight"
        arrays = fused_arrays(module, dequantize=dequantize, dtype=type_of(f"{path}.{values}"))
        mx.eval(arrays)
        for name in module.linear.parameters():
            module.linear[name] = mx.zeros(())  # or the whole base would stay in memory
        waiting |= {f"{path}.{name}": array for name, array in arrays.items()}
        flush(_FILE_BYTES)
    if not layers:  # full fine-tuning has changed the weights themselves
        parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        trained: Any = mx.load(str(adapters / WEIGHTS))
        waiting |= {name: parameters[name].astype(type_of(name)) for name in trained}
    flush(0)
    return files


def _stored_types(base: Path) -> dict[str, str]:
    """The type of every stored tensor, by its MLX name."""
    from mlx_diffgemma.checkpoint.names import canonical_name
    from mlx_diffgemma.checkpoint.shards import stored_tensors

    named = ((canonical_name(t.name), t.dtype) for t in stored_tensors(base).values())
    return {name: dtype for name, dtype in named if name is not None}


def _convert(
    folder: Path, files: list[Path], name: str, target: Path, dequantize: bool, dtype: str | None
) -> None:
    """Have the converter write, verify and publish the result."""
    from mlx_diffgemma.checkpoint.quantization import Recipe
    from mlx_diffgemma_convert.converting import progress_bar
    from mlx_diffgemma_convert.job import convert
    from mlx_diffgemma_convert.journal import Journal
    from mlx_diffgemma_convert.plan import make_plan
    from mlx_diffgemma_convert.plan_table import size_text
    from mlx_diffgemma_convert.source import OverlaidSource

    source = OverlaidSource(folder, files, name)
    quantized = bool(source.config.get("quantization")) and not dequantize
    plan = make_plan(
        source,
        Recipe("fused", ()),
        dtype={"BF16": "bf16", "F16": "fp16", "F32": "fp32"}[_DTYPES[dtype]] if dtype else None,
        dequantize=dequantize,
        keep_formats=quantized,
        hugging_face=not quantized,
    )
    with Journal(target) as journal:
        try:
            with progress_bar(plan, not sys.stderr.isatty()) as progress:
                convert(plan, journal, restart=True, progress=progress)
        except BaseException:  # the fused weights go as well, so there is nothing to go on from
            journal.discard()
            raise
    print(f"{target}: {size_text(plan.stored_bytes())}, verified.", file=sys.stderr)
