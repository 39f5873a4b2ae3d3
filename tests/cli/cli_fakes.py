"""A model that says what it is told, and a terminal to look at.

Run as a program, this is `mlx-diffgemma` with that model, for tests that need a real process:
`python cli_fakes.py SCRIPT ARGUMENTS`, where SCRIPT is a JSON object of `Script`'s fields.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mlx_diffgemma.text.prompt_settings import PromptSettings

EOS = 0x10FFFF
TERM = "xterm-256color"


class FakeTokenizer:
    """Ids are code points."""

    eos_token_ids = frozenset({EOS})


class FakeModel:
    """Hands out caches that can be told apart."""

    def __init__(self) -> None:
        self.caches: list[object] = []

    def make_cache(self) -> object:
        self.caches.append(object())
        return self.caches[-1]


@dataclass
class Script:
    """What the model says, and what was asked of it.

    Attributes:
        canvases: the text that each canvas commits.
        steps: denoising steps a canvas; before the last, every other token is a wrong guess.
        delay: seconds a step takes.
        thoughts: what is thought on each canvas, before its text.
        tool_calls: fields of the `ToolCall`s that the last canvas completes.
        finish, context_full, converged: how it ended.
        echo: whether the model says what was last asked, as JSON, in place of its canvases.
        endless: whether it never gets to the end of the last canvas.
        load_error, run_error: (class in mlx_diffgemma.errors or builtins, message) to raise.
        loads, calls: what load and stream_generate were called with.
    """

    canvases: list[str] = field(default_factory=lambda: ["hello"])
    steps: int = 3
    delay: float = 0.0
    thoughts: list[str] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish: str = "stop"
    context_full: bool = False
    converged: bool = True
    echo: bool = False
    endless: bool = False
    load_error: tuple[str, str] | None = None
    run_error: tuple[str, str] | None = None
    loads: list[dict[str, Any]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    model: FakeModel = field(default_factory=FakeModel)

    def load(self, path: str, **options: Any) -> tuple[FakeModel, FakeTokenizer]:
        self.loads.append({"path": path, **options})
        if self.load_error:
            raise _error(*self.load_error)
        return self.model, FakeTokenizer()

    def diffusion_config(self, model: FakeModel, profile: str, **changes: Any) -> dict[str, Any]:
        return {"profile": profile, **changes}

    def stream_generate(
        self, model: FakeModel, tokenizer: FakeTokenizer, prompt: Any, **options: Any
    ) -> Iterator[Any]:
        settings = options.pop("prompt_settings", None) or PromptSettings()
        self.calls.append({"prompt": prompt, **options, **vars(settings)})
        if self.echo:
            self.canvases = [json.dumps(prompt[-1]["content"])]
        on_prefill = options["on_prefill"]
        on_prefill(0, 7)
        on_prefill(7, 7)
        return self._respond(options.get("seed") or 0)

    def _respond(self, seed: int) -> Iterator[Any]:
        from mlx_diffgemma.generation_response import GenerationResponse
        from mlx_diffgemma.text.tool_calls import ToolCall

        tokens: list[int] = []
        steps: list[int] = []
        shared = {"prompt_tokens": 7, "prompt_tps": 70.0, "generation_tps": 5.0, "seed": seed}
        nothing = {
            "thought": "", "tool_calls": (), "failed_calls": (), "stop_token": None,
            "stop_string": None, "parts": None, "context_full": self.context_full,
            "converged": self.converged,
        }  # fmt: skip
        for index, text in enumerate(self.canvases):
            ids = [ord(character) for character in text]
            step = 0
            while step < self.steps or (self.endless and index == len(self.canvases) - 1):
                step += 1
                time.sleep(self.delay)
                wrong = step < self.steps
                steps[index:] = [step]
                yield GenerationResponse(
                    text="", token=tokens[-1] if tokens else None, tokens=tuple(tokens),
                    generation_tokens=len(tokens), peak_memory=1.5, finish_reason=None,
                    canvas=[63 if wrong and i % 2 else id for i, id in enumerate(ids)] + [EOS],
                    entropy=[3.0 if wrong and i % 2 else 0.01 for i in range(len(ids))] + [0.0],
                    step=step, canvas_index=index, denoising_steps=tuple(steps),
                    tokens_per_forward=len(tokens) / sum(steps), **shared, **nothing,
                )  # fmt: skip
            if self.run_error:
                raise _error(*self.run_error)
            tokens += ids
            said = dict(nothing)
            if index < len(self.thoughts):
                said["thought"] = self.thoughts[index]
            if index == len(self.canvases) - 1:
                calls = [ToolCall(**call) for call in self.tool_calls]
                said["tool_calls"] = tuple(call for call in calls if call.error is None)
                said["failed_calls"] = tuple(call for call in calls if call.error is not None)
                said["stop_token"] = EOS if self.finish != "length" else None
            yield GenerationResponse(
                text=text, token=tokens[-1] if tokens else None, tokens=tuple(tokens),
                generation_tokens=len(tokens), peak_memory=1.5, canvas_index=index,
                canvas=[], entropy=[], step=0,
                finish_reason=self.finish if index == len(self.canvases) - 1 else None,
                denoising_steps=tuple(steps), tokens_per_forward=len(tokens) / sum(steps),
                **shared, **said,
            )  # fmt: skip


def characters(tokenizer: FakeTokenizer, ids: list[int], before: tuple[int, ...]) -> list[str]:
    """Stands in for token_strings."""
    return [chr(id) for id in ids]


def _error(name: str, message: str) -> BaseException:
    import builtins

    from mlx_diffgemma import errors

    return (getattr(errors, name, None) or getattr(builtins, name))(message)


def command(script: dict[str, Any], *arguments: str) -> list[str]:
    """The command line of this file as a program."""
    return [sys.executable, str(Path(__file__)), json.dumps(script), *arguments]


class Terminal:
    """A process on a pseudo terminal of 80 × 24, and what it wrote there.

    Attributes:
        written: all of it, escape sequences included.
        code: the exit status, after `finish`.
        modes_left: the modes of the terminal then.
    """

    columns, rows, patience = 80, 24, 15.0

    def __init__(self, *arguments: str, **streams: Any) -> None:
        self._ours, theirs = pty.openpty()
        _set_size(theirs, self.rows, self.columns)
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
        self.process = subprocess.Popen(
            arguments,
            **{"stdin": theirs, "stdout": theirs, "stderr": theirs, **streams},
            env=environment | {"TERM": TERM, "PYTHONUTF8": "1"},
            preexec_fn=os.setpgrp,  # a job of its own, which can be stopped
        )
        self._theirs = theirs  # to look at the modes once the process has ended
        self.written = ""
        self._seen = 0
        self._bytes = b""

    def until(self, wanted: str) -> None:
        """Read until `wanted` has been written after what was waited for last."""
        end = time.monotonic() + 2 * self.patience
        while wanted not in self.written[self._seen :]:
            assert time.monotonic() < end, f"never came {wanted!r}: {self.written[-500:]!r}"
            assert self._read(), f"ended without {wanted!r}: {self.written!r}"
        self._seen = self.written.index(wanted, self._seen) + len(wanted)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._ours, text.encode())

    def type_ahead(self, line: str) -> None:
        """Press keys that nobody reads, a line of them, and wait until they have arrived: the
        kernel hands them over later than it takes them, and echoes them only then."""
        self.type(line)
        end = time.monotonic() + self.patience
        while _waiting(self._theirs) < len(line.encode()):
            assert time.monotonic() < end, f"never arrived: {line!r}"
            time.sleep(0.01)

    def interrupt(self) -> None:
        """What Ctrl-C does to the process in the foreground."""
        self.process.send_signal(signal.SIGINT)

    def stop(self) -> None:
        """What Ctrl-Z does, and wait until the process has stopped."""
        self.process.send_signal(signal.SIGTSTP)
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), status
        while select.select([self._ours], [], [], 0)[0]:
            self._read()

    @property
    def modes(self) -> list[Any]:
        """Whether keys are echoed, read by the line, and the like."""
        return termios.tcgetattr(self._ours)[:4]

    def finish(self) -> None:
        """Read to the end."""
        while self._read():
            pass
        self.code, self.modes_left = self.process.wait(timeout=30), self.modes
        os.close(self._ours)
        os.close(self._theirs)

    def screen(self) -> list[str]:
        """What is seen in the end: lines, without the blank ones at the bottom."""
        return rendered(self.written)

    def _read(self) -> bool:
        """Read some; False where the process has ended and there is nothing more."""
        end = time.monotonic() + self.patience
        while not select.select([self._ours], [], [], 0.02)[0]:
            if self.process.poll() is not None and not select.select([self._ours], [], [], 0)[0]:
                return False
            if time.monotonic() > end:
                self.process.kill()
                raise AssertionError(f"nothing more came after {self.written!r}")
        self._bytes += os.read(self._ours, 65536)
        self.written = self._bytes.decode(errors="ignore")
        return True


def _set_size(descriptor: int, rows: int, columns: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _waiting(descriptor: int) -> int:
    """Bytes of whole lines that can be read."""
    return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)


def rendered(written: str) -> list[str]:
    """Play what a program wrote on an endless paper: text, line ends, and the cursor movements
    that the program uses. Anything else fails."""
    lines: list[list[str]] = [[]]
    row = column = 0
    for match in re.finditer(r"\x1b\[(\??\d*(?:;\d+)*)([A-Za-z])|([^\x1b])|(\x1b)", written):
        parameter, order, character, stray = match.groups()
        assert stray is None, (
            f"an escape sequence other than CSI: {written[match.start() :][:20]!r}"
        )
        while len(lines) <= row:
            lines.append([])
        if character == "\r":
            column = 0
        elif character == "\b":
            column -= 1
        elif character == "\n":  # with the return to the left that a terminal's driver adds
            row, column = row + 1, 0
        elif character is not None:
            lines[row] += [" "] * (column + 1 - len(lines[row]))
            lines[row][column] = character
            column += 1
        elif order == "A":
            row -= int(parameter or 1)
        elif order in ("C", "D"):
            column += int(parameter or 1) * (1 if order == "C" else -1)
        elif order in ("J", "K") and parameter in ("", "0"):
            lines[row:] = [lines[row][:column], *lines[row + 1 :]][: None if order == "K" else 1]
        elif order == "K":
            assert parameter == "2"
            lines[row] = []
        else:
            assert order in "mhl", f"an unknown order: {match.group()!r}"
    text = ["".join(line).rstrip() for line in lines]
    while text and not text[-1]:
        text.pop()
    return text


def main() -> None:
    """Run the program. The modules that it would take from the package are stood in for, since
    importing them takes seconds."""
    script = Script(**json.loads(sys.argv[1]))
    generation = types.ModuleType("mlx_diffgemma.generation")
    generation.load, generation.stream_generate = script.load, script.stream_generate
    fitting = types.ModuleType("mlx_diffgemma.fitting")
    fitting.diffusion_config = script.diffusion_config
    response = types.ModuleType("mlx_diffgemma.generation_response")
    response.GenerationResponse = partial(types.SimpleNamespace, images=0, image_seconds=0.0)
    detokenize = types.ModuleType("mlx_diffgemma.text.detokenize")
    detokenize.token_strings = characters
    sys.modules |= {
        module.__name__: module for module in (generation, fitting, response, detokenize)
    }
    from mlx_diffgemma.cli.main import main

    sys.argv = ["mlx-diffgemma", *sys.argv[2:]]
    main()


if __name__ == "__main__":
    main()
