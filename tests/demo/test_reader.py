"""The small model that reads drawn sudokus, by every way in which pictures are asked about."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from mlx_diffgemma import batch_generate, generate, load, stream_generate
from mlx_diffgemma.demo import drawing
from mlx_diffgemma.demo.sudoku import Puzzle, make_puzzle
from mlx_diffgemma.editing.decide import decide
from mlx_diffgemma.editing.structured import generate_structured
from mlx_diffgemma.errors import PromptError

FOLDER = Path(drawing.__file__).parent / "reader"


@pytest.fixture(scope="module")
def reader():
    return load("demo-image")


def pictured(seed: int):
    """A fresh puzzle's cells, and its picture."""
    rng = np.random.default_rng([7, seed])
    puzzle: Puzzle = make_puzzle(rng)
    return drawing.answer(puzzle.givens), drawing.draw(puzzle.givens, rng)


def png(image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_it_is_small_and_reads_most_pictures(reader):
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 3_000_000
    right = 0
    for seed in range(10):
        cells, image = pictured(seed)
        right += generate(*reader, drawing.PROMPT, images=[image], seed=seed) == cells
    assert right >= 8


def test_every_way_to_a_picture_reads_the_same(reader, tmp_path):
    cells, image = pictured(0)
    (tmp_path / "a.png").write_bytes(png(image))
    said = generate(*reader, drawing.PROMPT, images=[image], seed=1)
    assert sum(a == b for a, b in zip(said, cells, strict=True)) >= 34
    parts = [{"type": "image", "image": tmp_path / "a.png"}, {"type": "text", "text": "read"}]
    messages = [{"role": "user", "content": parts}]
    assert generate(*reader, messages, seed=1) == said
    assert generate(*reader, drawing.PROMPT, images=[np.asarray(image)], seed=1) == said
    assert generate(*reader, drawing.PROMPT, images=[png(image)], seed=1) == said


def test_statistics_and_a_prefix_cache(reader):
    model, tokenizer = reader
    cache = model.make_cache()
    cells = []
    for number, seed in enumerate((0, 0, 1)):
        *_, last = stream_generate(
            model, tokenizer, drawing.PROMPT, images=[pictured(seed)[1]], seed=3, prefix_cache=cache
        )
        cells.append(last.tokens)
        assert last.images == (0 if number == 1 else 1)
        assert (last.image_seconds > 0) == (last.images > 0)
        assert last.prompt_tokens > 38
    assert cells[0] == cells[1] != cells[2]


def test_a_batch_mixes_prompts_with_and_without_pictures(reader):
    cells, image = pictured(2)
    asked = [
        {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": "read"}],
        }
    ]
    said, other = batch_generate(*reader, [asked, "read"], seed=5).texts
    assert sum(a == b for a, b in zip(said, cells, strict=True)) >= 34
    assert other != said


def test_constraints_and_decisions_over_pictures(reader):
    cells, image = pictured(3)
    done = generate_structured(*reader, drawing.PROMPT, regex=r"[1-6.]{36}", images=[image], seed=1)
    assert sum(a == b for a, b in zip(done.text, cells, strict=True)) >= 34
    question = {"q": {"type": "noul", "instructions": "is it?"}}
    one = decide(*reader, "", question, images=[image], seed=1)
    same = decide(*reader, "", question, images=[png(image)], seed=1)
    other = decide(*reader, "", question, images=[pictured(4)[1]], seed=1)
    p = [found.answers["q"].probabilities for found in (one, same, other)]
    assert p[0] == p[1] != p[2]
    with pytest.raises(PromptError, match="state is empty"):
        decide(*reader, "", question)


def test_image_tokens_without_a_picture_are_refused(reader):
    with pytest.raises(PromptError, match="stands for a picture, and none belongs to it"):
        generate(*reader, [2, 6, 9])


def test_the_model_that_solves_sudokus_refuses_pictures():
    with pytest.raises(PromptError, match="reads text only: it has no vision tower"):
        generate(*load("demo"), "sudoku", images=[pictured(3)[1]])


def test_the_card_tells_its_figure():
    card = (FOLDER / "README.md").read_text()
    figure = float(card.split("default settings:")[1].split("±")[0])
    assert figure >= 0.9
    assert json.loads((FOLDER / "conversion.json").read_text())["files"]["README.md"]
