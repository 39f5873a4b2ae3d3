"""Load a server for a long time, and see that nothing is lost, wrong, or left behind.

    python scripts/soak_server.py --seconds 600 --clients 64

It starts `mlx-diffgemma serve`, asks every kind of request alone, and then has many clients ask
the same ones at random at the same time. Some go away at a random moment, some read slowly. Every
answer must be the one that its seed gave alone; memory must stay as it was when the load had
settled, and no thread or socket may be left at the end. The last line says what held; the exit
code is 1 where something did not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

SETTLED = 120.0  # seconds after which memory must stay, in a run of 600 and more
WINDOW = 120.0  # seconds over which a figure is the mean
FLAT = 0.05
PATIENCE = 120.0  # seconds for one answer
PUZZLE = "sudoku\n4..613\n61.42.\n.6...4\n134...\n3265.1\n5...6."
GRID = "532461\n456132\n146253\n253146\n314625\n625314\n"
HOLED = "532461\n[[?]]\n146253\n253146\n314625\n625314\n"
TEMPLATE = "532461\n{row:/[1-6]{6}/}\n146253\n253146\n314625\n625314\n"
PROMPTS = (PUZZLE, "sort: 3 1 2", "count to 5", "sudoku")


@dataclass(frozen=True)
class Case:
    """A request, and how its answer is read from the response."""

    path: str
    body: dict[str, Any]
    read: Callable[[bytes], Any]

    @property
    def name(self) -> str:
        """What it is called in counts."""
        return f"{self.path}{' streamed' if self.body.get('stream') else ''}"


def whole(*keys: Any) -> Callable[[bytes], Any]:
    """Reads what stands under some keys of a JSON body."""

    def read(body: bytes) -> Any:
        value = json.loads(body)
        for key in keys:
            value = value[key]
        return value

    return read


def deltas(*keys: Any) -> Callable[[bytes], str]:
    """Joins what stands under some keys of each event of a stream, be they lines or SSE."""

    def read(body: bytes) -> str:
        text = ""
        for line in body.splitlines():
            data = line.removeprefix(b"data:").strip()
            if not data.startswith(b"{"):
                continue
            value: Any = json.loads(data)
            if "error" in value:
                raise ValueError(f"an error in a stream: {value}")
            try:
                for key in keys:
                    value = value[key]
            except (KeyError, IndexError, TypeError):
                continue
            text += value if isinstance(value, str) else ""
        return text

    return read


def decided(body: bytes) -> Any:
    """Answers to typed questions as far as rounding cannot change them."""
    answers = json.loads(body)["answers"]
    return {name: round(answer["probabilities"]["1"], 2) for name, answer in answers.items()}


def cases(seeds: int) -> list[Case]:
    """Requests for every protocol, each with so many seeds."""
    question = {"cell": {"type": "choice", "criteria": {"1": None, "2": None, "6": None}}}
    found = []
    for seed in range(seeds):
        for prompt in PROMPTS:
            asked = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 64}
            chat = {**asked, "seed": seed}
            found += [
                Case("/v1/chat/completions", chat, whole("choices", 0, "message", "content")),
                Case(
                    "/v1/chat/completions",
                    {**chat, "stream": True, "diffusion_frames": True},
                    deltas("choices", 0, "delta", "content"),
                ),
                Case(
                    "/api/chat",
                    {**asked, "model": "demo:latest", "stream": True,
                     "options": {"seed": seed, "num_predict": 64}},
                    deltas("message", "content"),
                ),
            ]  # fmt: skip
        found += [
            Case(
                "/v1/completions",
                {"prompt": "sort: 9 8 7", "max_tokens": 32, "seed": seed},
                whole("choices", 0, "text"),
            ),
            Case("/v1/infill", {"text": HOLED, "prompt": "sudoku", "seed": seed}, whole("text")),
            Case(
                "/v1/fill",
                {"template": TEMPLATE, "prompt": "sudoku", "seed": seed},
                whole("text"),
            ),
            Case(
                "/v1/edit",
                {"text": GRID, "instruction": "mend it", "lines": [2, 2], "prompt": "sudoku",
                 "strength": 0.5, "seed": seed},
                whole("text"),
            ),
            Case(
                "/v1/decisions",
                {"model": "demo", "state": "sudoku", "questions": question, "draws": 2,
                 "frame": "53{cell}461\n461532\n", "seed": seed},
                decided,
            ),
            Case(
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": "sudoku"}], "seed": seed,
                 "response_format": {"type": "regex", "pattern": "53[1-6]{2}61\n4[1-6]{5}"}},
                whole("choices", 0, "message", "content"),
            ),
        ]  # fmt: skip
    # Anthropic's requests have no seed: their answers are only counted.
    message = {"model": "demo", "max_tokens": 32, "messages": [{"role": "user", "content": "hi"}]}
    found.append(Case("/v1/messages", message, lambda body: json.loads(body)["role"]))
    return found


class GoneError(Exception):
    """The client went away on purpose."""


@dataclass
class Client:
    """One HTTP client of few words: a connection for every request."""

    port: int

    async def ask(
        self, case: Case, *, leave_after: float | None = None, slow: bool = False
    ) -> tuple[int, bytes]:
        """Status and body of the response; GoneError where the client left after some seconds."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            body = json.dumps(case.body).encode()
            head = (
                f"POST {case.path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            limit = PATIENCE if leave_after is None else leave_after
            try:
                received = await asyncio.wait_for(self._read(reader, slow), limit)
            except asyncio.TimeoutError:
                if leave_after is None:
                    raise
                raise GoneError from None
            return _parsed(received)
        finally:
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader, slow: bool) -> bytes:
        received = b""
        while piece := await reader.read(64 if slow else 65536):
            received += piece
            if slow:
                await asyncio.sleep(0.01)
        return received


