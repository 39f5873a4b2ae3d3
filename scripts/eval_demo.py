"""How often does a model answer the demo's sudoku tasks exactly, and in how many steps?

    python scripts/eval_demo.py                                   # the shipped model
    python scripts/eval_demo.py --model OUT_8BIT --count 400
    python scripts/eval_demo.py --reference ../shared/demo-hf     # also transformers, same inputs

Puzzles are fresh: made from `--seed`, the same for every model. The reference runs in float32 and
needs `pip install torch transformers`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mlx_diffgemma.demo import sudoku

Answers = list[tuple[str, list[int]]]  # an answer and the denoising steps of its canvases


def tasks(count: int, seed: int) -> dict[str, list[list[sudoku.Puzzle]]]:
    """`count` inputs with one puzzle and `count` with two."""
    rng = np.random.default_rng(seed)
    return {
        name: [[sudoku.make_puzzle(rng) for _ in range(size)] for _ in range(count)]
        for name, size in (("one", 1), ("two", 2))
    }


def run_ours(model_path: str, steps: int | None, batch: int) -> Callable[[Sequence[str]], Answers]:
    from mlx_diffgemma import load
    from mlx_diffgemma.diffusion.denoise import generate_canvases
    from mlx_diffgemma.diffusion.noise import SeededNoise
    from mlx_diffgemma.generation import diffusion_config
    from mlx_diffgemma.text.prompt import encode_prompt

    model, tokenizer = load(model_path)
    config = diffusion_config(model, max_denoising_steps=steps)

    def answer(prompts: Sequence[str]) -> Answers:
        answers: Answers = []
        for start in range(0, len(prompts), batch):
            ids = [encode_prompt(tokenizer, text) for text in prompts[start : start + batch]]
            *_, finished = generate_canvases(model, ids, config, SeededNoise(start))
            answers += [
                (tokenizer.decode(tokens), list(steps))
                for tokens, steps in zip(finished.tokens, finished.steps, strict=True)
            ]
        return answers

    return answer


def run_reference(path: Path, steps: int | None) -> Callable[[Sequence[str]], Answers]:
    import torch
    from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

    model = DiffusionGemmaForBlockDiffusion.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    canvas = model.config.canvas_length
    options = {} if steps is None else {"max_denoising_steps": steps}
    counts: list[int] = []
    forward = model.model.decoder.forward

    def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
        counts.append(kwargs["past_key_values"].get_seq_length())
        return forward(*args, **kwargs)

    model.model.decoder.forward = counted

    def answer(prompts: Sequence[str]) -> Answers:
        answers: Answers = []
        for number, text in enumerate(prompts):
            torch.manual_seed(number)
            counts.clear()
            messages = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, return_tensors="pt"
            )
            out = model.generate(ids, **options).sequences[0, ids.shape[1] :]
            per_canvas = [counts.count(length) for length in sorted(set(counts))]
            assert len(per_canvas) == len(out) // canvas
            answers.append((tokenizer.decode(out, skip_special_tokens=True), per_canvas))
        return answers

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="a model to run (repeatable)")
    parser.add_argument("--reference", type=Path, help="also run transformers on this folder")
    parser.add_argument("--count", type=int, default=200, help="inputs a task")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--steps", type=int, action="append", help="cap on steps (repeatable)")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once (ours only)")
    args = parser.parse_args()

    inputs = tasks(args.count, args.seed)
    print(f"{args.count} inputs a task, seed {args.seed}\n")
    print("| model | step cap | task | exact | steps a canvas | tokens a forward | seconds |")
    print("|---|---|---|---|---|---|---|")
    for steps in args.steps or [None]:
        runs = [(name, run_ours(name, steps, args.batch)) for name in args.model or ["demo"]]
        if args.reference:
            runs.append(("transformers", run_reference(args.reference, steps)))
        for name, run in runs:
            for task, puzzles in inputs.items():
                start = time.perf_counter()
                answers = run([sudoku.prompt(puzzle) for puzzle in puzzles])
                seconds = time.perf_counter() - start
                exact = sum(
                    text == sudoku.answer(puzzle)
                    for (text, _), puzzle in zip(answers, puzzles, strict=True)
                )
                passes = sum(sum(steps) for _, steps in answers)
                canvases = sum(len(steps) for _, steps in answers)
                tokens = sum(len(text) for text, _ in answers)
                print(
                    f"| {name} | {steps or 'default'} | {task} | {exact / len(answers):.3f} "
                    f"| {passes / canvases:.2f} | {tokens / passes:.1f} | {seconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
