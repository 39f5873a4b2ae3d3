"""The pieces of a survey: each checks or measures one thing and gives rows of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby

import mlx.core as mx

from mlx_diffgemma import cpu
from mlx_diffgemma.bench.run import PROMPT
from mlx_diffgemma.bench.speed import measure_profiles
from mlx_diffgemma.bench.steps import measure_step, using_pass
from mlx_diffgemma.bench.timing import milliseconds, peak_bytes, seconds
from mlx_diffgemma.bench.variants import Line, guessed_seconds, measure
from mlx_diffgemma.checkpoint.memory import estimate, size_text
from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.diffusion.profiles import DEFAULT, profile_settings
from mlx_diffgemma.fitting import diffusion_config
from mlx_diffgemma.kernels.vocabulary import vocabulary_pass
from mlx_diffgemma.survey.comparing import Case, DifferenceError
from mlx_diffgemma.survey.facts import machine_facts, without_names
from mlx_diffgemma.survey.kernel_cases import kernel_cases
from mlx_diffgemma.survey.pass_cases import pass_cases, whole_cases
from mlx_diffgemma.survey.subject import Subject
from mlx_diffgemma.survey.table import Row, error_text

PARTS = {
    "machine": "what it is and what it can do at best",
    "kernels": "every Metal kernel beside its twin in plain MLX",
    "chunks": "the pass over the vocabulary in chunks beside the whole one",
    "demo": "sudokus that the small model which ships with the program must solve",
    "answers": "an answer under each profile: its speed and its steps",
    "step": "a denoising step, taken apart",
    "profiles": "time of a step under each profile, of one canvas and of several",
    "vocabulary": "time of the pass over the vocabulary: tiles, chunks, one product",
    "layers": "time of all layers, compiled and not",
    "prefill": "time of a prompt, in chunks of several sizes",
    "experts": "time of the experts on a whole canvas and on parts of it",
    "memory": "what a step holds, beside what is counted for it",
}
"""What each part of a survey is about, in the order in which they run."""

_MOST_SHOWN = 10  # cases that fail, each a row
_REQUIRED = 0.875  # of the sudokus; rounding to 16 bits may spoil one of eight


@dataclass(frozen=True)
class Piece:
    """A piece of a survey.

    Attributes:
        part: name of the part that it belongs to.
        what: what it is about.
        run: does it, and gives rows.
        seconds: guesses how long it takes; it may raise what `run` raises.
    """

    part: str
    what: str
    run: Callable[[], Iterable[Row]]
    seconds: Callable[[], float]


class Pieces:
    """The pieces of a survey of one subject."""

    def __init__(self, subject: Subject) -> None:
        self._of, self._extent = subject, subject.extent

    def __iter__(self) -> Iterator[Piece]:
        """All pieces, in the order of `PARTS`."""
        yield Piece("machine", "facts", self._machine, lambda: 0.0)
        groups = [*kernel_cases(), *pass_cases()]
        for group, cases in groupby(groups, key=lambda case: case.group):
            yield self._compared("kernels", group, tuple(cases))
        for group, cases in groupby(whole_cases(self._extent.checked), key=lambda case: case.group):
            yield self._compared("chunks", group, tuple(cases))
        for profile in self._extent.profiles:
            for form in ("as loaded", "in chunks"):
                yield Piece(
                    "demo",
                    f"{profile}, {form}",
                    partial(self._sudokus, profile, form),
                    lambda: self._extent.puzzles * self._of.demo_seconds,
                )
        yield Piece("answers", "each profile", self._answers, self._answer_seconds)
        yield Piece("step", "whole and in parts", self._step, self._step_seconds)
        for part, name in (
            ("profiles", "step"),
            ("vocabulary", "vocabulary"),
            ("layers", "layers"),
            ("prefill", "prefill"),
            ("experts", "experts"),
        ):
            if part == "layers" and self._of.opened is not None and cpu.is_device():
                continue  # a model that is loaded for a CPU is not compiled
            yield Piece(
                part,
                "all forms",
                partial(self._variants, part, name),
                partial(self._variant_seconds, name),
            )
        yield Piece("memory", "of a step", self._memory, self._step_seconds)

    def _machine(self) -> Iterator[Row]:
        for name, said in machine_facts().items():
            yield Row("machine", name, said)
        yield Row("machine", "kernels", self._of.kernels)
        bench, device = self._of.bench, self._of.device
        layers = bench.config.text.num_hidden_layers
        name = "random weights" if self._of.opened is None else self._of.opened.name
        yield Row(
            "machine", "measured on", name,
            f"{layers} layers of width {bench.config.text.hidden_size}, "
            f"{bench.config.text.vocab_size:,} words, {bench.recipe.name}, "
            f"{size_text(bench.weight_bytes)}, {device.dtype}",
            values={"layers": layers, "weights": bench.weight_bytes},
        )  # fmt: skip
        yield Row(
            "machine", "large product", f"{device.operations / 1e12:.3g} TFLOP/s",
            values={"operations_per_second": device.operations},
        )  # fmt: skip
        yield Row(
            "machine", "large copy", f"{device.bandwidth / 1e9:.3g} GB/s",
            values={"bytes_per_second": device.bandwidth},
        )  # fmt: skip

    def _compared(self, part: str, group: str, cases: tuple[Case, ...]) -> Piece:
        return Piece(
            part,
            f"{group}, {len(cases)} cases",
            partial(self._compare, part, group, cases),
            lambda: len(cases) * self._of.case_seconds,
        )

    def _compare(self, part: str, group: str, cases: tuple[Case, ...]) -> Iterator[Row]:
        what = f"{group}, {len(cases)} cases"
        if self._of.launcher is None and part == "kernels":
            yield Row(part, what, "not run", "there is no Metal GPU, so the twins run everywhere")
            return
        worst, where, wrong = 0.0, "", {}
        for case in cases:
            try:
                found = case.run(self._of.launcher)
            except DifferenceError as difference:
                wrong[case.name] = str(difference)
            except Exception as error:  # a kernel that does not compile, memory that is short
                wrong[case.name] = error_text(error)
            else:
                if found > worst:
                    worst, where = found, case.name
        beside = f"at most {worst:.2g} of what may differ: {where}" if where else "exactly"
        yield Row(
            part, what, f"{len(cases) - len(wrong)} of {len(cases)} agree", beside, not wrong,
            {"worst": worst, "where": where, "wrong": wrong},
        )  # fmt: skip
        for name, message in list(wrong.items())[:_MOST_SHOWN]:
            yield Row(part, f"{group}, {name}", "differs", message, ok=False)

    def _sudokus(self, profile: str, form: str) -> list[Row]:
        model, count = self._of.demo.model, self._extent.puzzles
        # In chunks, as with a vocabulary of the release's size.
        with using_pass(model, vocabulary_pass if form == "in chunks" else None):
            right = sum(self._of.solves(number, profile) for number in range(count))
        enough = max(1, int(_REQUIRED * count))
        what, said = f"{profile}, vocabulary {form}", f"{right} of {count} solved"
        values = {"solved": right, "count": count}
        return [Row("demo", what, said, ok=right >= enough, values=values)]

    def _answers(self) -> Iterator[Row]:
        opened = self._of.opened or self._of.demo
        prompt = PROMPT
        if self._of.opened is None:
            prompt = sudoku.prompt([self._of.puzzle(0)])
        for each in measure_profiles(
            opened.model, opened.tokenizer, prompt, self._extent.profiles,
            max_tokens=self._extent.max_tokens, repeats=self._extent.repeats,
        ):  # fmt: skip
            yield Row(
                "answers", f"{opened.name}, {each.profile}",
                f"{each.tokens_per_second:.1f} tokens/s",
                f"{each.tokens} tokens in {each.steps} steps on {_count(each.canvases, 'canvas')}, "
                f"{each.tokens_per_forward:.1f} tokens/forward",
                values=asdict(each),
            )  # fmt: skip

    def _answer_seconds(self) -> float:
        runs = len(self._extent.profiles) * (self._extent.repeats + 1)
        if self._of.opened is None:
            return runs * self._of.demo_seconds
        bench = self._of.bench
        canvases = max(1, self._extent.max_tokens // bench.sizes.canvas)
        most = diffusion_config(self._of.opened.model).max_denoising_steps
        return runs * canvases * most * self._of.least(bench.step_cost())

    def _step(self) -> Iterator[Row]:
        bench, device = self._of.bench, self._of.device
        config = diffusion_config(bench.model, canvas_length=bench.sizes.canvas)
        found = measure_step(
            bench.model, config.override(**profile_settings(DEFAULT)), bench.weights, device,
            prefix=bench.sizes.prefix, repeats=self._extent.repeats,
        )  # fmt: skip
        floor = sum(part.floor_seconds for part in found.parts)
        yield Row(
            "step", f"whole, {found.canvas} positions behind {found.prefix}", _ms(found.seconds),
            f"{found.seconds / floor:.1f} times the least, {found.waits:g} waits, "
            f"{size_text(found.beyond_weights)} beside the weights",
            values=asdict(found),
        )  # fmt: skip
        for part in found.parts:
            least = (
                f"{part.seconds / part.floor_seconds:.1f} times the least, "
                f"{part.operations / 1e9:.4g} GFLOP, {part.bytes / 1e9:.3g} GB"
                if part.floor_seconds
                else ""
            )
            yield Row("step", part.name, _ms(part.seconds), least, values=asdict(part))

    def _step_seconds(self) -> float:
        return 3 * (self._extent.repeats + 3) * self._of.least(self._of.bench.step_cost())

    def _variants(self, part: str, name: str) -> Iterator[Row]:
        variants = self._of.bench.parts()[name]()
        self._of.bench.make()
        lines = measure(part, variants, self._extent.repeats)
        for line in lines:
            yield _row_of(line)

    def _variant_seconds(self, name: str) -> float:
        variants = self._of.bench.parts()[name]()
        least, _ = guessed_seconds(variants, self._of.device, self._extent.repeats)
        return self._of.slowness * least

    def _memory(self) -> Iterator[Row]:
        bench = self._of.bench
        sizes = bench.sizes
        bench.make()
        before = mx.get_active_memory()
        run = bench.steps()[0].make()
        held = peak_bytes(lambda: seconds(run)) - before
        counted = estimate(
            bench.config.text, 0, canvas_length=sizes.canvas,
            sequences=[(sizes.prefix, sizes.canvas)], activation_bytes=bench.dtype.size,
        ).total  # fmt: skip
        yield Row(
            "memory", "beside the weights", size_text(held), f"counted as {size_text(counted)}",
            values={"bytes": held, "counted": counted},
        )  # fmt: skip
        cached = mx.get_cache_memory()
        yield Row("memory", "kept for arrays to come", size_text(cached), values={"bytes": cached})


def _row_of(line: Line) -> Row:
    if line.seconds is None:
        refused = line.note.startswith("failed")
        return Row(
            line.part, line.name, "failed" if refused else "left out",
            without_names(line.note.partition(": ")[2]), ok=False if refused else None,
        )  # fmt: skip
    beside = [] if line.ratio is None else [f"{line.ratio:.3f} of {line.baseline}"]
    if line.beside is not None:
        beside.append(f"{size_text(line.beside)} beside the weights")
    return Row(line.part, line.name, _ms(line.seconds), ", ".join(beside), values=asdict(line))


def _ms(taken: float) -> str:
    return f"{milliseconds(taken)} ms"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 'es'}"