def _parsed(received: bytes) -> tuple[int, bytes]:
    head, _, body = received.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 "):
        raise ConnectionError(f"no response: {received[:60]!r}")
    if b"transfer-encoding: chunked" in head.lower():
        pieces, rest = [], body
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size, 16)
            if not length:
                break
            pieces.append(rest[:length])
            rest = rest[length + 2 :]
        else:
            raise ConnectionError("the response broke off")
        body = b"".join(pieces)
    return int(head.split()[1]), body


@dataclass
class Found:
    """What a run came to.

    Attributes:
        answered, left, busy: requests by their names: right answers, clients that went away, and
            refusals of a full queue.
        wrong: what was lost or answered wrong.
        seconds: for how long clients asked.
        samples: (seconds since the start, bytes of the process, bytes that MLX holds).
    """

    answered: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    busy: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)
    samples: list[tuple[float, float, float]] = field(default_factory=list)


async def soak(port: int, pid: int, options: argparse.Namespace) -> Found:
    """Ask alone, then together, and watch the process."""
    found, client = Found(), Client(port)
    known = []
    for case in cases(options.seeds):
        start = time.monotonic()
        status, body = await client.ask(case)
        if status != 200:
            raise SystemExit(f"error: {case.name} answers {status}: {body[:300]!r}")
        known.append((case, case.read(body), time.monotonic() - start))
    before = await settled(port, pid)
    start = time.monotonic()
    end = start + options.seconds

    def goes_on() -> bool:
        enough = options.answers and found.answered.total() >= options.answers
        return time.monotonic() < end and not enough

    async def asking(number: int) -> None:
        choose = random.Random(f"{options.seed} {number}")
        while goes_on():
            case, expected, seconds = choose.choice(known)
            # An answer takes longer in company; a client may leave at any moment of it.
            leaves = choose.random() < options.leaving
            after = choose.uniform(0, seconds * options.clients / 4) if leaves else None
            try:
                status, body = await client.ask(
                    case, leave_after=after, slow=choose.random() < options.slow
                )
                if status == 503:
                    found.busy += 1
                    await asyncio.sleep(choose.uniform(0.5, 1.5))
                    continue
                if status != 200:
                    raise ValueError(f"status {status}: {body[:200]!r}")
                if (answer := case.read(body)) != expected:
                    raise ValueError(f"{answer!r} and not {expected!r}")
                found.answered[case.name] += 1
            except GoneError:
                found.left[case.name] += 1
            except Exception as error:
                found.wrong.append(f"{case.name}: {type(error).__name__} {error}")

    async def watching() -> None:
        while goes_on():
            metrics = await metrics_of(port)
            found.samples.append((time.monotonic() - start, resident(pid), metrics["active_bytes"]))
            await asyncio.sleep(1.0)

    await asyncio.gather(watching(), *(asking(number) for number in range(options.clients)))
    found.seconds = time.monotonic() - start
    await settled(port, pid)
    for case, expected, _ in known:  # alone again, which also lets Python collect its garbage
        status, body = await client.ask(case)
        if status != 200 or case.read(body) != expected:
            found.wrong.append(f"{case.name} alone afterwards: status {status}, {body[:100]!r}")
    after = await settled(port, pid)
    pool = min(32, (os.cpu_count() or 1) + 4)  # threads of asyncio's own, which stay
    for what, allowed in (("sockets", 0), ("threads", pool), ("http_open", 0)):
        if after[what] > before[what] + allowed:
            found.wrong.append(f"{what}: {after[what]} are left of {before[what]} before")
    # What requests hold while they run goes up and down with what they are: trends are of means.
    warm = SETTLED if options.seconds > 2 * SETTLED else options.seconds / 3
    for what, column in (("resident", 1), ("held by MLX under load", 2)):
        late = [sample for sample in found.samples if sample[0] >= warm]
        windows: dict[int, list[float]] = {}
        for sample in late:
            windows.setdefault(int((sample[0] - warm) / WINDOW), []).append(sample[column])
        levels = [mean(each) for each in windows.values() if len(each) > WINDOW / 4]
        print(f"{what}, means of {WINDOW:.0f} s: " + ", ".join(f"{x / 1e6:.1f}" for x in levels))
        if len(levels) > 1 and levels[-1] > levels[0] * (1 + FLAT):
            found.wrong.append(f"{what}: {levels[-1] / levels[0] - 1:.1%} more at the end")
    rest = [each["active_bytes"] - each["prefix_bytes"] for each in (before, after)]
    print(
        f"held by MLX at rest, without kept prefixes: {rest[0] / 1e6:.2f}, {rest[1] / 1e6:.2f} MB"
    )
    if rest[1] > rest[0] * (1 + FLAT):
        found.wrong.append(f"held by MLX at rest: {rest[1] / rest[0] - 1:.1%} more than before")
    return found


