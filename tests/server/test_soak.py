"""A minute of load as `scripts/soak_server.py` runs it for hours, or less where enough is answered
sooner."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak_server.py"


@pytest.mark.slow
def test_a_minute_of_load_loses_nothing_and_leaves_nothing() -> None:
    command = [
        sys.executable, str(SCRIPT), "--seconds", "60", "--clients", "32", "--answers", "80",
        "--seeds", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    found = re.match(r"(\d+) answers right, 0 problems, (\d+) clients left", last)
    assert found and int(found[1]) > 50 and int(found[2]) > 10, done.stdout
