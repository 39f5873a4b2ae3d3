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
from dataclasses import dataclass
from pathlib import Path

JOINED = "joined"
LIMIT = 10.0  # seconds after which the other ranks must have ended
COMMAND = ("generate", "--model", "demo", "--prompt", "Count to ten.", "--seed", "1")


def run_rank(arguments: list[str]) -> None:
    """Be one of the ranks, and say on stderr when they have come together."""
    from mlx_diffgemma.cli import ranks
    from mlx_diffgemma.cli.main import main

    join = ranks.join

    def joined(*args: object) -> object:
        found = join(*args)
        print(JOINED, file=sys.stderr, flush=True)
        return found

    ranks.join = joined
    sys.argv[1:] = arguments
    main()


@dataclass
class Run:
    """Processes that compute together.

    Attributes:
        joined: when they had come together.
    """

    processes: list[subprocess.Popen[str]]
    folder: Path
    joined: float

    def errors(self, rank: int) -> list[str]:
        text = (self.folder / f"{rank}.err").read_text()
        return [line for line in text.splitlines() if line.startswith("error: ")]


def started(folder: Path, count: int = 2) -> Run:
    """Processes that have come together and go on to load and generate."""
    from mlx_diffgemma.train.processes import local_hosts

    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps(local_hosts(count)))
    processes = []
    for rank in range(count):
        with (folder / f"{rank}.err").open("w") as errors:
            processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, "--rank", *COMMAND],
                    env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    text=True,
                )
            )
    while not all(JOINED in (folder / f"{rank}.err").read_text() for rank in range(count)):
        time.sleep(0.02)
    return Run(processes, folder, time.monotonic())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", default="KILL", help="KILL or STOP")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from mlx_diffgemma.distributed.line import LOST

    sent = signal.Signals[f"SIG{args.signal}"]
    moments = random.Random(args.seed)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        whole = started(Path(name))
        for process in whole.processes:
            process.wait()
        assert [each.returncode for each in whole.processes] == [0, 0], "undisturbed, it fails"
        length = time.monotonic() - whole.joined
        print(f"undisturbed, a run ends {length:.1f} s after the ranks have come together")
        for number in range(args.kills):
            run = started(Path(name))
            victim = number % len(run.processes)
            moment = moments.uniform(0, length)
            time.sleep(moment)
            if any(process.poll() is not None for process in run.processes):
                print(f"{moment:6.2f} s: over before rank {victim} was killed")
                continue
            run.processes[victim].send_signal(sent)
            began = time.monotonic()
            other = run.processes[1 - victim]
            try:
                other.wait(LIMIT + 5)
            except subprocess.TimeoutExpired:
                other.kill()
            seconds = time.monotonic() - began
            run.processes[victim].kill()
            run.processes[victim].wait()
            if other.returncode == 0:
                print(f"{moment:6.2f} s: rank {victim} was killed when the answer was over")
                continue
            said = run.errors(1 - victim)
            good = other.returncode == LOST and seconds <= LIMIT
            good &= len(said) == 1 and f"rank {victim} " in said[0]
            failed += not good
            print(
                f"{moment:6.2f} s: SIG{args.signal} to rank {victim}; the other ended after "
                f"{seconds:5.2f} s with {other.returncode}: {'; '.join(said)}"
                f"{'' if good else '   WRONG'}",
                flush=True,
            )
    sys.exit(f"{failed} of {args.kills} went wrong" if failed else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        run_rank(sys.argv[2:])
    else:
        main()
