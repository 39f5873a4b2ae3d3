"""Does a hole of unknown length get its length and its content back?

    python scripts/bench_infill.py --count 200

A span of a demo grid is cut out, across line ends too; lengths from 1 to 14 are candidates. Every
way to judge them sees the same forward passes; the last row is `infill` itself, which goes on
to fill the hole. With `--puzzle` the prompt holds the puzzle, else the bare word.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from mlx_diffgemma import infill, load
from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.editing.gaps import Evidence, look_at_lengths
from mlx_diffgemma.editing.infill import HOLE
from mlx_diffgemma.editing.session import Session
from mlx_diffgemma.editing.window import Gap

LENGTHS = range(1, 15)

JUDGES: dict[str, Callable[[Evidence], float]] = {
    "confidence inside": lambda e: e.inside,
    "confidence inside less the bias (published)": lambda e: e.inside - (e.alone or 0.0),
    "surroundings": lambda e: e.around,
    "surroundings and inside (shipped)": lambda e: e.score,
    "surroundings and inside less the bias": lambda e: e.score - (e.alone or 0.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--puzzle", action="store_true")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    rng = np.random.default_rng(arguments.seed)
    found = dict.fromkeys(JUDGES, 0)
    lengths = exact = passes = 0
    for index in range(arguments.count):
        puzzle = sudoku.make_puzzle(rng)
        length = int(rng.integers(2, 13))
        start = int(rng.integers(0, len(puzzle.solution) + 1 - length))
        around = [puzzle.solution[:start], puzzle.solution[start + length :]]
        prompt = sudoku.prompt([puzzle] if arguments.puzzle else [])

        session = Session(model, tokenizer, prompt, seed=index)
        seen = look_at_lengths(session, around, [Gap(tuple(LENGTHS))], alone=True)
        for name, judge in JUDGES.items():
            best = max(seen, key=lambda lengths, judge=judge: judge(seen[lengths]))
            found[name] += best == (length,)

        text = HOLE.join(around)
        done = infill(model, tokenizer, text, lengths=LENGTHS, prompt=prompt, seed=index)
        lengths += len(done.holes[0].text) == length
        exact += done.text == puzzle.solution
        passes += done.passes
    count = arguments.count
    for name, hits in found.items():
        print(f"{name:50} length found {hits / count:.3f}")
    print(
        f"{'infill':50} length found {lengths / count:.3f}, text exact {exact / count:.3f}, "
        f"{passes / count:.1f} forward passes"
    )


if __name__ == "__main__":
    main()
