"""What does a denoising step take on a GPU, and which of its choices pay? One command, one table.

    python scripts/bench_gpu_step.py                     # the release's shapes, six layers, 4 bits
    python scripts/bench_gpu_step.py --json > step.json  # one object instead of the table
    python scripts/bench_gpu_step.py --part vocabulary --part layers
    python scripts/bench_gpu_step.py --small             # shapes for a CPU, to try the script

On a Mac, `pip install .` is all it needs. On Linux with an NVIDIA GPU, `pip install "mlx[cuda13]"`
after it brings MLX for CUDA; plain-MLX twins then take the place of the kernels for Metal. Steps of
mlx-vlm are run beside ours where it is installed, best in an environment of its own:

    python3 -m venv beside && beside/bin/pip install . "mlx-vlm==0.7.10"
    beside/bin/python scripts/bench_gpu_step.py --part mlx-vlm

The weights are random and made here, in about as much memory as they take. All variants of a part
run in turns; a time is a median, and a ratio is the time of a line over that of the line that it
names. Memory is the most that a variant held beside the weights, what it keeps between runs
included. What fails, or would not fit, is a line that says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import mlx.core as mx
from rich.console import Console

from mlx_diffgemma.bench.device import measure_device
from mlx_diffgemma.bench.presets import RELEASE, TINY, config_like
from mlx_diffgemma.bench.random_model import chosen_dtype, chosen_recipe
from mlx_diffgemma.bench.rival import KNOWN, NAME
from mlx_diffgemma.bench.variants import Line, Variant, as_table, guessed_seconds, measure
from mlx_diffgemma.bench.workbench import SMALL_SIZES, Sizes, Workbench
from mlx_diffgemma.checkpoint.memory import size_text, wired
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.diffusion.profiles import PROFILES
from mlx_diffgemma.errors import CheckpointError, DiffGemmaError, UsageError
from mlx_diffgemma.kernels.dispatch import launcher_for

_PARTS = ("step", "vocabulary", "layers", "prefill", "experts", NAME)
_WIDTH = 110  # columns of the table, whatever a pipe pretends to have
_MISSING = (
    "not installed; in an environment of its own: python3 -m venv beside && "
    f'beside/bin/pip install . "{NAME}=={KNOWN}" && '
    f"beside/bin/python scripts/bench_gpu_step.py --part {NAME}"
)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--like", default=RELEASE, help="a preset, or a folder with a config.json")
    parser.add_argument("--layers", type=int, default=6, help="how many of its layers")
    parser.add_argument("--recipe", default="4bit", help="how the weights are quantized, or none")
    parser.add_argument("--dtype", help="type of the activations; the device's own if left out")
    parser.add_argument("--canvas", type=int, help="tokens drafted at a time; 256 if left out")
    parser.add_argument("--prefix", type=int, help="tokens before a canvas; 512 if left out")
    parser.add_argument("--batch", type=int, action="append", help="canvases in a step; repeatable")
    parser.add_argument("--profile", choices=list(PROFILES), action="append", help="repeatable")
    parser.add_argument("--part", choices=_PARTS, action="append", help="what to measure; all else")
    parser.add_argument("--repeats", type=int, default=5, help="turns of which the median is taken")
    parser.add_argument("--burst", type=int, default=3, help="steps that are timed together")
    parser.add_argument("--small", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args(argv)


def _workbench(args: argparse.Namespace) -> Workbench:
    """What the arguments ask for.

    Raises:
        UsageError: one of them is out of range, or the shapes are too large for a CPU.
    """
    for name in ("repeats", "burst", "canvas", "prefix", "batch"):
        given = getattr(args, name)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number < 1:
                raise UsageError(f"--{name} must be at least 1, not {number}.")
    if args.small:
        raw = config_like(TINY)
    else:
        if mx.default_device().type == mx.DeviceType.cpu:
            raise UsageError("these shapes take a CPU hours; run this on a GPU, or add --small.")
        raw = config_like(args.like, args.layers)
    sizes = SMALL_SIZES if args.small else Sizes()
    given = {
        "canvas": args.canvas,
        "prefix": args.prefix,
        "batches": args.batch and tuple(dict.fromkeys(args.batch)),
        "positions": args.canvas and tuple(dict.fromkeys((args.canvas, *sizes.positions[1:]))),
    }
    return Workbench(
        ModelConfig.from_dict(raw),
        chosen_recipe(None, None if args.recipe == "none" else args.recipe),
        chosen_dtype(args.dtype),
        replace(sizes, **{name: value for name, value in given.items() if value is not None}),
        args.burst,
        tuple(dict.fromkeys(args.profile or PROFILES)),
    )


def _planned(
    bench: Workbench, asked: Sequence[str] | None
) -> Iterator[tuple[str, list[Variant], str]]:
    """Each part that was asked for, its variants, and why it has none."""
    for part, variants in bench.parts().items():
        if asked and part not in asked:
            continue
        try:
            yield part, variants(), ""
        except CheckpointError:
            yield part, [], _MISSING


@wired()
def run(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure what the arguments ask for.

    Raises:
        UsageError: an argument is out of range.
    """
    bench = _workbench(args)
    text, sizes = bench.config.text, bench.sizes
    plan = list(_planned(bench, args.part))
    device = measure_device(bench.dtype)
    everything = [variant for _, variants, _ in plan for variant in variants]
    low, high = guessed_seconds(everything, device, args.repeats)
    name = "small shapes" if args.small else args.like
    say(
        f"Random weights in the shapes of {name}: {text.num_hidden_layers} layers of width "
        f"{text.hidden_size}, {text.vocab_size:,} words, {bench.recipe.name}, "
        f"{size_text(bench.weight_bytes)}. Canvas {sizes.canvas}, prefix {sizes.prefix}; medians "
        f"of {args.repeats} turns."
    )
    for part, variants, missing in plan:
        say(f"  {part}: {missing or f'{len(variants)} variants'}")
    say(
        f"{device.name} needs {_duration(low)} for the products alone; all of it may take up to "
        f"about {_duration(high)}."
    )
    lines: list[Line] = []
    say("making the weights")
    bench.make()
    for part, variants, missing in plan:
        if missing:
            lines.append(Line(part, NAME, None, None, None, None, missing))
            continue
        say(f"measuring: {part}")
        lines += measure(part, variants, args.repeats)
    return {
        "device": device.name,
        "mlx": device.mlx,
        "operations_per_second": device.operations,
        "bytes_per_second": device.bandwidth,
        "kernels": "twins" if launcher_for("auto") is None else "metal",
        "shapes": {
            "like": name, "layers": text.num_hidden_layers, "recipe": bench.recipe.name,
            "dtype": device.dtype, "weights": bench.weight_bytes, **asdict(sizes),
        },
        "repeats": args.repeats,
        "burst": args.burst,
        "guessed_seconds": [low, high],
        "lines": [asdict(line) for line in lines],
    }  # fmt: skip


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or the JSON object; returns the exit code."""
    args = _arguments(argv)
    aside = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        report = run(args, lambda text: aside.print(text, markup=False))
    except DiffGemmaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        out = Console(highlight=False)
        Console(highlight=False, width=max(out.width, _WIDTH)).print(as_table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
