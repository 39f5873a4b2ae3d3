"""Every answer that was given while rules were compared, in a file that a later run reads again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.tune.asks import Ask

_FORMAT = 1


@dataclass(frozen=True)
class Trial:
    """One answer.

    Attributes:
        text: the text of the answer.
        passes: forward passes over its canvases, by the decoder and by the encoder.
        canvases: the number of its canvases.
        seconds: the seconds that the answer took, the prompt's encoding left out.
    """

    text: str
    passes: int
    canvases: int
    seconds: float


class Ledger:
    """The answers by settings, seed and number of the prompt.

    Args:
        path: the path of the file; None keeps the answers in memory alone.
        of: what the answers depend on besides, such as the fingerprints of the model and of the
            prompts.

    Raises:
        UsageError: the file is damaged, or holds answers of another model or to other prompts.
    """

    def __init__(self, path: Path | None, of: Mapping[str, str]) -> None:
        self.path, self._of = path, {"format": _FORMAT, **of}
        self._trials: dict[tuple[str, int, int], Trial] = {}
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        whole = path.read_bytes()
        # What a killed run was writing has no end of line; the next one writes over it.
        kept = whole[: whole.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in kept.splitlines()]
            for line in lines[1:]:
                for number, trial in enumerate(line["trials"], line["first"]):
                    self._trials[line["settings"], line["seed"], number] = Trial(**trial)
        except (ValueError, KeyError, TypeError, UnicodeDecodeError):
            raise UsageError(f"{path} is damaged; delete it, or name another file.") from None
        if lines and lines[0] != self._of:
            raise UsageError(
                f"{path} is of a run with another model, other prompts, another chat template or "
                "another length of answers; delete it, or name another file."
            )
        if len(kept) < len(whole):
            os.truncate(path, len(kept))

    def known(self, settings: Mapping[str, object], seed: int, count: int) -> list[Trial]:
        """The answers to the first `count` prompts, up to the first prompt without one."""
        key = _key(settings)
        found: list[Trial] = []
        while len(found) < count and (trial := self._trials.get((key, seed, len(found)))):
            found.append(trial)
        return found

    def add(
        self, settings: Mapping[str, object], seed: int, first: int, trials: Sequence[Trial]
    ) -> None:
        """Keep the answers to the prompts from number `first` on. Where there is a file, they are
        on the disk when this returns."""
        key = _key(settings)
        for number, trial in enumerate(trials, first):
            self._trials[key, seed, number] = trial
        if self.path is None:
            return
        line: dict[str, Any] = {"settings": key, "seed": seed, "first": first}
        line["trials"] = [asdict(trial) for trial in trials]
        new = not self.path.exists() or not self.path.stat().st_size
        with self.path.open("a", encoding="utf-8") as file:
            for each in [self._of, line] if new else [line]:
                file.write(json.dumps(each) + "\n")
            file.flush()
            os.fsync(file.fileno())


def fingerprint(asks: Sequence[Ask], template: object) -> str:
    """A fingerprint of prompts in a chat template, which is equal for equal prompts in the same
    order and in an equal template."""
    text = json.dumps([[asdict(ask) for ask in asks], str(template)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _key(settings: Mapping[str, object]) -> str:
    return json.dumps(dict(settings), sort_keys=True)
