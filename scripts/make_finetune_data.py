"""Data for `mlx-diffgemma train`: sudokus whose answers are to be written in a way that the demo
model does not know.

    python scripts/make_finetune_data.py DATA                    # rows from right to left
    python scripts/make_finetune_data.py DATA --task letters     # a to f for 1 to 6
    mlx-diffgemma train --model demo --data DATA

Writes train.jsonl, valid.jsonl and test.jsonl, from `--seed` alone; no puzzle is in two of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlx_diffgemma.demo import sudoku

TASKS: dict[str, Callable[[str], str]] = {
    "mirrored": lambda grid: "\n".join(row[::-1] for row in grid.split("\n")),
    "letters": lambda grid: grid.translate(str.maketrans("123456", "abcdef")),
}
SPLITS = {"train": 4000, "valid": 200, "test": 200}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", choices=TASKS, default="mirrored")
    parser.add_argument("--train", type=int, default=SPLITS["train"], help="examples to train on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rng, seen = np.random.default_rng(arguments.seed), set()
    for split, count in {**SPLITS, "train": arguments.train}.items():
        lines = []
        while len(lines) < count:
            puzzle = sudoku.make_puzzle(rng)
            if puzzle.givens not in seen:
                seen.add(puzzle.givens)
                answer = TASKS[arguments.task](puzzle.solution)
                lines.append(
                    json.dumps({"prompt": sudoku.prompt([puzzle]), "completion": answer}) + "\n"
                )
        (arguments.folder / f"{split}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
