"""Does a hole of unknown length get its length and its content back?

    python scripts/bench_infill.py --count 200

A span of a demo grid is cut out, across line ends too; lengths from 1 to 14 are candidates. With
`--puzzle` the prompt holds the puzzle, else the bare word.
"""

from __future__ import annotations

import argparse

import numpy as np

from mlx_diffgemma import infill, load
from mlx_diffgemma.demo import sudoku


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--puzzle", action="store_true")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    rng = np.random.default_rng(arguments.seed)
    lengths = exact = passes = 0
    for index in range(arguments.count):
        puzzle = sudoku.make_puzzle(rng)
        length = int(rng.integers(2, 13))
        start = int(rng.integers(0, len(puzzle.solution) + 1 - length))
        text = puzzle.solution[:start] + "[[?]]" + puzzle.solution[start + length :]
        prompt = sudoku.prompt([puzzle] if arguments.puzzle else [])
        done = infill(model, tokenizer, text, lengths=range(1, 15), prompt=prompt, seed=index)
        lengths += len(done.holes[0].text) == length
        exact += done.text == puzzle.solution
        passes += done.passes
    count = arguments.count
    print(f"length found {lengths / count:.3f}, text exact {exact / count:.3f}, "
          f"{passes / count:.1f} forward passes")  # fmt: skip


if __name__ == "__main__":
    main()
