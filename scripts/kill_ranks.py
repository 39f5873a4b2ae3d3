"""Kill ranks at random moments, and see that the others end in time, with one line and their code.

    python scripts/kill_ranks.py                  # 20 kills, of each rank in turn
    python scripts/kill_ranks.py --signal STOP    # the rank hangs instead of dying

Two processes on this machine generate with the demo model. The moments lie between the time at
which they have come together and the time at which a run that nobody disturbs ends.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOST = 75  # the code of a process that ends because of another one

JOINED = "joined"
LIMIT = 10.0  # seconds after which the other ranks must have ended
COMMAND = ("generate", "--model", "demo", "--prompt", "Count to ten.", "--seed", "1")


def run_rank(silence: float, arguments: Sequence[str]) -> None:
    """Be one of the ranks, and say on stderr when they have come together.

    Args:
        silence: seconds after which a rank that says nothing counts as hung; 0 takes the program's.
        arguments: the command line.
    """
    from mlx_diffgemma.cli import ranks
    from mlx_diffgemma.cli.main import main
    from mlx_diffgemma.distributed import channel

    channel.SILENCE_SECONDS = silence or channel.SILENCE_SECONDS
    join = ranks.join

    def joined(*args: Any) -> Any:
        found = join(*args)
        print(JOINED, file=sys.stderr, flush=True)
        return found

    ranks.join = joined
    sys.argv[1:] = arguments
    main()


@dataclass
class Run:
    """Processes that compute together, and the folder with what they write."""

    processes: list[subprocess.Popen[str]]
    folder: Path

    def join(self) -> float:
        """Wait until the ranks have come together; when that was (`time.monotonic`)."""
        while not all(JOINED in self.stderr(rank) for rank in range(len(self.processes))):
            if all(process.poll() is not None for process in self.processes):
                raise RuntimeError(f"the ranks ended: {self.stderr(0)}")
            time.sleep(0.02)
        return time.monotonic()

    def wait(self, seconds: float = 60.0) -> list[int]:
        """The exit codes of all ranks."""
        return [process.wait(seconds) for process in self.processes]

    def stdout(self, rank: int) -> str:
        return (self.folder / f"{rank}.out").read_text()

    def stderr(self, rank: int) -> str:
        return (self.folder / f"{rank}.err").read_text()

    def errors(self, rank: int) -> list[str]:
        """The lines in which a rank says what went wrong."""
        return [line for line in self.stderr(rank).splitlines() if line.startswith("error: ")]


@contextmanager
def started(
    folder: Path, *commands: Sequence[str], silence: float = 0.0, stdin: str = ""
) -> Iterator[Run]:
    """Processes that run a command each, as one model; rank 0 reads `stdin`, and the others have a
    stdin that never ends. They are killed at the end."""
    from mlx_diffgemma.train.processes import local_hosts

    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps(local_hosts(len(commands))))
    (folder / "stdin").write_text(stdin)
    run = Run([], folder)
    try:
        for rank, command in enumerate(commands):
            with (
                (folder / f"{rank}.out").open("w") as out,
                (folder / f"{rank}.err").open("w") as err,
                (folder / "stdin").open() as read,
            ):
                run.processes.append(
                    subprocess.Popen(
                        [sys.executable, __file__, "--rank", str(silence), *command],
                        env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
                        stdin=subprocess.PIPE if rank else read,
                        stdout=out,
                        stderr=err,
                        text=True,
                    )
                )
        yield run
    finally:
        for process in run.processes:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def disturbed(run: Run, victim: int, moment: float, sent: signal.Signals) -> str:
    """Send a signal to one of two ranks; what became of the other."""
    time.sleep(moment)
    other = run.processes[1 - victim]
    if any(process.poll() is not None for process in run.processes):
        return "the answer was over"
    run.processes[victim].send_signal(sent)
    begun = time.monotonic()
    try:
        code = other.wait(LIMIT + 5)
    except subprocess.TimeoutExpired:
        return f"WRONG: rank {1 - victim} did not end"
    seconds, said = time.monotonic() - begun, run.errors(1 - victim)
    if code == 0:
        return f"rank {victim} got {sent.name} when the answer was over"
    good = code == LOST and seconds <= LIMIT and len(said) == 1 and f"rank {victim} " in said[0]
    return (
        f"{'' if good else 'WRONG: '}{sent.name} to rank {victim}; the other ended after "
        f"{seconds:.2f} s with {code}: {'; '.join(said)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", default="KILL", help="KILL or STOP")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sent = signal.Signals[f"SIG{args.signal}"]
    moments = random.Random(args.seed)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        with started(Path(name), COMMAND, COMMAND) as whole:
            begun = whole.join()
            assert whole.wait() == [0, 0], "undisturbed, it fails"
            length = time.monotonic() - begun
        print(f"undisturbed, a run ends {length:.1f} s after the ranks have come together")
        for number in range(args.kills):
            with started(Path(name), COMMAND, COMMAND) as run:
                run.join()
                moment = moments.uniform(0, length)
                said = disturbed(run, number % 2, moment, sent)
            failed += "WRONG" in said
            print(f"{moment:6.2f} s: {said}", flush=True)
    sys.exit(f"{failed} of {args.kills} went wrong" if failed else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        run_rank(float(sys.argv[2]), sys.argv[3:])
    else:
        main()
