"""Data in mlx-lm's formats, from JSON lines or a Hugging Face data set, as examples of token ids.

A line holds `messages` (the last one is the response) and maybe `tools`, `prompt` and `completion`,
or `text`. Text that spells a control token stays text. An error about a record names its file and
line, or its data set and row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_diffgemma.checks import check_text
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.text.control_tokens import control_tokens_of
from mlx_diffgemma.text.response import encode_answered, end_of_text, end_of_turn
from mlx_diffgemma.text.tokenizer import hf_tokenizer
from mlx_diffgemma.train.examples import Example

SPLITS = ("train", "valid", "test")
_ALSO_CALLED = {"valid": ("validation", "dev")}
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FORMATS = '{"messages": [...]}, {"prompt": "...", "completion": "..."} or {"text": "..."}'

Records = Iterable[tuple[str, Any]]
"""Pairs of where a record comes from, as an error names it, and what it holds."""


@dataclass(frozen=True)
class Splits:
    """Examples to train on, to evaluate with while training, and to test with at the end."""

    train: tuple[Example, ...] = ()
    valid: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Limits:
    """How long an example may be.

    Attributes:
        max_seq_length: most tokens of prompt and response.
        context: most positions of the model, whole canvases included.
        canvas_length: tokens of a canvas.
    """

    max_seq_length: int
    context: int
    canvas_length: int

    def check(self, example: Example) -> None:
        """Raise UsageError if the example is too long."""
        count = len(example.tokens)
        if count > self.max_seq_length:
            raise UsageError(
                f"prompt and response have {count} tokens, more than --max-seq-length "
                f"{self.max_seq_length}; raise it, or shorten the example."
            )
        canvases = -(-len(example.response) // self.canvas_length)
        needed = example.prompt + canvases * self.canvas_length
        if needed > self.context:
            raise UsageError(
                f"a prompt of {example.prompt} tokens and {canvases} canvas(es) of "
                f"{self.canvas_length} exceed the model's context of {self.context}; shorten the "
                "example."
            )


def load_data(
    name: str, tokenizer: Any, limits: Limits, wanted: Sequence[str] = ("train", "valid")
) -> Splits:
    """Read the wanted splits; "valid" is left empty where it does not exist.

    Args:
        name: a folder with `train.jsonl`, `valid.jsonl`, `test.jsonl`, or a Hugging Face data set.
        tokenizer: mlx-lm's wrapper of a tokenizer.
        wanted: names of `SPLITS`.

    Raises:
        UsageError: a split other than "valid" is missing, or the data is empty, malformed or too
            long.
        CheckpointError: the tokenizer has no chat template, or no token that ends an answer.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        raise UsageError(f"{folder} is a file; name the folder with train.jsonl in it.")
    if folder.is_dir():
        found = {split: _lines(folder / f"{split}.jsonl") for split in wanted}
    elif _REPOSITORY.fullmatch(name):
        found = _from_hub(name, wanted)
    else:
        raise UsageError(f"--data {name}: no such folder; it holds train.jsonl and valid.jsonl.")
    reader = _Reader(tokenizer, limits)
    splits = {}
    for split, records in found.items():
        if records is None:
            if split != "valid":
                raise UsageError(f"{name} has no {split} split ({split}.jsonl); add it.")
            continue
        splits[split] = tuple(reader.example(where, record) for where, record in records)
        if not splits[split]:
            raise UsageError(f"{name}: the {split} split is empty; put at least one example in.")
    return Splits(**splits)


class _Reader:
    """Turns records into examples."""

    def __init__(self, tokenizer: Any, limits: Limits) -> None:
        self._tokenizer, self._limits = tokenizer, limits
        self._controls = control_tokens_of(hf_tokenizer(tokenizer))
        self._turn_end: int | None = None

    def example(self, where: str, record: Any) -> Example:
        try:
            example = self._read(record)
            self._limits.check(example)
        except UsageError as error:  # a PromptError is one
            raise UsageError(f"{where}: {error}") from None
        return example

    def _read(self, record: Any) -> Example:
        if not isinstance(record, Mapping):
            raise UsageError(f"is no object; write {_FORMATS}.")
        tools = record.get("tools") or None
        if "prompt" in record and "completion" in record:
            asked = {"role": "user", "content": _text(record, "prompt")}
            answer = {"role": "assistant", "content": _text(record, "completion")}
            return self._answered([asked, answer], tools)
        if "messages" in record:
            return self._conversation(record["messages"], tools)
        if "text" in record:
            return self._document(_text(record, "text"))
        raise UsageError(f"has none of the known keys; write {_FORMATS}.")

    def _conversation(self, messages: Any, tools: Any) -> Example:
        if not isinstance(messages, (list, tuple)) or len(messages) < 2:
            raise UsageError("messages must be a list of at least two: a question and its answer.")
        last = messages[-1]
        if not isinstance(last, Mapping) or last.get("role") not in ("assistant", "model"):
            raise UsageError("the last message must be the assistant's: it is what is learnt.")
        return self._answered(messages, tools)

    def _answered(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> Example:
        if self._turn_end is None:
            self._turn_end = end_of_turn(self._tokenizer)
        prompt, response = encode_answered(self._tokenizer, messages, self._turn_end, tools=tools)
        return Example((*prompt, *response), len(prompt))

    def _document(self, text: str) -> Example:
        check_text("the text", text)
        if not text:
            raise UsageError("the text is empty; give some.")
        plain = self._controls.encode_text(text)
        framed = self._controls.encode_text(text, add_special_tokens=True)
        starts = (i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
        # The prompt is the bos, or the first token of the text where no bos is written.
        before = framed[: next(starts)]
        tokens = (*before, *plain, end_of_text(self._tokenizer))
        return Example(tokens, max(1, len(before)))


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise UsageError(f"'{key}' must be a text, not {value!r:.40}.")
    return value


def _lines(path: Path) -> Records | None:
    return _read_lines(path) if path.exists() else None


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a file of JSON lines; blank lines are passed over."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); check the path.") from None
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            yield where, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise UsageError(f"{where}: is not UTF-8 text; encode the file anew.") from None
        except json.JSONDecodeError as error:
            raise UsageError(f"{where}: is no JSON ({error.msg} at {error.colno}).") from None
        except (RecursionError, ValueError) as error:
            reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
            raise UsageError(f"{where}: cannot be read ({reason}).") from None


def _from_hub(name: str, wanted: Sequence[str]) -> dict[str, Records | None]:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"--data {name}: no such folder; for a Hugging Face data set of that name, "
            "`pip install datasets` first."
        ) from None
    try:
        found = datasets.load_dataset(name)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"--data {name}: no such folder, and no data set ({reason}).") from None
    splits: dict[str, Records | None] = {}
    for split in wanted:
        key = next((k for k in (split, *_ALSO_CALLED.get(split, ())) if k in found), None)
        splits[split] = None if key is None else _rows(name, key, found[key])
    return splits


def _rows(name: str, split: str, rows: Any) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows):
        yield f"{name}, {split} row {number}", {k: v for k, v in row.items() if v is not None}
