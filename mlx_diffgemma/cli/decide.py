"""`mlx-diffgemma decide`: typed questions about a state, answered as probabilities in one look."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_diffgemma.cli import editing, errors, options
from mlx_diffgemma.errors import UsageError

if TYPE_CHECKING:
    from mlx_diffgemma.editing.calibration import Calibration
    from mlx_diffgemma.editing.decide import Decisions

app = typer.Typer(invoke_without_command=True, pretty_exceptions_enable=False)

_PANEL = "Questions"
Draws = Annotated[
    int,
    typer.Option(
        "--draws", help="Number of canvases of noise to average over.", rich_help_panel=_PANEL
    ),
]
Steps = Annotated[
    int,
    typer.Option(
        "--steps",
        help="Number of passes, over which the answers settle together.",
        rich_help_panel=_PANEL,
    ),
]
Separate = Annotated[
    bool,
    typer.Option(
        "--separate",
        help="A canvas for each question, so that no answer sees another's place.",
        rich_help_panel=_PANEL,
    ),
]
Rotate = Annotated[
    bool,
    typer.Option(
        "--rotate",
        help="Average over all cyclic shifts of the order of the options.",
        rich_help_panel=_PANEL,
    ),
]
Frame = Annotated[
    str | None,
    typer.Option(
        "--frame",
        help="The whole answer, or a file with it, with {name} in the place of each answer; the "
        "prompt is then the state alone.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]


@app.callback()
def decide(
    ctx: typer.Context,
    state: Annotated[
        str | None,
        typer.Option(
            "--state",
            help="What the questions are about: a file, or text or JSON; - reads stdin.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(
            "--questions",
            help="The questions by name: a file of JSON, or JSON.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    frame: Frame = None,
    draws: Draws = 1,
    steps: Steps = 1,
    separate: Separate = False,
    rotate: Rotate = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            help="File that `decide calibrate` saved for this model.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    system_prompt: options.SystemPrompt = None,
    chat_template: options.ChatTemplate = None,
    raw: options.Raw = False,
    model: options.Model = None,
    revision: options.Revision = None,
    adapter_path: options.AdapterPath = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = None,
    canvas_length: options.CanvasLength = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Answer typed questions about a state with probabilities, all in one look.

    Example: mlx-diffgemma decide --state mail.txt --questions '{"spam": {"type": "noul",
    "instructions": "The message is spam."}}'

    Types are noul (whether a statement holds), choice (criteria: names and descriptions or null)
    and score (criteria: a list of levels, lowest first). `decide calibrate` fits the probabilities
    to answers that are known.
    """
    if ctx.invoked_subcommand is not None:
        return

    def body() -> None:
        request = editing.request(
            model=model,
            revision=revision,
            adapter_path=adapter_path,
            trust_remote_code=trust_remote_code,
            chat_template=chat_template,
            system_prompt=system_prompt,
            raw=raw,
            seed=seed,
            canvas_length=canvas_length,
            watch=False,
            as_json=json,
        )
        how = {"draws": draws, "steps": steps, "separate": separate, "rotate": rotate}
        _decide(request, _state(state), _questions(questions), _text(frame), calibration, how)

    errors.run(body, debug=errors.debugging(ctx))


