"""A model opened for a command: by its name, its adapters, and what is to be asked of it."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_diffgemma.cli.output import note
from mlx_diffgemma.cli.settings import DEFAULT_MODEL, Asking, Loading
from mlx_diffgemma.errors import CheckpointError, MemoryShortageError
from mlx_diffgemma.reading import read_object


@dataclass(frozen=True)
class Opened:
    """A model that is ready to run.

    Attributes:
        name: what the user called the model.
        model, tokenizer: what `load` returns; None where a server answers.
        load_seconds: seconds that loading took.
    """

    name: str
    model: Any
    tokenizer: Any
    load_seconds: float


def open_model(loading: Loading) -> Opened:
    """Load a model. Where none is named, it is the base of the adapters, or the default model.

    Raises:
        DiffGemmaError: it cannot be loaded. Where the user named none, the message also points
            to the model that ships with the program.
    """
    name = loading.model
    if name is None and loading.adapter_path:
        name = _base_of(Path(loading.adapter_path).expanduser())
    chosen = name or DEFAULT_MODEL
    if sys.stderr.isatty():
        print(f"loading {chosen}", file=sys.stderr)
    start = time.perf_counter()
    try:
        model, tokenizer = loading.load(chosen)
    except (CheckpointError, MemoryShortageError) as error:
        if name is not None:
            raise
        raise type(error)(
            f"{error} For the small model that ships with the program: --model demo"
        ) from error
    return Opened(chosen, model, tokenizer, time.perf_counter() - start)


def open_to_ask(loading: Loading, asking: Asking, prompt: str) -> Opened:
    """A model ready for one question. Control tokens that the prompt spells are read as text, which
    is said on stderr.

    Raises:
        DiffGemmaError: it cannot be loaded, or its vocabulary lacks a token that is to end answers.
    """
    opened = open_model(loading)
    end_at(opened, asking)
    if not asking.markers:
        note_markers(opened, prompt, asking.system_prompt or "", asking.prefill_response or "")
    return opened


def note_markers(opened: Opened, *texts: str) -> None:
    """Say on stderr which control tokens the user's texts spell, for they are text."""
    if any("<" in text or "[" in text for text in texts):
        from mlx_diffgemma.text.control_tokens import spelled_in

        if spelled := spelled_in(opened.tokenizer, texts):
            note(
                f"the prompt spells {', '.join(spelled)}, which is read as text; generate --raw "
                "--markers has control tokens count."
            )


def end_at(opened: Opened, asking: Asking) -> None:
    """Have answers end at the tokens of `--extra-eos-token` too.

    Raises:
        UsageError: the vocabulary lacks such a token.
    """
    if asking.extra_eos_token:
        from mlx_diffgemma.text.tokenizer import add_end_tokens

        add_end_tokens(opened.tokenizer, asking.extra_eos_token)


def _base_of(adapters: Path) -> str | None:
    """The model that adapters were trained on, by their `adapter_config.json`; None where it does
    not say."""
    try:
        model = read_object(adapters / "adapter_config.json").get("model")
    except CheckpointError:  # loading them will say what is wrong
        return None
    return model if isinstance(model, str) and model else None
