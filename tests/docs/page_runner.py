"""Runs the code blocks of one page, in a folder and with names of their own."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from docs.blocks import PROGRAMS, ROOT, Block, check, matches, words_of
from typer.testing import CliRunner

from mlx_diffgemma.cli.main import app
from mlx_diffgemma_convert.cli import app as converter

MODULES = {"mlx-diffgemma": "mlx_diffgemma", "mlx-diffgemma-convert": "mlx_diffgemma_convert"}
_LOST = ("cd", "export", "source", "alias", "unset")
_ASSIGNMENT = re.compile(r"^(\w+)=")


class PageRunner:
    """What the blocks of a page share: a folder, the names of Python, and servers.

    A command of the program runs in this process. Others, and those with pipes, run in a shell that
    knows the program. `mlx-diffgemma serve` is a process of its own until the page ends; it listens
    at a free port, which takes the place of the one that the page names.
    """

    def __init__(self, folder: Path, *, compare: bool = True) -> None:
        self.folder = folder
        self.compare = compare
        self._names: dict[str, Any] = {"__name__": "__page__"}
        self._servers: list[subprocess.Popen[bytes]] = []
        self._ports: dict[str, str] = {}
        self._environment = {**os.environ, "COLUMNS": "100", "MLX_DIFFGEMMA_SERVER": ""}

    def __enter__(self) -> PageRunner:
        self._before = Path.cwd()
        programs = self.folder / ".bin"
        programs.mkdir()
        for name, module in MODULES.items():
            _script(programs / name, f'exec {shlex.quote(sys.executable)} -m {module} "$@"')
        _script(programs / "python", f'exec {shlex.quote(sys.executable)} "$@"')
        self._environment["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
        (self.folder / "scripts").symlink_to(ROOT / "scripts")
        os.chdir(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        os.chdir(self._before)
        for server in self._servers:
            server.terminate()
        for server in self._servers:
            server.wait(10)

    def run(self, block: Block) -> bool:
        """Run a block, or check it where it is not to be run. Returns whether it was run."""
        if block.title:
            (self.folder / block.title).write_text(block.text + "\n")
        if block.not_run or block.title or block.language not in ("sh", "console", "python"):
            check(block)
            return False
        if block.language == "python":
            printed = self._python(block)
            self._judge(block.where, block.output, printed, printed)
            return True
        outs, alls = "", ""
        for command, shown in block.steps():
            out, everything = self._shell(command, block.where, shown)
            if block.language == "console":
                self._judge(f"{block.where}: {command}", shown or "", out, everything)
            outs, alls = outs + out, alls + everything
        self._judge(block.where, block.output, outs, alls)
        return True

    def _judge(self, where: str, shown: str | None, out: str, everything: str) -> None:
        if shown is None or not self.compare or matches(shown, out) or matches(shown, everything):
            return
        raise AssertionError(f"{where}\nshows:\n{shown}\nbut this is printed:\n{everything}")

    def _python(self, block: Block) -> str:
        source = "\n" * (block.line - 1) + self._here(block.text)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, block.where.rpartition(":")[0], "exec"), self._names)
        return self._told(printed.getvalue())

    def _shell(self, command: str, where: str, shown: str | None) -> tuple[str, str]:
        """Run a command. Returns what it printed: to stdout, and in all."""
        command = self._here(command)
        simple = words_of(command)
        program = Path(_called(simple[0])[0]).name
        assert program not in _LOST, f"{where}: each command has a shell of its own: no {program}"
        if program in PROGRAMS and "serve" in simple[0] and "--help" not in simple[0]:
            self._serve(simple[0])
            return "", ""
        if program in PROGRAMS and _is_one(command):
            code, out, everything = self._in_process(program, command)
        else:
            ran = subprocess.run(
                ["bash", "-e", "-o", "pipefail", "-c", command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=self._environment,
                text=True,
            )
            code, out, everything = ran.returncode, ran.stdout, ran.stdout + ran.stderr
        fails = shown is not None and "error: " in shown
        assert (code != 0) == fails, f"{where}: {command}\nended with {code}:\n{everything}"
        return self._told(out), self._told(everything)

    def _in_process(self, program: str, command: str) -> tuple[int, str, str]:
        called = 'for word in "$@"; do printf "%s\\0" "$word"; done'
        read = f"read_words() {{ {called}; }}\n" + re.sub(
            rf"(^|\s)\S*{program}(?=\s|$)", r"\1read_words", command, count=1
        )
        words = subprocess.run(
            ["bash", "-c", read], capture_output=True, text=True, check=True, env=self._environment
        ).stdout.split("\0")[:-1]
        given = dict(word.split("=", 1) for word in _assigned(words_of(command)[0]))
        converts = program == "mlx-diffgemma-convert" or words[:1] == ["convert"]
        if program == "mlx-diffgemma" and converts:
            words = words[1:]
        result = CliRunner().invoke(
            converter if converts else app,
            words,
            prog_name="mlx-diffgemma convert" if converts else "mlx-diffgemma",
            env={
                "COLUMNS": "100",
                "MLX_DIFFGEMMA_SERVER": self._environment["MLX_DIFFGEMMA_SERVER"],
                **given,
            },
        )
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.output

    def _serve(self, words: list[str]) -> None:
        given = dict(word.split("=", 1) for word in _assigned(words))
        arguments = _called(words)[1:]
        named = arguments[arguments.index("--port") + 1] if "--port" in arguments else "8080"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        self._servers.append(
            subprocess.Popen(
                [sys.executable, "-m", "mlx_diffgemma", *arguments, "--port", port],
                env={**self._environment, **given},
                stderr=subprocess.DEVNULL,
            )
        )
        self._ports[named] = port
        if named == "8080":
            self._environment["MLX_DIFFGEMMA_SERVER"] = f"http://127.0.0.1:{port}"
        _wait(f"http://127.0.0.1:{port}/health", self._servers[-1])

    def _here(self, text: str) -> str:
        """A text of the page, with the ports that servers listen at."""
        for named, port in self._ports.items():
            text = re.sub(rf"(localhost|127\.0\.0\.1):{named}\b", rf"\1:{port}", text)
        return text

    def _told(self, text: str) -> str:
        """A printed text, with the ports that the page names."""
        for named, port in self._ports.items():
            text = re.sub(rf"(localhost|127\.0\.0\.1):{port}\b", rf"\1:{named}", text)
        return text


def _script(path: Path, command: str) -> None:
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)


def _assigned(words: list[str]) -> list[str]:
    """The variables that are set before a command."""
    return words[: next((n for n, word in enumerate(words) if not _ASSIGNMENT.match(word)), 0)]


def _called(words: list[str]) -> list[str]:
    """A command without the variables that are set before it."""
    return words[len(_assigned(words)) :] or [""]


def _is_one(command: str) -> bool:
    """Whether a line is one command, without pipes, redirections and substitutions."""
    lexer = shlex.shlex(command.replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return not any(set(word) <= set("();<>|&") for word in lexer) and "$(" not in command


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server has its model."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert process.poll() is None, f"the server ended with {process.returncode}"
        try:
            with urllib.request.urlopen(url) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")
