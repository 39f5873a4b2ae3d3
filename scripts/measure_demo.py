"""How often what `mlx-diffgemma demo` shows is right.

    python scripts/measure_demo.py --count 100

Runs the demo's tasks with the seeds from 0 on, and counts the runs in which each is right.
"""

from __future__ import annotations

import argparse
import io
from contextlib import redirect_stdout

import numpy as np
from rich.console import Console

from mlx_diffgemma.cli.demo import perform
from mlx_diffgemma.cli.opening import open_model
from mlx_diffgemma.cli.settings import Loading


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="runs")
    count = parser.parse_args().count
    opened = open_model(Loading(model="demo"))
    console = Console(file=io.StringIO())
    right = []
    for seed in range(count):
        with redirect_stdout(io.StringIO()):
            right.append(perform(opened, console, np.random.default_rng(seed), seed, False))
    solved, mended, filled = np.sum(right, axis=0).tolist()
    print(f"of {count} runs: {solved} solved, {mended} mended, {filled} filled")
    print(f"mended and filled: {sum(run[1] and run[2] for run in right)}")
    print(f"all three: {sum(map(all, right))}")
    print(f"seeds with a mistake: {[seed for seed, run in enumerate(right) if not all(run)]}")


if __name__ == "__main__":
    main()
