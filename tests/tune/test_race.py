"""Successive halving on models whose answers are known: the best rule is found, a rule that breaks
answers is never chosen, and a killed run loses no more than one rule's share of a round."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.tune.asks import Ask, Judge
from mlx_diffgemma.tune.candidates import REFERENCE
from mlx_diffgemma.tune.ledger import Ledger, Trial, fingerprint
from mlx_diffgemma.tune.race import Outcome, Race, rounds

ASKS = [Ask(f"question {n}", f"answer {n}") for n in range(64)]


def named(**rules: int) -> dict[str, dict[str, object]]:
    """Candidates that can be told apart, by the passes that each takes."""
    return {name: {"max_denoising_steps": passes} for name, passes in rules.items()}


class Mock:
    """Answers with as many passes as the rule allows, and wrongly where `wrong` says so of its
    passes, the number of the prompt and the seed."""

    def __init__(self, wrong: Callable[[int, int, int], bool]) -> None:
        self.wrong, self.asked = wrong, 0

    def __call__(self, settings, ask, seed) -> Trial:
        self.asked += 1
        passes, number = int(settings["max_denoising_steps"]), int(ask.prompt.split()[1])
        text = "nonsense" if self.wrong(passes, number, seed) else ask.answer or f"as {number}"
        return Trial(text, passes, 1, passes / 100)


def outcome(candidates, wrong, *, asks=ASKS, judge=None, ledger=None) -> tuple[Outcome, int]:
    mock = Mock(wrong)
    ledger = ledger or Ledger(None, {})
    race = Race(candidates, asks, judge or Judge.of(asks, None, 3), mock, ledger)
    *_, last = race.run()
    assert isinstance(last, Outcome)
    return last, mock.asked


def test_the_cheapest_rule_that_keeps_the_answers_is_chosen_for_less_than_all_answers():
    rules = named(exact=40, a=30, b=20, c=12, d=8, e=25, f=35, g=28)
    found, asked = outcome(rules, lambda passes, number, seed: passes < 12 and number % 3 == 0)
    assert found.chosen == "c"
    assert found.standings[0].name == "c" and found.standings[0].count == len(ASKS)
    assert asked < 0.6 * len(rules) * len(ASKS)


@pytest.mark.parametrize("share", [0.06, 0.1, 0.3, 1.0])
def test_a_rule_that_breaks_answers_is_never_chosen(share):
    """However cheap it is, and wherever the answers lie that it breaks; it may even be lucky on the
    prompts of the first rounds."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        broken = set(rng.choice(64, max(4, round(share * 64)), replace=False).tolist())
        found, _ = outcome(
            named(exact=40, cheap=3, cheaper=2, sound=30),
            lambda passes, number, _, broken=broken: passes < 10 and number in broken,
        )
        assert found.chosen == "sound"


def test_the_reference_stays_where_nothing_else_keeps_the_answers_or_is_cheaper():
    found, _ = outcome(named(exact=10, less=5, more=20), lambda passes, n, _: passes < 10 and n > 9)
    assert found.chosen == REFERENCE


def test_one_answer_lost_and_none_won_is_too_many():
    found, _ = outcome(named(exact=10, less=5), lambda passes, n, _: passes < 10 and n == 40)
    assert found.chosen == REFERENCE
    found, _ = outcome(
        named(exact=10, less=5), lambda passes, n, _: n == (40 if passes < 10 else 7)
    )
    assert found.chosen == "less"


def test_wrong_answers_of_the_reference_do_not_count_against_a_rule():
    found, _ = outcome(named(exact=40, less=20), lambda passes, number, _: number % 2 == 0)
    assert found.chosen == "less"
    assert found.of("less").mark == found.of(REFERENCE).mark == 0.5


def test_agreement_is_judged_beside_that_of_the_reference_with_itself():
    """A model that answers a third of the prompts otherwise from another seed agrees with itself in
    part only; a rule is not asked for more, and one that answers otherwise always is dropped."""
    asks = [Ask(f"question {n}") for n in range(64)]
    judge = Judge.of(asks, None, 3)
    assert (judge.name, judge.candidate_seed) == ("agreement", 3)

    def wanders(passes: int, number: int, seed: int) -> bool:
        if passes == 2:
            return True
        return number % 3 == 0 and np.random.default_rng([number, seed]).random() < 0.5

    rules = named(exact=40, sound=20, broken=2)
    found, _ = outcome(rules, wanders, asks=asks, judge=judge)
    assert found.chosen == "sound"
    assert found.of(REFERENCE).mark < 0.95


def test_rounds_double_until_all_prompts_are_asked():
    assert rounds(64) == [8, 16, 32, 64]
    assert rounds(100) == [13, 25, 50, 100]
    assert rounds(5) == [5]


def test_what_was_answered_is_not_asked_again(tmp_path):
    rules, path = named(exact=40, a=20, b=10), tmp_path / "answers.jsonl"
    of = {"model": "m", "asks": fingerprint(ASKS, "template")}
    first, asked = outcome(rules, lambda *_: False, ledger=Ledger(path, of))
    again, none = outcome(rules, lambda *_: False, ledger=Ledger(path, of))
    assert asked > 0 and none == 0
    assert again == first
    with pytest.raises(UsageError, match="another model"):
        Ledger(path, {**of, "model": "other"})
    with pytest.raises(UsageError, match="another chat template"):
        Ledger(path, {**of, "asks": fingerprint(ASKS, "another")})
    path.write_bytes(path.read_bytes().replace(b"trials", b"trails"))
    with pytest.raises(UsageError, match="damaged"):
        Ledger(path, of)


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from test_race import ASKS, Mock, named
from mlx_diffgemma.tune.asks import Judge
from mlx_diffgemma.tune.ledger import Ledger
from mlx_diffgemma.tune.race import Race
class Slow(Mock):
    def __call__(self, *given):
        time.sleep(0.002)
        return super().__call__(*given)
rules = named(exact=40, a=20, b=10, c=30)
answers = Slow(lambda *_: False)
list(Race(rules, ASKS, Judge.of(ASKS, None, 3), answers, Ledger({path!r}, {{}})).run())
"""


def test_a_kill_loses_no_more_than_one_rules_share_of_a_round(tmp_path):
    path = tmp_path / "answers.jsonl"
    source = CHILD.format(tests=str(Path(__file__).parent), path=path).replace(
        repr(path), f"__import__('pathlib').Path({str(path)!r})"
    )
    child = subprocess.Popen([sys.executable, "-c", source])
    while not path.exists() or path.read_bytes().count(b"\n") < 6:  # in the midst of round two
        assert child.poll() is None, "the run was to be killed in its midst"
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"settings": "torn')  # as a kill in the midst of writing leaves it
    rules = named(exact=40, a=20, b=10, c=30)
    found, asked = outcome(rules, lambda *_: False, ledger=Ledger(path, {}))
    unbroken, needed = outcome(rules, lambda *_: False)
    kept = sum(line.count(b'"text"') for line in whole.splitlines())
    assert kept >= 5 * 8 and asked == needed - kept
    assert found == unbroken and found.chosen == "b"
