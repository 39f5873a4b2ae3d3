"""`mlx-diffgemma report`: checks and times of this machine, as a table to paste."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mlx_diffgemma.cli.command import Only, command
from mlx_diffgemma.cli.settings import Loading
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.reading import os_reason, shown
from mlx_diffgemma.settings import Setting

if TYPE_CHECKING:
    from mlx_diffgemma.kernels.dispatch import Launcher
    from mlx_diffgemma.survey.run import Begun, Survey
    from mlx_diffgemma.survey.subject import Opened

_OUTPUT = "Output"
_EMULATOR = "metal_emulator"  # of tests/kernels, where that is on Python's path
_TICK = 0.5  # seconds


@command(
    "mlx-diffgemma report",
    "mlx-diffgemma report --output report.md",
    "mlx-diffgemma report --model mlx-community/diffusiongemma-26B-A4B-it-4bit --part answers",
)
def report(
    *,
    model: Annotated[
        str | None,
        Setting(
            "Path or Hugging Face repository to measure, or 'demo'; the demo model and random "
            "weights if left out.",
            panel="What to measure",
        ),
    ] = None,
    loading: Annotated[Loading, Only("revision")],
    part: Annotated[
        tuple[str, ...],
        Setting(
            "Name of a part to run, such as kernels; it may be given several times, and all parts "
            "run if left out.",
            panel="What to measure",
        ),
    ] = (),
    output: Annotated[
        str | None, Setting("File for the table in place of stdout.", panel=_OUTPUT)
    ] = None,
    json: Annotated[bool, Setting("One JSON object instead of a table.", panel=_OUTPUT)] = False,
) -> None:
    """Check every Metal kernel and measure where the time goes on this Mac, and print a table to
    paste into an issue.

    Nothing is sent anywhere. The table names no user, host, folder or serial number. Without
    --model, it takes the demo model and random weights in the release's width. Ctrl-C ends it and
    prints what was found so far.
    """
    from mlx_diffgemma.survey.pieces import PARTS

    if loading.revision is not None and model is None:
        raise UsageError("--revision goes with --model: add it, or drop --revision.")
    for name in part:
        if name not in PARTS:
            raise UsageError(f"--part {shown(name)} is unknown; known are {', '.join(PARTS)}.")
    target = None if output is None else Path(output)
    if target is not None:
        _write(target, "")
    chosen = tuple(name for name in PARTS if not part or name in part)
    _say("This checks and measures:")
    for name in chosen:
        _say(f"  {name}: {PARTS[name]}")
    survey = _survey(replace(loading, model=model), chosen)
    ending: BaseException | None = None
    try:
        _say("Measuring for some seconds how long that takes.")
        _say(f"It takes about {_duration(survey.prepare())}.")
        _say("Ctrl-C ends it and prints what was found.")
        with _Progress() as progress:
            for begun in survey.run():
                progress.show(begun)
                if target is not None:  # a GPU that fails may end the process
                    _write(target, _text(survey, json))
    except KeyboardInterrupt as interrupt:
        ending = interrupt
    text = _text(survey, json)
    if target is None:
        print(text)
    else:
        _write(target, text)
    wrong = sum(row.ok is False for row in survey.rows)
    _say(f"{wrong} {'row is' if wrong == 1 else 'rows are'} wrong." if wrong else "Nothing failed.")
    _say("Paste it into an issue with the form 'Report of a machine'.")
    if ending is not None:
        raise ending


def _survey(loading: Loading, parts: tuple[str, ...]) -> Survey:
    from mlx_diffgemma import cpu
    from mlx_diffgemma.survey.run import Survey
    from mlx_diffgemma.survey.subject import FULL, SMALL, Subject

    launcher, kernels = _kernels()
    extent = SMALL if cpu.is_device() else FULL
    return Survey(Subject(extent, launcher, kernels, _opened(loading)), parts)


def _opened(loading: Loading) -> Opened | None:
    if loading.model is None:
        return None
    from mlx_diffgemma.cli import opening
    from mlx_diffgemma.survey.facts import name_of
    from mlx_diffgemma.survey.subject import Opened

    opened = opening.open_model(loading)
    return Opened(name_of(opened.name), opened.model, opened.tokenizer)


def _kernels() -> tuple[Launcher | None, str]:
    """What runs the source of the kernels here, and what to call it."""
    from mlx_diffgemma.kernels.dispatch import launch_on_metal, launcher_for

    if launcher_for("auto") is launch_on_metal:
        return launch_on_metal, "Metal"
    if find_spec(_EMULATOR) is not None:
        import atexit
        import shutil
        import tempfile

        folder = Path(tempfile.mkdtemp(prefix="kernels-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        emulator: Any = import_module(_EMULATOR)
        return emulator.MetalEmulator(folder), "emulated on the CPU where they are checked"
    return None, "plain-MLX twins"


def _text(survey: Survey, as_json: bool) -> str:
    return survey.as_json() if as_json else survey.as_markdown()


def _write(target: Path, text: str) -> None:
    """Replace what the file holds; an empty text only sees whether that can be done."""
    try:
        with target.open("w" if text else "a", encoding="utf-8") as file:
            file.write(f"{text}\n" if text else "")
    except (OSError, ValueError) as error:  # a null byte in the name
        reason = os_reason(error)
        raise UsageError(f"--output {shown(str(target))} cannot be written: {reason}.") from None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(1.0, seconds):.0f} s"


class _Progress(AbstractContextManager["_Progress"]):
    """Says on stderr which piece runs and how long the rest takes: on a terminal on one line that
    counts down, else on a line a piece."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._text, self._ends = "", 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._count_down, name="progress", daemon=True)

    def __enter__(self) -> _Progress:
        if self._terminal:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._terminal:
            self._thread.join()
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def show(self, begun: Begun) -> None:
        """A piece begins."""
        piece = begun.piece
        self._text = f"[{begun.number}/{begun.count}] {piece.part}: {piece.what}"
        self._ends = time.monotonic() + begun.seconds_left
        if not self._terminal:
            _say(f"{self._text}, about {_duration(begun.seconds_left)} left")

    def _count_down(self) -> None:
        while not self._over.wait(_TICK):
            left = _duration(self._ends - time.monotonic())
            line = f"{self._text}, about {left} left"[:78]
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
