"""A survey from its plan to its rows: what fails is a row, and the other pieces go on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_diffgemma.checkpoint.memory import wired
from mlx_diffgemma.survey.pieces import Piece, Pieces
from mlx_diffgemma.survey.subject import Subject
from mlx_diffgemma.survey.table import Row, as_json, as_markdown, failed


@dataclass(frozen=True)
class Begun:
    """A piece begins.

    Attributes:
        number, count: which of how many pieces it is, from 1.
        piece: the piece.
        seconds_left: guess of the seconds that it and all later ones take.
    """

    number: int
    count: int
    piece: Piece
    seconds_left: float


class Survey:
    """Some parts of a survey, and what was found so far.

    Args:
        subject: what the survey is made of.
        parts: names of the parts, of `PARTS`.

    Attributes:
        rows: what was found.
        pieces: the pieces of all parts, in order.
    """

    def __init__(self, subject: Subject, parts: Sequence[str]) -> None:
        self.subject, self.rows = subject, list[Row]()
        self.pieces = [piece for piece in Pieces(subject) if piece.part in parts]
        self._guesses: list[float] = []
        self._begun = 0
        self._spent = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether every piece was run to its end."""
        return self._begun > len(self.pieces)

    @wired()
    def prepare(self) -> float:
        """Measure for some seconds how fast this machine is. Returns the seconds that the pieces
        take by that."""
        self._guesses = [_guess(piece) for piece in self.pieces]
        return sum(self._guesses)

    def run(self) -> Iterator[Begun]:
        """Run the pieces. Each is announced before it begins, and leaves its rows in `rows`."""
        for place, piece in enumerate(self.pieces):
            self._begun = place + 1
            yield Begun(place + 1, len(self.pieces), piece, self._left(place))
            start = time.perf_counter()
            try:
                with wired():
                    for row in piece.run():
                        self.rows.append(row)
            except Exception as error:  # whatever it is, the others go on
                self.rows.append(failed(piece.part, piece.what, error))
            self._spent += time.perf_counter() - start
        self._begun = len(self.pieces) + 1

    def _left(self, place: int) -> float:
        """The guess for the rest, by how well the guesses have held so far."""
        before, after = sum(self._guesses[:place]), sum(self._guesses[place:])
        # A second each, so that a first piece that takes none says little.
        return after * (self._spent + 1) / (before + 1)

    def found(self) -> list[Row]:
        """The rows so far, with one for what was not run."""
        missing = self.pieces[max(0, self._begun - 1) :]
        if self.is_complete or not missing:
            return self.rows
        begins = f"from {missing[0].part}, {missing[0].what} on"
        return [*self.rows, Row("rest", begins, "not run", "it was ended before")]

    def as_markdown(self) -> str:
        """A table of what was found so far."""
        return as_markdown(self.found())

    def as_json(self) -> str:
        """One JSON object on one line of what was found so far."""
        return as_json(self.found(), complete=self.is_complete, seconds=self._spent)


def _guess(piece: Piece) -> float:
    try:
        return piece.seconds()
    except Exception:  # the piece will say what is wrong
        return 0.0
