"""Pictures in requests reach the model, by the packages that clients use."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import anthropic
import numpy as np
import ollama
import openai
import pytest
from running import running

from mlx_diffgemma import load
from mlx_diffgemma.demo import drawing, sudoku
from mlx_diffgemma.server.app import create_app
from mlx_diffgemma.server.engine import Engine

MODEL = "demo-image"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    model, tokenizer = load(MODEL)
    with running(create_app(Engine(model, tokenizer, name=MODEL))) as url:
        yield url


@pytest.fixture(scope="module")
def drawn() -> tuple[bytes, str]:
    """A drawn sudoku as the bytes of a PNG, and what it shows."""
    rng = np.random.default_rng(5)
    puzzle = sudoku.make_puzzle(rng)
    file = io.BytesIO()
    drawing.draw(puzzle.givens, rng).save(file, "PNG")
    return file.getvalue(), drawing.answer(puzzle.givens)


def test_a_data_url_of_openai(url: str, drawn: tuple[bytes, str]) -> None:
    data = base64.b64encode(drawn[0]).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": drawing.PROMPT},
    ]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-") as client:
        answer = client.chat.completions.create(
            model=MODEL,
            seed=1,
            messages=[{"role": "user", "content": parts}],  # type: ignore[list-item, misc]
        )
    assert answer.choices[0].message.content == drawn[1]
    assert answer.usage is not None and answer.usage.prompt_tokens > 36


def test_a_block_of_anthropic(url: str, drawn: tuple[bytes, str]) -> None:
    data = base64.b64encode(drawn[0]).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    parts = [{"type": "image", "source": source}, {"type": "text", "text": drawing.PROMPT}]
    with anthropic.Anthropic(base_url=url, api_key="-") as client:
        answer = client.messages.create(
            model=MODEL,
            max_tokens=128,
            messages=[{"role": "user", "content": parts}],  # type: ignore[typeddict-item]
            extra_body={"seed": 1},
        )
    assert answer.content[0].text == drawn[1]  # type: ignore[union-attr]


def test_images_of_ollama(url: str, drawn: tuple[bytes, str]) -> None:
    message = {"role": "user", "content": drawing.PROMPT, "images": [drawn[0]]}
    answer = ollama.Client(url).chat(model=MODEL, messages=[message], options={"seed": 1})
    assert answer.message.content == drawn[1]
