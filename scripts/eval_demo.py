"""How often does a model answer the demo's tasks exactly, and in how many steps?

    python scripts/eval_demo.py                                   # the shipped model
    python scripts/eval_demo.py --model OUT_8BIT --count 400
    python scripts/eval_demo.py --reference ../shared/demo-hf     # transformers, the same inputs
    python scripts/eval_demo.py --model RUN/model --task one --task bare --task record

Inputs are fresh: made from `--seed`, the same for every model. The reference runs in float32 and
needs `pip install torch transformers`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from exercises import exam
from exercises.tasks import TASKS

Answers = list[exam.Answer]


def run_ours(model_path: str, steps: int | None, batch: int) -> Callable[[Sequence[str]], Answers]:
    from mlx_diffgemma import load
    from mlx_diffgemma.fitting import diffusion_config

    model, tokenizer = load(model_path)
    config = diffusion_config(model, max_denoising_steps=steps)

    def answer(prompts: Sequence[str]) -> Answers:
        answers: Answers = []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            answers += exam.answer(model, tokenizer, config, part, seed=start)
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

    def counted(*args, **kwargs):
        cache = kwargs["cache" if "cache" in kwargs else "past_key_values"]  # new, old transformers
        counts.append(cache.get_seq_length())
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
            text = tokenizer.decode(out, skip_special_tokens=True)
            answers.append(exam.Answer(text, tuple(per_canvas), len(text)))  # a token a character
        return answers

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="a model to run (repeatable)")
    parser.add_argument("--reference", type=Path, help="run transformers on this folder")
    parser.add_argument(
        "--task", action="append", choices=list(TASKS), help="repeatable; one and two if left out"
    )
    parser.add_argument("--count", type=int, default=200, help="inputs a task")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--steps", type=int, action="append", help="cap on steps (repeatable)")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once (ours only)")
    args = parser.parse_args()

    inputs = exam.make_tasks(args.count, args.seed, args.task or tuple(exam.SUDOKUS))
    print(f"{args.count} inputs a task, seed {args.seed}\n")
    print("| model | step cap | task | exact | steps a canvas | tokens a forward | seconds |")
    print("|---|---|---|---|---|---|---|")
    for steps in args.steps or [None]:
        models = args.model or ([] if args.reference else ["demo"])
        runs = [(name, run_ours(name, steps, args.batch)) for name in models]
        if args.reference:
            runs.append(("transformers", run_reference(args.reference, steps)))
        for name, run in runs:
            for task, exercises in inputs.items():
                start = time.perf_counter()
                answers = run([exercise.prompt for exercise in exercises])
                seconds = time.perf_counter() - start
                marks = exam.mark(answers, exercises)
                print(
                    f"| {name} | {steps or 'default'} | {task} | {marks.rate:.3f} "
                    f"| {marks.steps_per_canvas:.2f} | {marks.tokens_per_forward:.1f} "
                    f"| {seconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