async def settled(port: int, pid: int) -> dict[str, float]:
    """Figures of the server once nothing runs any more."""
    end = time.monotonic() + 60
    while True:
        found = await metrics_of(port)
        busy = found["requests_running"] + found["requests_waiting"] + found["http_open"] - 1
        if not busy:
            break
        if time.monotonic() > end:
            raise SystemExit(f"error: requests are left that nobody waits for: {found}")
        await asyncio.sleep(0.2)
    await asyncio.sleep(1.0)
    return {**(await metrics_of(port)), **held(pid)}


async def metrics_of(port: int) -> dict[str, float]:
    """What /metrics says without labels."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await asyncio.wait_for(reader.read(), PATIENCE)).decode()
    writer.transport.abort()
    return {
        name: float(value) for name, value in re.findall(r"^mlx_diffgemma_(\w+) (\S+)$", text, re.M)
    }


def resident(pid: int) -> float:
    """Bytes of a process that are in memory."""
    told = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    return float(told.stdout or "nan") * 1024


def held(pid: int) -> dict[str, float]:
    """Sockets and threads of a process, where the system tells."""
    folder = Path(f"/proc/{pid}")
    if not folder.exists():
        return {"sockets": 0, "threads": 0}
    sockets = 0
    for each in (folder / "fd").iterdir():
        try:
            sockets += "socket:" in str(each.readlink())
        except OSError:  # closed meanwhile
            continue
    return {"sockets": sockets, "threads": len([*(folder / "task").iterdir()])}


def started(options: argparse.Namespace) -> tuple[subprocess.Popen[str], int]:
    """A server of its own, and its port."""
    command = [
        sys.executable, "-m", "mlx_diffgemma", "serve", "--model", options.model, "--port", "0",
        "--max-batch", str(options.max_batch),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if ready := re.match(r"ready: http://127.0.0.1:(\d+) ", line):
            return process, int(ready[1])
    raise SystemExit(f"error: the server did not start: {''.join(lines)}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hours", type=float, help="Length of the run in hours.")
    parser.add_argument("--seconds", type=float, default=600.0, help="Length in seconds.")
    parser.add_argument("--answers", type=int, help="Right answers after which it ends sooner.")
    parser.add_argument("--clients", type=int, default=64, help="Clients at the same time.")
    parser.add_argument("--leaving", type=float, default=0.3, help="Share that goes away.")
    parser.add_argument("--slow", type=float, default=0.1, help="Share that reads slowly.")
    parser.add_argument("--model", default="demo", help="Model to serve.")
    parser.add_argument("--max-batch", type=int, default=8, help="Canvases that share a step.")
    parser.add_argument("--seeds", type=int, default=2, help="Seeds that a request is asked with.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of what the clients do.")
    options = parser.parse_args()
    if options.hours is not None:
        options.seconds = options.hours * 3600
    process, port = started(options)
    log = _drained(process)
    try:
        found = asyncio.run(soak(port, process.pid, options))
    except BaseException:
        process.kill()
        print("".join(log[-20:]), file=sys.stderr)
        raise
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    code = process.wait(20)
    took = time.monotonic() - start
    if code != 130 or took > 5:
        found.wrong.append(f"the server ended with {code} after {took:.1f} s")
    for name in sorted(found.answered | found.left):
        print(f"{name:36} {found.answered[name]:6} right, {found.left[name]:5} left")
    for problem in found.wrong[:20]:
        print(f"wrong: {problem}")
    print(
        f"{found.answered.total()} answers right, {len(found.wrong)} problems, "
        f"{found.left.total()} clients left, {found.busy} refused for now, "
        f"{options.clients} clients, {found.seconds:.0f} s"
    )
    sys.exit(1 if found.wrong else 0)


def _drained(process: subprocess.Popen[str]) -> list[str]:
    """The last lines of the server's log, read on so that it never waits for us."""
    assert process.stderr is not None
    lines: list[str] = []

    def read() -> None:
        for line in process.stderr or ():
            lines.append(line)
            del lines[:-200]

    threading.Thread(target=read, daemon=True).start()
    return lines


if __name__ == "__main__":
    main()
