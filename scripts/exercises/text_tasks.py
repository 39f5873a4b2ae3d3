"""Tasks of copying, ordering and counting: short texts in printable ASCII.

    record                       sort       count     fill
    name: toke                   lume       28 31     your {a} waits in {b}.
    age: 41                      kari                 a: lamp
                                                      b: rome
    {"name": "toke", "age": 41}  kari       28 29     your lamp waits in rome.
                                 lume       30 31

Words and numbers are drawn anew each time, so they can only be copied. With the difficulty grows
how much there is of them.
"""

from __future__ import annotations

import json

import numpy as np

from exercises.exercise import Exercise

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_FIELDS = ("name", "age", "city", "pet", "job", "id")
_NUMBERS = ("age", "id")
_MOST_FIELDS, _MOST_LINES, _MOST_NUMBERS, _MOST_SLOTS = 4, 8, 40, 3
_OPENINGS = ("the {a}", "your {a}", "a {a}", "no {a}", "dear {a}, it", "one {a}")
_MIDDLES = (" waits in {b}", " is {b}", " came from {b}", " and the {b}", ", not {b},")
_ENDINGS = (" for {c}.", " with {c}.", " near {c}!", " or {c}?")


def record(rng: np.random.Generator, difficulty: float) -> Exercise:
    """Lines of names and values become one JSON object."""
    count = _up_to(rng, 1, _MOST_FIELDS, difficulty)
    names = [_FIELDS[place] for place in rng.permutation(len(_FIELDS))[:count]]
    values = {
        name: int(rng.integers(10, 100)) if name in _NUMBERS else _word(rng, difficulty)
        for name in names
    }
    lines = [f"{name}: {value}" for name, value in values.items()]
    return Exercise("\n".join(["record", *lines]), json.dumps(values))


def sort(rng: np.random.Generator, difficulty: float) -> Exercise:
    """Words in order of the alphabet, a line each."""
    count = _up_to(rng, 2, _MOST_LINES, difficulty)
    words = [_word(rng, difficulty) for _ in range(count)]
    return Exercise("\n".join(["sort", *words]), "\n".join(sorted(words)))


def count(rng: np.random.Generator, difficulty: float) -> Exercise:
    """All whole numbers from one to another: up to 160 characters."""
    length = _up_to(rng, 2, _MOST_NUMBERS, difficulty)
    first = int(rng.integers(0, 100))
    last = first + length - 1
    return Exercise(f"count\n{first} {last}", " ".join(map(str, range(first, last + 1))))


def fill(rng: np.random.Generator, difficulty: float) -> Exercise:
    """A template with its slots filled from a list."""
    parts = (_OPENINGS, _MIDDLES, _ENDINGS)[: _up_to(rng, 1, _MOST_SLOTS, difficulty)]
    template = "".join(choices[rng.integers(len(choices))] for choices in parts)
    words = {slot: _word(rng, difficulty) for slot, _ in zip("abc", parts, strict=False)}
    lines = [f"{slot}: {word}" for slot, word in words.items()]
    return Exercise("\n".join(["fill", template, *lines]), template.format(**words))


def _up_to(rng: np.random.Generator, least: int, most: int, difficulty: float) -> int:
    return int(rng.integers(least, round(least + (most - least) * difficulty) + 1))


def _word(rng: np.random.Generator, difficulty: float) -> str:
    """Two letters for a beginner, up to six at the end."""
    syllables = _up_to(rng, 1, 3, difficulty)
    return "".join(
        _CONSONANTS[first] + _VOWELS[second]
        for first, second in zip(
            rng.integers(len(_CONSONANTS), size=syllables),
            rng.integers(len(_VOWELS), size=syllables),
            strict=True,
        )
    )