@app.command()
def calibrate(
    ctx: typer.Context,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="JSON lines, each with a state, questions and the right answers by name.",
        ),
    ],
    save: Annotated[str, typer.Option("--save", help="File to write the calibration to.")],
    plot: Annotated[
        str | None,
        typer.Option(
            "--plot",
            help="SVG file for how often answers are right over how probable they are; by default "
            "beside the calibration.",
            show_default=False,
        ),
    ] = None,
    draws: Draws = 1,
    steps: Steps = 1,
    separate: Separate = False,
    rotate: Rotate = False,
    system_prompt: options.SystemPrompt = None,
    chat_template: options.ChatTemplate = None,
    raw: options.Raw = False,
    model: options.Model = None,
    revision: options.Revision = None,
    adapter_path: options.AdapterPath = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = None,
    canvas_length: options.CanvasLength = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Fit a temperature, and biases where data allow, so that probabilities can be believed.

    Example: mlx-diffgemma decide calibrate --data labelled.jsonl --save calibration.json

    A line is {"state": ..., "questions": {...}, "answers": {"spam": true, "tone": "calm"}}; the
    answer to a score is the number of its level, from 0. All figures are of answers held out.
    """

    def body() -> None:
        request = editing.request(
            model=model,
            revision=revision,
            adapter_path=adapter_path,
            trust_remote_code=trust_remote_code,
            chat_template=chat_template,
            system_prompt=system_prompt,
            raw=raw,
            seed=0 if seed is None else seed,
            canvas_length=canvas_length,
            watch=False,
            as_json=json,
        )
        how = {"draws": draws, "steps": steps, "separate": separate, "rotate": rotate}
        beside = Path(save).with_suffix(".svg") if plot is None else Path(plot)
        _calibrate(request, data, save, beside, how)

    errors.run(body, debug=errors.debugging(ctx))


def _decide(
    request: editing.Request,
    state: Any,
    questions: Any,
    frame: str | None,
    calibration: str | None,
    how: dict[str, Any],
) -> None:
    from mlx_diffgemma.cli import output, session
    from mlx_diffgemma.editing.calibration import Calibration
    from mlx_diffgemma.editing.decide import decide
    from mlx_diffgemma.editing.questions import read_questions

    read = read_questions(questions)
    opened = session.open_model(request.model, **request.loading)
    fitted = None if calibration is None else Calibration.load(calibration, opened.model)
    settings = _settings(request) | how
    found = decide(
        opened.model,
        opened.tokenizer,
        state,
        {question.name: question for question in read},
        frame=frame,
        calibration=fitted,
        **settings,
    )
    other = [] if fitted is None else [n for n in how if fitted.settings.get(n) != settings[n]]
    if other:
        output.note(f"the calibration was made with another setting of {', '.join(other)}.")
    if request.json:
        editing.write_json(
            model=opened.name,
            answers={name: answer.as_json() for name, answer in found.answers.items()},
            usage={"input_tokens": found.prompt_tokens, "output_tokens": len(found.answers)},
            canvases=found.canvases,
            passes=found.passes,
            seed=found.seed,
        )
        return
    _print_answers(found, how["draws"] > 1)
    editing.note_effort(found.passes, found.seed)


def _print_answers(found: Decisions, spread: bool) -> None:
    from mlx_diffgemma.cli.display import printable

    for name, answer in found.answers.items():
        expected = f", expected level {answer.score:.2f}" if answer.question.kind == "score" else ""
        print(f"{printable(name)} (confidence {answer.confidence:.3f}{expected})")
        rows = list(zip(answer.question.options, answer.probabilities, answer.spread, strict=True))
        width = max(len(option) for option, _, _ in rows)
        for option, probability, deviation in sorted(rows, key=lambda row: -row[1]):
            shown = f" ± {deviation:.3f}" if spread else ""
            print(f"  {printable(option):{width}}  {probability:.3f}{shown}", flush=True)


def _calibrate(
    request: editing.Request, data: str, save: str, plot: Path, how: dict[str, Any]
) -> None:
    from mlx_diffgemma.chart import reliability_chart
    from mlx_diffgemma.cli import output, session
    from mlx_diffgemma.editing import files
    from mlx_diffgemma.editing.decide import calibrate
    from mlx_diffgemma.editing.questions import parse_json

    lines = files.read_text(data).splitlines()
    examples = [
        parse_json(line, f"{data}, line {number},")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    opened = session.open_model(request.model, **request.loading)
    settings = _settings(request) | how
    found = calibrate(opened.model, opened.tokenizer, examples, **settings)
    found.save(save)
    curves = {
        f"{kind}, {when}": marks.bins
        for kind, fit in found.fits.items()
        for when, marks in (("before", fit.before), ("after", fit.after))
    }
    try:
        reliability_chart(curves).write(plot)
    except OSError as error:
        raise files.FileError(f"{plot} cannot be written: {error.strerror}.") from None
    if request.json:
        editing.write_json(types={kind: asdict(fit) for kind, fit in found.fits.items()}, save=save)
        return
    _print_fits(found)
    output.note(f"calibration in {save}, reliability in {plot}")


def _print_fits(found: Calibration) -> None:
    print("type    answers  accuracy       log loss          Brier    calib. error  temperature")
    for kind, fit in found.fits.items():
        pairs = [
            f"{getattr(fit.before, name):6.3f} → {getattr(fit.after, name):.3f}"
            for name in ("accuracy", "log_loss", "brier", "error")
        ]
        biases = f", {len(fit.bias)} biases" if fit.bias else ""
        print(f"{kind:7} {fit.before.count:7}  {'  '.join(pairs)}  {fit.temperature:.3f}{biases}")


def _settings(request: editing.Request) -> dict[str, Any]:
    """Keyword arguments of `decide`: those that were given."""
    return {name: value for name, value in request.settings.items() if value is not None}


def _text(given: str | None) -> str | None:
    """What a file of that name holds, or the text itself."""
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


def _state(given: str | None) -> Any:
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


def _questions(given: str | None) -> Any:
    from mlx_diffgemma.editing.questions import parse_json

    text = _text(given)
    if text is None:
        raise UsageError("no question: give a file of JSON, or JSON, with --questions.")
    if text.lstrip()[:1] not in ("{", "["):
        raise UsageError(f"--questions {text[:60]!r} is neither a file nor JSON.")
    return parse_json(text, "--questions")
