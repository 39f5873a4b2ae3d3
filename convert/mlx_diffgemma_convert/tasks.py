"""The prompts that models are compared on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.reading import os_reason

PROMPTS = (
    "Why is the sky blue? Answer in three sentences.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Name the planets of the solar system, one on each line.",
    "Translate into German: The train to the coast leaves at a quarter past nine.",
    "A shop sells pens at 3 for 2 euros. What do 12 pens cost? Explain step by step.",
    "Write a short poem about rain on a tin roof.",
    "List five causes of the French Revolution, most important first.",
    "Give the JSON of a user with a name, an e-mail address and three hobbies.",
)


@dataclass(frozen=True)
class Task:
    """A prompt, and its answer where that is known."""

    prompt: str
    answer: str | None = None


def read_tasks(path: Path | None, count: int) -> list[Task]:
    """The first `count` prompts of a file of JSON lines (`prompt`, and `answer` if there is one),
    or of a built-in list.

    Raises:
        UsageError: the file is missing or holds something else.
    """
    if path is None:
        return [Task(prompt) for prompt in PROMPTS[:count]]
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        tasks = [Task(row["prompt"], row.get("answer")) for row in rows[:count]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path} is no file of prompts ({os_reason(error)}); write one JSON object with a "
            "'prompt' on each line."
        ) from None
    if not tasks:
        raise UsageError(f"{path} holds no prompts.")
    return tasks
