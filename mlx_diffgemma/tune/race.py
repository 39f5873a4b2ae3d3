"""Successive halving: rules are dropped on few prompts, so that many are spent on few rules.

The method is that of https://arxiv.org/abs/1502.07943. Rules are ranked by the passes that an
answer takes. A rule may be chosen only where its answers hold as often as the reference's, or less
often by less than one standard error of the difference, on all prompts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from mlx_diffgemma.tune.asks import Ask, Judge
from mlx_diffgemma.tune.candidates import REFERENCE, Settings
from mlx_diffgemma.tune.ledger import Ledger, Trial

_FEWEST = 8  # prompts of the first round
_BROKEN = 2.0  # standard errors below the reference from which a rule is dropped on few prompts


class Answerer(Protocol):
    """A model that answers under settings, from a seed."""

    def __call__(self, settings: Settings, ask: Ask, seed: int) -> Trial: ...


@dataclass(frozen=True)
class Standing:
    """What is known of a rule.

    Attributes:
        name: the name of the rule.
        count: number of the prompts that it answered.
        mark: mean of the answers' marks, from 0 to 1.
        difference: `mark` less the mean mark of the reference on the same prompts.
        error: standard error of the difference.
        passes, canvases, seconds: means of what an answer takes.
    """

    name: str
    count: int
    mark: float
    difference: float
    error: float
    passes: float
    canvases: float
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether its answers are as good as the reference's, or worse by less than one standard
        error. (A single answer lost and none won makes a difference of one standard error.)"""
        return self.difference >= 0 or self.difference > -self.error * (1 - 1e-9)

    @property
    def broken(self) -> bool:
        """Whether its answers are worse than the reference's beyond doubt, few as the answers
        are."""
        return self.difference < -_BROKEN * max(self.error, 1 / self.count)


@dataclass(frozen=True)
class Progress:
    """A rule has answered some more prompts.

    Attributes:
        name: the name of the rule.
        done: answers that all rules gave so far in this run.
        left: the most answers that may still have to be given.
        seconds_left: seconds that these answers are likely to take.
    """

    name: str
    done: int
    left: int
    seconds_left: float


@dataclass(frozen=True)
class Outcome:
    """The result of a race.

    Attributes:
        chosen: the name of the rule to use: the cheapest that holds, or the reference.
        standings: what is known of each rule, the chosen one first, then those that hold, the
            cheapest first.
    """

    chosen: str
    standings: tuple[Standing, ...]

    def of(self, name: str) -> Standing:
        """The standing of the rule of a name."""
        return next(each for each in self.standings if each.name == name)


