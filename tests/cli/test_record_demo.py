"""The picture for the README is made by the program itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "record_demo.py"


@pytest.mark.slow
def test_a_run_becomes_a_picture(tmp_path):
    path = tmp_path / "new" / "canvas.svg"
    subprocess.run([sys.executable, str(SCRIPT), str(path), "--seed", "3"], check=True)
    text = "".join(ElementTree.parse(path).getroot().itertext()).replace("\xa0", " ")
    for caption in ("the prompt", "canvas 1 · step 1", "canvas 2 · step 1", "the answer"):
        assert caption in text
    assert "@font-face" not in text
