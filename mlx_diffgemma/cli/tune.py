"""`mlx-diffgemma tune`: finds the rule with the fewest passes that keeps the answers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mlx_diffgemma.cli.command import Only, command
from mlx_diffgemma.cli.settings import Loading
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.reading import shown
from mlx_diffgemma.settings import Setting

if TYPE_CHECKING:
    from mlx_diffgemma.tune.race import Outcome, Progress

_WHAT, _OUTPUT = "What to measure", "Output"


@dataclass(frozen=True)
class Tuning:
    """The options that say what is asked, and how answers are judged.

    Raises:
        UsageError: a number is out of range.
    """

    data: Annotated[
        str | None,
        Setting(
            "JSON lines with a prompt or messages each, and an answer where it is known; 64 "
            "prompts of many kinds if left out.",
            panel=_WHAT,
        ),
    ] = None
    test: Annotated[
        str | None,
        Setting(
            "Test that a good answer passes: regex:PATTERN for the whole of it, json-schema:FILE, "
            "or command:LINE, a shell command that reads it from stdin and exits with 0.",
            ("--check",),
            panel=_WHAT,
        ),
    ] = None
    seeds: Annotated[
        int,
        Setting(
            "Answers of the reference to each prompt where agreement with them is all that can be "
            "judged.",
            panel=_WHAT,
        ),
    ] = 3
    count: Annotated[int | None, Setting("Most prompts to ask; all if left out.", panel=_WHAT)] = (
        None
    )
    max_tokens: Annotated[
        int,
        Setting("Most tokens to generate for one answer.", ("--max-tokens", "-m"), panel=_WHAT),
    ] = 256

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("seeds", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} must be at least {least}, not {value}.")


@command(
    "mlx-diffgemma tune --profile mine.json",
    "mlx-diffgemma tune --data prompts.jsonl --check json-schema:order.json --profile orders.json",
    "mlx-diffgemma tune --data labels.jsonl --check 'regex:[A-Z]+' --count 32 --json",
)
def tune(
    *,
    tuning: Tuning,
    loading: Annotated[
        Loading, Only("model", "revision", "adapter_path", "chat_template", "trust_remote_code")
    ],
    profile: Annotated[
        str,
        Setting("File to write the profile to; its name ends with .json.", panel=_OUTPUT),
    ] = "profile.json",
    plot: Annotated[
        str | None,
        Setting("SVG file for marks over passes; beside the profile if left out.", panel=_OUTPUT),
    ] = None,
    json: Annotated[bool, Setting("One JSON object instead of a table.", panel=_OUTPUT)] = False,
) -> None:
    """Find the rule that takes the fewest passes and keeps the answers, and write it as a profile.

    Answers are judged by --check, else by the answers in the data, else by their agreement with
    those of the profile 'exact', beside the agreement of these among themselves. What was answered
    is kept in a file beside the profile: the same command goes on where it was stopped.
    """
    from mlx_diffgemma.tune.asks import Ask, Judge, check_of, read_asks
    from mlx_diffgemma.tune.prompts import PROMPTS

    target = Path(profile)
    if target.suffix != ".json":
        raise UsageError(f"--profile {shown(profile)} must end with .json, as a profile's file.")
    if not target.parent.is_dir():
        raise UsageError(f"--profile {shown(profile)} is in no folder that exists; make it.")
    check = None if tuning.test is None else check_of(tuning.test)
    asks = [Ask(text) for text in PROMPTS] if tuning.data is None else read_asks(Path(tuning.data))
    asks = asks[: tuning.count]
    judge = Judge.of(asks, check, tuning.seeds)

    from mlx_diffgemma.cli import editing, opening, output
    from mlx_diffgemma.diffusion.profiles import save_profile
    from mlx_diffgemma.tune.candidates import CANDIDATES
    from mlx_diffgemma.tune.ledger import Ledger, fingerprint
    from mlx_diffgemma.tune.race import Outcome, Race

    opened = opening.open_model(loading)
    from mlx_diffgemma.tune import run as room

    identity = opened.model.identity()
    kept = target.with_suffix(".answers.jsonl")
    asked = fingerprint(asks, opened.tokenizer.chat_template)
    ledger = Ledger(kept, {"model": identity, "asks": asked, "max_tokens": str(tuning.max_tokens)})
    answers = room.ModelAnswers(opened.model, opened.tokenizer, tuning.max_tokens)
    outcome: Outcome | None = None
    for event in Race(CANDIDATES, asks, judge, answers, ledger).run():
        if isinstance(event, Outcome):
            outcome = event
        else:
            _tell(event)
    assert outcome is not None
    save_profile(target, CANDIDATES[outcome.chosen], identity, room.measured(outcome))
    picture = target.with_suffix(".svg") if plot is None else Path(plot)
    try:
        room.chart(outcome, judge.name).write(picture)
    except OSError as error:
        raise UsageError(f"--plot {picture} cannot be written: {error.strerror}.") from None
    if json:
        editing.write_json(profile=profile, judged_by=judge.name, **room.measured(outcome))
        return
    floor = room.floor_seconds(opened.model)
    _print_table(room.rows(outcome, asks), judge.name)
    output.note(f"a pass takes {1e3 * floor:.0f} ms at least on this machine, by its peaks")
    output.note(f"rule '{outcome.chosen}' in {profile}, chart in {picture}, answers in {kept}")


def _tell(progress: Progress) -> None:
    left = progress.seconds_left
    about = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
    line = (
        f"{progress.name}: {progress.done} answers so far, {progress.left} more at most, "
        f"about {about} left"
    )
    print(line, file=sys.stderr, flush=True)


def _print_table(rows: list[tuple[str, ...]], way: str) -> None:
    from rich.table import Table

    from mlx_diffgemma.cli.output import print_table

    table = Table(title=f"Rules, judged by {way}; ± is one standard error")
    for column in (
        "rule", "prompts", "mark", "difference", "passes", "a canvas", "seconds", "ms a pass",
        "verdict",
    ):  # fmt: skip
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    print_table(table)
