"""What a conversion costs, in time and memory, on checkpoints of the real shapes.

    python scripts/bench_convert.py WORK --layers 2 4
    python scripts/bench_convert.py WORK --layers 2 4 --mlx-vlm path/to/its/python

WORK is an empty or missing folder with 6 GB of room for each checkpoint (one is there at a time)
and 3 GB for a result. "parts alone" reads, quantizes with mlx and writes the same bytes, one
after the other in one process, and adds up the times. Every measurement is a process of its own;
memory is the largest resident set, time is that of the wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REAL_LAYERS = 30


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock and of all cores, and most bytes resident."""

    wall: float
    cpu: float
    memory: int


def run(command: list[str]) -> Cost:
    """Run a command to its end and say what it cost."""
    os.sync()
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    complaint = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{complaint.decode()[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def parts_alone(source: Path, out: Path) -> dict[str, float]:
    """Seconds to read, to quantize and to write, each by itself and in one thread."""
    import mlx.core as mx

    from mlx_diffgemma.checkpoint.quantization import RECIPES
    from mlx_diffgemma_convert.pack import blocks, to_bytes, to_mx
    from mlx_diffgemma_convert.plan import make_plan
    from mlx_diffgemma_convert.source import FolderSource, ShardReader
    from mlx_diffgemma_convert.stream import read_rows

    seconds = {"read": 0.0, "quantize": 0.0, "write": 0.0}
    mx.set_cache_limit(256 << 20)
    plan = make_plan(FolderSource(source), RECIPES["4bit"])
    with ShardReader(plan.source) as reader, out.open("wb", buffering=0) as file:
        for target in plan.targets:
            for block in blocks(target):
                start = time.monotonic()
                raw = read_rows(target.parts["weight"], block.start, block.stop, reader)
                read = time.monotonic()
                data = [raw]
                if target.format.quantized:
                    weight = to_mx(raw, target.dtype, target.columns)
                    arrays = mx.quantize(weight, **target.format.parameters)
                    mx.eval(arrays)
                    data = [to_bytes(array) for array in arrays]
                quantized = time.monotonic()
                for part in data:
                    file.write(part.data)
                seconds["read"] += read - start
                seconds["quantize"] += quantized - read
                seconds["write"] += time.monotonic() - quantized
        start = time.monotonic()
        os.fsync(file.fileno())
        seconds["write"] += time.monotonic() - start
    return seconds


def bench(work: Path, layers: int, rival: str | None) -> dict[str, Cost]:
    """Make a checkpoint, convert it in every way, remove it again."""
    scripts = Path(__file__).parent
    source, out = work / f"source-{layers}", work / "out"
    tokenizer = scripts.parent / "mlx_diffgemma" / "demo" / "checkpoint"
    make = [sys.executable, str(scripts / "make_tiny_checkpoint.py"), str(source), "--real-shapes"]
    subprocess.run([*make, "--layers", str(layers), "--tokenizer", str(tokenizer)], check=True)
    commands = {
        "mlx-diffgemma-convert": [
            sys.executable, "-m", "mlx_diffgemma_convert", "--model", str(source),
            "--mlx-path", str(out), "-q", "--quiet",
        ],
    }  # fmt: skip
    if rival:
        commands["mlx-vlm"] = [
            rival, "-m", "mlx_vlm.convert", "--hf-path", str(source), "--mlx-path", str(out), "-q",
        ]  # fmt: skip
    costs = {}
    alone = [sys.executable, __file__, "--parts", str(source), str(out)]
    seconds = json.loads(subprocess.run(alone, check=True, capture_output=True, text=True).stdout)
    total = sum(seconds.values())
    name = ", ".join(f"{part} {value:.1f} s" for part, value in seconds.items())
    costs[f"parts alone ({name})"] = Cost(total, total, 0)
    out.unlink()
    for name, command in commands.items():
        costs[name] = run(command)
        shutil.rmtree(out)
    shutil.rmtree(source)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--mlx-vlm", help="the Python of an environment with mlx-vlm")
    parser.add_argument("--parts", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.parts:
        print(json.dumps(parts_alone(*options.parts)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    print("| layers | converter | wall | cores' time | peak memory |")
    print("|---|---|---|---|---|")
    points = []
    for layers in options.layers:
        costs = bench(options.work, layers, options.mlx_vlm)
        for name, cost in costs.items():
            memory = f"{cost.memory / 1e9:.2f} GB" if cost.memory else ""
            print(f"| {layers} | {name} | {cost.wall:.1f} s | {cost.cpu:.1f} s | {memory} |")
        points.append((layers, costs["mlx-diffgemma-convert"]))
    if len(points) > 1:
        (a, first), (b, last) = points[0], points[-1]
        for what, unit in (("memory", 1e9), ("wall", 1.0)):
            slope = (getattr(last, what) - getattr(first, what)) / (b - a)
            at_30 = getattr(first, what) + slope * (REAL_LAYERS - a)
            sign = "GB" if what == "memory" else "s"
            print(f"{what} at {REAL_LAYERS} layers, extrapolated: {at_30 / unit:.2f} {sign}")


if __name__ == "__main__":
    main()