class Race:
    """Compares candidates, the reference among them, on prompts.

    Args:
        candidates: settings by name; one of them is `REFERENCE`.
        asks: the prompts.
        judge: how answers are marked.
        answer: the model.
        ledger: what has been answered already; new answers are added to it.
    """

    def __init__(
        self,
        candidates: Mapping[str, Settings],
        asks: Sequence[Ask],
        judge: Judge,
        answer: Answerer,
        ledger: Ledger,
    ) -> None:
        assert REFERENCE in candidates
        self.candidates, self.asks, self.judge = candidates, asks, judge
        self._answer, self._ledger = answer, ledger
        self._done, self._spent, self._given = 0, 0.0, 0
        self._marks: dict[tuple[str, int], float] = {}

    def run(self) -> Iterator[Progress | Outcome]:
        """Yields after each rule's share of a round, and the outcome in the end. It may be left at
        any moment: the ledger has what was yielded."""
        alive = [name for name in self.candidates if name != REFERENCE]
        sizes = rounds(len(self.asks))
        for number, size in enumerate(sizes):
            new = size - (sizes[number - 1] if number else 0)
            later = self._later(len(alive), sizes[number:])
            for place, name in enumerate((REFERENCE, *alive)):
                yield self._measure(name, size, new * (len(alive) - place) + later)
            sound = [name for name in alive if not self.standing(name, size).broken]
            sound.sort(key=lambda name: self.standing(name, size).passes)
            alive = sound if size == len(self.asks) else sound[: -(-len(sound) // 2)]
        yield from self._choose()

    def _later(self, alive: int, sizes: Sequence[int]) -> int:
        """The most answers that the rounds behind the first of `sizes` may take, where that round
        begins with `alive` rules."""
        answers = 0
        for before, size in pairwise(sizes):
            alive = -(-alive // 2)
            answers += (size - before) * (self.judge.seeds + alive)
        return answers

    def _choose(self) -> Iterator[Progress | Outcome]:
        """Choose the cheapest rule that holds on all prompts. A rule that was dropped in favour of
        another comes back where the other does not hold in the end."""
        total, chosen = len(self.asks), REFERENCE
        cheapest = sorted(
            (self.standing(name) for name in self.candidates if name != REFERENCE),
            key=lambda standing: standing.passes,
        )
        for standing in cheapest:
            if standing.broken or standing.passes >= self.standing(REFERENCE).passes:
                continue
            if standing.count < total:
                yield self._measure(standing.name, total, 0)
            after = self.standing(standing.name)
            if after.holds and after.passes < self.standing(REFERENCE).passes:
                chosen = standing.name
                break
        standings = [self.standing(name) for name in self.candidates]
        standings.sort(key=lambda each: (each.name != chosen, not each.holds, each.passes))
        yield Outcome(chosen, tuple(standings))

    def standing(self, name: str, size: int | None = None) -> Standing:
        """What is known of a rule by its first `size` answers, or by all."""
        seed = 0 if name == REFERENCE else self.judge.candidate_seed
        count = len(self.asks) if size is None else size
        trials = self._ledger.known(self.candidates[name], seed, count)
        marks = np.array([self._mark(name, n, trial) for n, trial in enumerate(trials)])
        own = np.array([self._own_mark(n) for n in range(len(trials))])
        apart, n = marks - own, len(trials)
        return Standing(
            name,
            n,
            float(marks.mean()),
            float(apart.mean()),
            float(apart.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0,
            float(np.mean([trial.passes for trial in trials])),
            float(np.mean([trial.canvases for trial in trials])),
            float(np.mean([trial.seconds for trial in trials])),
        )

    def _measure(self, name: str, size: int, later: int) -> Progress:
        """Have a rule answer those of the first `size` prompts that it has not answered yet."""
        settings = self.candidates[name]
        seeds = range(self.judge.seeds) if name == REFERENCE else [self.judge.candidate_seed]
        for seed in seeds:
            known = self._ledger.known(settings, seed, size)
            started = time.perf_counter()
            trials = [self._answer(settings, ask, seed) for ask in self.asks[len(known) : size]]
            if trials:
                self._spent += time.perf_counter() - started
                self._given += len(trials)
                self._ledger.add(settings, seed, len(known), trials)
            self._done += size - len(known)
        return Progress(name, self._done, later, self._spent / max(1, self._given) * later)

    def _reference(self, number: int) -> list[str]:
        """The reference's answers to a prompt."""
        settings = self.candidates[REFERENCE]
        return [
            self._ledger.known(settings, seed, number + 1)[number].text
            for seed in range(self.judge.seeds)
        ]

    def _mark(self, name: str, number: int, trial: Trial) -> float:
        if name == REFERENCE:
            return self._own_mark(number)
        if (name, number) not in self._marks:
            reference = self._reference(number)
            self._marks[name, number] = self.judge.marks(self.asks[number], trial.text, reference)
        return self._marks[name, number]

    def _own_mark(self, number: int) -> float:
        if (REFERENCE, number) not in self._marks:
            reference = self._reference(number)
            self._marks[REFERENCE, number] = self.judge.own_marks(self.asks[number], reference)
        return self._marks[REFERENCE, number]


def rounds(prompts: int) -> list[int]:
    """How many of the prompts each round asks: about twice as many as the round before, and all of
    them in the last one."""
    sizes = [prompts]
    while sizes[0] >= 2 * _FEWEST:
        sizes.insert(0, -(-sizes[0] // 2))
    return sizes
