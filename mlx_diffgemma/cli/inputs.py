"""The prompt of a command, from an option or from stdin."""

from __future__ import annotations

import sys
from collections.abc import Callable

from mlx_diffgemma.errors import PromptError, UsageError


def read_prompt(given: str | None, *, raw: bool = False) -> str:
    """The prompt as given, or from stdin; one newline at the end of stdin is the shell's, and is
    kept only for a raw prompt.

    Raises:
        UsageError: no prompt is given and stdin is a terminal.
        PromptError: the prompt is empty, or it is not text.
    """
    if given is None and sys.stdin.isatty():
        raise UsageError("no prompt: give one with --prompt, or pipe it in.")
    if given is None or given == "-":
        prompt = read_text(sys.stdin.read).removeprefix("\ufeff")  # a byte order mark
        if not raw:
            prompt = prompt.removesuffix("\n").removesuffix("\r")
    else:
        prompt = given
    if not is_text(prompt):
        raise PromptError("the prompt is not UTF-8 text: re-encode it.")
    if not (prompt if raw else prompt.strip()):
        raise PromptError("the prompt is empty: give some text with --prompt, or pipe it in.")
    return prompt


def spelled_out(prompt: str | None) -> str | None:
    """A prompt of an option as mlx-lm reads it: `\\n` stands for a new line and `\\t` for a tab."""
    return None if prompt is None else prompt.replace("\\n", "\n").replace("\\t", "\t")


def read_text(read: Callable[[], str]) -> str:
    """What `read` returns from stdin.

    Raises:
        PromptError: stdin holds bytes that are not text.
    """
    try:
        return read()
    except UnicodeDecodeError:
        raise PromptError("the prompt is not UTF-8 text: re-encode it.") from None


def is_text(text: str) -> bool:
    """Whether a text can be encoded as UTF-8: Python lets undecodable bytes through as lone
    surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
