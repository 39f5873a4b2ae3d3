"""`mlx-diffgemma decide`: typed questions about a state, answered with probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_diffgemma.checks import overridden
from mlx_diffgemma.cli import editing, errors
from mlx_diffgemma.cli.command import Changes, Of, Only, command
from mlx_diffgemma.cli.help_page import PLAIN, PlainCommand
from mlx_diffgemma.cli.settings import Denoising, Loading, Pictures, Reaching, Showing
from mlx_diffgemma.editing.questions import DecisionSettings
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.settings import Setting

if TYPE_CHECKING:
    from mlx_diffgemma.editing.beliefs import Answer
    from mlx_diffgemma.editing.calibration import Calibration

app = typer.Typer(cls=errors.Program, invoke_without_command=True, **PLAIN)

_PANEL = "Questions"
Seed = Annotated[Denoising, Only("seed")]
Json = Annotated[Showing, Only("json")]


@dataclass(frozen=True)
class Looking:
    """How questions are answered: the settings of `DecisionSettings` that the user gave.

    Raises:
        UsageError: a value is out of range.
    """

    changes: Annotated[Changes, Of(DecisionSettings, shows_defaults=True)] = field(
        default_factory=Changes
    )

    def __post_init__(self) -> None:
        self.settings()

    def settings(self) -> DecisionSettings:
        """The settings with those given put over the defaults."""
        return overridden(DecisionSettings(), self.changes)


@app.callback()
@command(
    "mlx-diffgemma decide --state mail.txt --questions questions.json",
    """mlx-diffgemma decide --state 'Win now!' --questions '{"spam": {"type": "noul"}}'""",
    "mlx-diffgemma decide --state mail.txt --questions questions.json --draws 4 --json",
)
def decide(
    ctx: typer.Context,
    *,
    state: Annotated[
        str | None,
        Setting("Subject of the questions: a file, a text or JSON; '-' reads stdin.", panel=_PANEL),
    ] = None,
    questions: Annotated[
        str | None, Setting("Questions by name: JSON, or a file that holds it.", panel=_PANEL)
    ] = None,
    frame: Annotated[
        str | None,
        Setting(
            "Whole answer, or a file with it, with {name} in the place of each answer; the prompt "
            "is then the state alone.",
            panel=_PANEL,
        ),
    ] = None,
    looking: Looking,
    calibration: Annotated[
        str | None,
        Setting("File that `decide calibrate` saved for this model.", panel=_PANEL),
    ] = None,
    pictures: Pictures,
    prompting: editing.Prompting,
    loading: Loading,
    reaching: Reaching,
    denoising: Seed,
    showing: Json,
) -> None:
    """Answer typed questions about a state with probabilities, all by one forward pass.

    Types are noul (whether a statement holds), choice (criteria: names and descriptions or null)
    and score (criteria: a list of levels, lowest first). `decide calibrate` fits the probabilities
    to answers that are known.
    """
    if ctx.invoked_subcommand is not None:
        return
    from mlx_diffgemma.cli import remote
    from mlx_diffgemma.cli.remote_answers import answers_of
    from mlx_diffgemma.editing.questions import read_questions

    asked = _questions(questions)
    images = pictures.read(state or "", raw=prompting.raw)
    about = "" if state is None and images else _state(state)
    read, whole = read_questions(asked), _text(frame)
    only_here = {"--calibration": calibration is not None, "--image": bool(images)}
    server = remote.find(reaching, loading, only_here)
    if server is not None:
        told = server.decide(
            asked, about, whole, prompting, denoising.seed, asdict(looking.settings())
        )
        if showing.json:
            editing.write_json(**told)
            return
        answers = answers_of(told, read)
        _print_answers(answers, looking.settings().draws > 1)
        editing.note_effort(told["passes"], told["seed"])
        return
    from mlx_diffgemma.cli import opening, output
    from mlx_diffgemma.editing import decide as room
    from mlx_diffgemma.editing.calibration import Calibration

    opened = opening.open_model(loading)
    fitted = None if calibration is None else Calibration.load(calibration, opened.model)
    how = looking.settings()
    found = room.decide(
        opened.model,
        opened.tokenizer,
        about,
        {question.name: question for question in read},
        frame=whole,
        calibration=fitted,
        seed=denoising.seed,
        system_prompt=prompting.system_prompt,
        raw=prompting.raw,
        images=images,
        image_tokens=pictures.image_tokens,
        **asdict(how),
    )
    given = asdict(how)
    other = [] if fitted is None else [n for n in given if fitted.settings.get(n) != given[n]]
    if other:
        output.note(f"the calibration was made with another setting of {', '.join(other)}.")
    if showing.json:
        editing.write_json(
            model=opened.name,
            answers={name: answer.as_json() for name, answer in found.answers.items()},
            usage={"input_tokens": found.prompt_tokens, "output_tokens": len(found.answers)},
            canvases=found.canvases,
            passes=found.passes,
            seed=found.seed,
        )
        return
    _print_answers(found.answers, how.draws > 1)
    editing.note_effort(found.passes, found.seed)


@app.command(cls=PlainCommand)
@command(
    "mlx-diffgemma decide calibrate --data labelled.jsonl --save calibration.json",
    "mlx-diffgemma decide calibrate --data labelled.jsonl --save calibration.json --draws 4",
    "mlx-diffgemma decide calibrate --data labelled.jsonl --save c.json --plot reliability.svg",
)
def calibrate(
    *,
    data: Annotated[
        str,
        Setting("JSON lines, each with a state, questions and the right answers by name."),
    ],
    save: Annotated[str, Setting("File to write the calibration to.")],
    plot: Annotated[
        str | None,
        Setting(
            "SVG file for how often answers are right over how probable they are; beside the "
            "calibration if left out."
        ),
    ] = None,
    looking: Looking,
    prompting: editing.Prompting,
    loading: Loading,
    denoising: Seed,
    showing: Json,
) -> None:
    """Fit a temperature, and biases where data allow, so that probabilities can be believed.

    A line is {"state": ..., "questions": {...}, "answers": {"spam": true, "tone": "calm"}}; the
    answer to a score is the number of its level, from 0. All figures are of answers held out.
    """
    from mlx_diffgemma.chart import reliability_chart
    from mlx_diffgemma.cli import opening, output
    from mlx_diffgemma.editing import decide as room
    from mlx_diffgemma.editing import files
    from mlx_diffgemma.editing.questions import parse_json

    beside = Path(save).with_suffix(".svg") if plot is None else Path(plot)
    lines = files.read_text(data).splitlines()
    examples = [
        parse_json(line, f"{data}, line {number},")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    opened = opening.open_model(loading)
    found = room.calibrate(
        opened.model,
        opened.tokenizer,
        examples,
        seed=denoising.seed or 0,
        system_prompt=prompting.system_prompt,
        raw=prompting.raw,
        **asdict(looking.settings()),
    )
    found.save(save)
    curves = {
        f"{kind}, {when}": marks.bins
        for kind, fit in found.fits.items()
        for when, marks in (("before", fit.before), ("after", fit.after))
    }
    try:
        reliability_chart(curves).write(beside)
    except OSError as error:
        raise files.FileError(
            f"{beside} cannot be written: {error.strerror}; name another with --plot."
        ) from None
    if showing.json:
        editing.write_json(types={kind: asdict(fit) for kind, fit in found.fits.items()}, save=save)
        return
    _print_fits(found)
    output.note(f"calibration in {save}, reliability in {beside}")


def _print_answers(answers: Mapping[str, Answer], spread: bool) -> None:
    from mlx_diffgemma.cli.display import printable

    for name, answer in answers.items():
        expected = f", expected level {answer.score:.2f}" if answer.question.kind == "score" else ""
        print(f"{printable(name)} (confidence {answer.confidence:.3f}{expected})")
        rows = list(zip(answer.question.options, answer.probabilities, answer.spread, strict=True))
        width = max(len(option) for option, _, _ in rows)
        for option, probability, deviation in sorted(rows, key=lambda row: -row[1]):
            shown = f" ± {deviation:.3f}" if spread else ""
            print(f"  {printable(option):{width}}  {probability:.3f}{shown}", flush=True)


def _print_fits(found: Calibration) -> None:
    print("type    answers  accuracy       log loss          Brier    calib. error  temperature")
    for kind, fit in found.fits.items():
        pairs = [
            f"{getattr(fit.before, name):6.3f} → {getattr(fit.after, name):.3f}"
            for name in ("accuracy", "log_loss", "brier", "error")
        ]
        biases = f", {len(fit.bias)} biases" if fit.bias else ""
        print(f"{kind:7} {fit.before.count:7}  {'  '.join(pairs)}  {fit.temperature:.3f}{biases}")


def _text(given: str | None) -> str | None:
    """The text of the file that `given` names, of stdin for "-", or `given` itself."""
    from mlx_diffgemma.editing import files

    if given is None:
        return None
    if given == "-":
        return editing.read_input(None, None, "state")
    try:
        is_file = "\n" not in given and Path(given).is_file()
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        is_file = False
    return files.read_text(given) if is_file else given


def _state(given: str | None) -> object:
    from mlx_diffgemma.editing.questions import NotJsonError, parse_json

    text = _text(given)
    if text is None:
        raise UsageError("no state: give a file, text or JSON with --state; - reads stdin.")
    if text.lstrip()[:1] in ("{", "["):
        try:
            return parse_json(text, "the state")
        except NotJsonError:  # a text that begins like JSON
            return text
    return text


def _questions(given: str | None) -> object:
    from mlx_diffgemma.editing.questions import parse_json

    text = _text(given)
    if text is None:
        raise UsageError("no question: give a file of JSON, or JSON, with --questions.")
    if text.lstrip()[:1] not in ("{", "["):
        raise UsageError(f"--questions {text[:60]!r} is neither a file nor JSON; check the path.")
    return parse_json(text, "--questions")
