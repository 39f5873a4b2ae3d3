"""Answers under schemas that say more than the grammar enforces: they are written, then
validated."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from mlx_diffgemma.diffusion.noise import checked_seed
from mlx_diffgemma.errors import DiffGemmaError, UsageError


class Answer(Protocol):
    """An answer, as far as it is validated."""

    @property
    def text(self) -> str: ...


A = TypeVar("A", bound=Answer)


@dataclass(frozen=True)
class Lenient:
    """A schema of which the grammar is to enforce what it can."""

    schema: Mapping[str, Any] | bool


class UnmetConstraintError(DiffGemmaError):
    """The constraint could not be followed to its end, or not in full; `partial` is what was
    written by then."""

    def __init__(self, message: str, partial: str) -> None:
        super().__init__(message)
        self.partial = partial


def first_valid(
    answer: Callable[[Lenient, int], A],
    schema: Mapping[str, Any] | bool,
    tries: int,
    seed: int | None,
) -> A:
    """The first of at most `tries` answers that validates in full.

    Args:
        answer: writes an answer under a schema, with a seed.
        seed: seed of the first try; each further try takes the next.

    Raises:
        UsageError: `tries` is below 1, or the schema is malformed.
        UnmetConstraintError: no answer validates.
    """
    if tries < 1:
        raise UsageError(f"there must be one try at least, not {tries}.")
    fault = validator(schema)
    start, reason, found = checked_seed(seed), "", None
    for number in range(tries):
        found = answer(Lenient(schema), start + number)
        try:
            reason = fault(json.loads(found.text))
        except RecursionError:
            reason = "it is nested too deep"
        if not reason:
            return found
    assert found is not None
    raise UnmetConstraintError(
        f"the answer does not validate in {tries} {'try' if tries == 1 else 'tries'}: {reason}; "
        "allow more tries, or loosen the schema.",
        found.text,
    )


def validator(schema: Mapping[str, Any] | bool) -> Callable[[Any], str]:
    """A function that says in a line why a value does not satisfy `schema`, and gives "" where it
    does.

    Raises:
        UsageError: the schema is malformed; or, of the function, it refers to what is unknown.
    """
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise UsageError(f"the JSON schema cannot be used: {_line(error)}.") from None
    # An empty registry: nothing is fetched from anywhere.
    checker = _with_empty_patterns(kind)(
        schema, registry=Registry(), format_checker=kind.FORMAT_CHECKER
    )

    def fault(value: Any) -> str:
        try:
            error = next(checker.iter_errors(value), None)
        except Unresolvable as unresolvable:
            raise UsageError(
                f"the JSON schema cannot be used: its reference '{unresolvable.ref}' is unknown."
            ) from None
        return "" if error is None else _line(error)

    return fault


def _with_empty_patterns(kind: Any) -> Any:
    """A validator that lets every property be named by the pattern "", which the one of jsonschema
    passes over beside `additionalProperties`."""
    from jsonschema.validators import extend

    usual = kind.VALIDATORS["additionalProperties"]

    def additional(checker: Any, value: Any, instance: Any, schema: Any) -> Any:
        return (
            ()
            if "" in schema.get("patternProperties", ())
            else usual(checker, value, instance, schema)
        )

    return extend(kind, {"additionalProperties": additional})


def _line(error: Any) -> str:
    message = " ".join(str(error.message).split())
    shown = message if len(message) <= 200 else f"{message[:200]}..."
    place = "".join(f"/{part}" for part in error.absolute_path)
    return f"{shown} at {place}" if place else shown
