"""What does it save to begin from an answer that is known, and what does it cost in exact answers?

    python scripts/bench_warm.py --count 400 --noise 0.25 --noise 0.5

Fresh puzzles are answered; then one of the givens of each is emptied, which leaves its answer as it
was, and the changed prompt is answered from noise alone and from the canvas of the first answer, of
which a share gives way to noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from mlx_diffgemma.bench.openblas import load_openblas
from mlx_diffgemma.demo import sudoku


def changed(prompt: str, rng: np.random.Generator) -> str:
    """The prompt without one of its givens."""
    first = prompt.index("\n") + 1
    given = [n for n in range(first, len(prompt)) if prompt[n].isdigit()]
    gone = int(rng.choice(given))
    return f"{prompt[:gone]}.{prompt[gone + 1 :]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=12)
    parser.add_argument("--profile", default="balanced")
    parser.add_argument("--noise", type=float, action="append", help="repeatable; from 0 to 1")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--openblas", help="path of libopenblas.so.0, on a CPU")
    args = parser.parse_args()
    if args.openblas:
        load_openblas(args.openblas)

    from mlx_diffgemma import load
    from mlx_diffgemma.diffusion.events import DenoisingStep, Finished
    from mlx_diffgemma.diffusion.generate import generate_canvases
    from mlx_diffgemma.diffusion.noise import seeded
    from mlx_diffgemma.fitting import diffusion_config
    from mlx_diffgemma.text.prompt import encode_prompt

    model, tokenizer = load(args.model)
    config = diffusion_config(model, args.profile)
    rng = np.random.default_rng(args.seed)
    puzzles = [sudoku.make_puzzle(rng) for _ in range(args.count)]
    prompts = [sudoku.prompt([puzzle]) for puzzle in puzzles]
    others = [changed(prompt, rng) for prompt in prompts]

    def answered(
        asked: Sequence[str], start: int, seed: int, known=None, noise=None
    ) -> tuple[list[str], int, list[list[int]]]:
        """Texts, passes, and the canvases that became them."""
        ids = [encode_prompt(tokenizer, prompt) for prompt in asked]
        canvases: dict[int, list[int]] = {}
        for event in generate_canvases(
            model, ids, config, seeded(seed + start), initial_canvas=known, initial_noise=noise
        ):
            if isinstance(event, DenoisingStep) and event.canvas.index == 0:
                canvases[event.row] = event.canvas.draft.tolist()
        assert isinstance(event, Finished)
        texts = [tokenizer.decode(list(tokens)) for tokens in event.tokens]
        return texts, sum(map(sum, event.steps)), [canvases[row] for row in range(len(asked))]

    ways = [None, *(args.noise or (0.1, 0.25, 0.5, 0.75))]
    right, passes = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
    for start in range(0, args.count, args.batch):
        part = slice(start, start + args.batch)
        _, _, known = answered(prompts[part], start, 0)
        for way in ways:
            begun = None if way is None else known
            texts, taken, _ = answered(others[part], start, 10_000, begun, way)
            passes[way] += taken
            right[way] += sum(t == p.solution for t, p in zip(texts, puzzles[part], strict=True))
    print("| begins with | exact | passes an answer |\n|---|---|---|")
    for way in ways:
        rate = right[way] / args.count
        error = np.sqrt(max(rate * (1 - rate), 1 / args.count) / args.count)
        name = "noise alone" if way is None else f"the known answer, {way:.0%} of it noise"
        print(f"| {name} | {rate:.3f} ± {error:.3f} | {passes[way] / args.count:.2f} |")


if __name__ == "__main__":
    main()
