"""What keeps a model from an empty answer, and what does that cost in exact ones?

    python scripts/bench_empty.py --seeds 8 --count 16      # every rival, on the demo model
    python scripts/bench_empty.py --only "as the model has it" --only "eos masked at 0"

Terse prompts are those that the demo model was never taught; its tasks are fresh, made from
`--seed`, and the same for every rival. A rival answers every prompt with every seed, with the same
noise as the others. "gained" and "lost" are answers that are right with it and not without it, and
the other way round; "changed" are all that differ in any token.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from exercises import exam
from exercises.tasks import TASKS
from mlx_diffgemma import load
from mlx_diffgemma.diffusion.canvas import Canvas, Passed
from mlx_diffgemma.diffusion.constraints import FREE, Layout, token_mask
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.events import Finished
from mlx_diffgemma.diffusion.generate import generate_canvases, next_length
from mlx_diffgemma.diffusion.noise import seeded
from mlx_diffgemma.diffusion.predict import Predictor
from mlx_diffgemma.diffusion.profiles import DEFAULT as DEFAULT_PROFILE
from mlx_diffgemma.fitting import diffusion_config
from mlx_diffgemma.model.cache import Prefix
from mlx_diffgemma.text.prompt import encode_prompt
from mlx_diffgemma.text.tokenizer import hf_tokenizer

TERSE = ("hi", "?", "yes", "no", "ok", "hello", "why", "42", "tell me a joke", "capital of france")


class SoftOfTheModel(Predictor):
    """The next step is conditioned on what the model predicts without the mask."""

    def __call__(self, canvases: Sequence[Canvas], prefixes: Sequence[Prefix]) -> list[Passed]:
        bound = super().__call__(canvases, prefixes)
        free = super().__call__([replace(each, layout=None) for each in canvases], prefixes)
        return [
            replace(
                ours,
                prediction=replace(
                    ours.prediction, soft_embeddings=theirs.prediction.soft_embeddings
                ),
            )
            for ours, theirs in zip(bound, free, strict=True)
        ]


@dataclass(frozen=True)
class Rival:
    """Attributes:
    masked: which tokens the first canvas may not begin with: none, those that end an answer, the
        padding too, or all special tokens.
    places: at how many positions.
    predictor: what computes a pass.
    tries: how often an empty answer is rolled again, each time with another seed.
    shipped: whether the library's own setting does it, which has no effect under a constraint.
    """

    masked: str = ""
    places: int = 1
    predictor: type[Predictor] = Predictor
    tries: int = 1
    shipped: bool = False


RIVALS = {
    "as the model has it": Rival(),
    "as shipped": Rival(shipped=True),
    "rolled again, up to 8 tries": Rival(tries=8),
    "eos masked at 0": Rival("eos"),
    "eos masked at 0, not in self-conditioning": Rival("eos", predictor=SoftOfTheModel),
    "eos and pad masked at 0": Rival("pad"),
    "eos and pad masked at 0, not in self-conditioning": Rival("pad", predictor=SoftOfTheModel),
    "every special token masked at 0": Rival("special"),
    "every special token masked at 0 to 3": Rival("special", places=4),
}


@dataclass
class Result:
    """Attributes:
    answers: the tokens of each.
    texts: what they say.
    passes: forward passes of each, those of tries that were empty among them.
    """

    answers: list[tuple[int, ...]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)


class Bench:
    """A model that answers prompts as a rival would have it."""

    def __init__(self, name: str, profile: str) -> None:
        self.model, self.tokenizer = load(name)
        self.config = diffusion_config(self.model, profile, forbid_empty=True)

    def layout(self, rival: Rival) -> Layout | None:
        if not rival.masked:
            return None
        vocab, config = self.model.config.text.vocab_size, self.config
        tokens = set(config.eos_token_ids)
        if rival.masked != "eos":
            tokens.add(config.pad_token_id)
        if rival.masked == "special":
            tokens.update(hf_tokenizer(self.tokenizer).all_special_ids)
        length = next_length(self.model, config, config.max_tokens)
        mask = token_mask(set(range(vocab)) - tokens, vocab)
        return Layout((FREE,) * length, dict.fromkeys(range(rival.places), mask))

    def run(self, rival: Rival, prompts: Sequence[str], seed: int) -> Result:
        """Each prompt answered once."""
        layout = self.layout(rival)
        result = Result([()] * len(prompts), [""] * len(prompts), [0] * len(prompts))
        left = list(range(len(prompts)))
        for number in range(rival.tries):
            *_, finished = generate_canvases(
                self.model,
                [encode_prompt(self.tokenizer, prompts[place]) for place in left],
                self.config,
                # A row keeps its noise whoever else is rolled again.
                lambda row, left=left, number=number: seeded(seed + 1000 * number)(left[row]),
                denoiser=Denoiser(self.model, rival.predictor(self.model)),
                constrain=None
                if rival.shipped
                else (lambda row, index: layout if not index else None),
            )
            assert isinstance(finished, Finished)
            for row, place in enumerate(left):
                result.answers[place] = finished.tokens[row]
                result.texts[place] = self.tokenizer.decode(
                    list(finished.tokens[row]), skip_special_tokens=True
                )
                result.passes[place] += sum(finished.steps[row])
            left = [place for place in left if not result.texts[place].strip()]
            if not left:
                break
        return result


def measure(bench: Bench, rival: Rival, prompts: Sequence[str], seeds: int, batch: int) -> Result:
    """Every prompt answered with every seed, `batch` at a time."""
    total = Result()
    for seed in range(seeds):
        for start in range(0, len(prompts), batch):
            part = bench.run(rival, prompts[start : start + batch], 100 * seed + start)
            total.answers += part.answers
            total.texts += part.texts
            total.passes += part.passes
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--profile", default=DEFAULT_PROFILE)
    parser.add_argument("--seeds", type=int, default=8, help="seeds a prompt")
    parser.add_argument("--count", type=int, default=16, help="inputs a task")
    parser.add_argument("--seed", type=int, default=14, help="of the inputs")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only", action="append", choices=list(RIVALS))
    parser.add_argument("--task", action="append", choices=list(TASKS), help="all if left out")
    parser.add_argument("--show", action="store_true", help="print an answer to each terse prompt")
    args = parser.parse_args()

    bench = Bench(args.model, args.profile)
    tasks = exam.make_tasks(args.count, args.seed, args.task or tuple(TASKS))
    print("| rival | prompts | answers | empty | exact | gained | lost | changed | passes | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    names = list(RIVALS)
    first: dict[str, Result] = {}
    for name in [names[0], *(each for each in args.only or names[1:] if each != names[0])]:
        for task, exercises in [("terse", []), *tasks.items()]:
            prompts = [each.prompt for each in exercises] or list(TERSE)
            start = time.perf_counter()
            found = measure(bench, RIVALS[name], prompts, args.seeds, args.batch)
            seconds = time.perf_counter() - start
            before = first.setdefault(task, found)
            empty = sum(not text.strip() for text in found.texts)
            marks = ["", "", ""]
            if exercises:
                every = list(exercises) * args.seeds
                right = [e.is_right(t) for e, t in zip(every, found.texts, strict=True)]
                was = [e.is_right(t) for e, t in zip(every, before.texts, strict=True)]
                gained = sum(a and not b for a, b in zip(right, was, strict=True))
                lost = sum(b and not a for a, b in zip(right, was, strict=True))
                marks = [f"{sum(right) / len(right):.3f}", str(gained), str(lost)]
            changed = sum(a != b for a, b in zip(found.answers, before.answers, strict=True))
            passes = sum(found.passes) / len(found.passes)
            print(
                f"| {name} | {task} | {len(found.texts)} | {empty} | {' | '.join(marks)} | "
                f"{changed} | {passes:.2f} | {seconds:.0f} |",
                flush=True,
            )
            if args.show and not exercises:
                for prompt, text in zip(prompts, found.texts, strict=False):
                    print(f"    {prompt!r}: {text!r}")


if __name__ == "__main__":
    main()
