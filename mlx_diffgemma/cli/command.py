"""How a command takes settings: typer sees an option for every field of a dataclass, and the
command gets whole objects."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from mlx_diffgemma.cli import errors
from mlx_diffgemma.distributed import launched
from mlx_diffgemma.settings import Setting, settings_of

Parameter = inspect.Parameter
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", help="Traceback of an error, in place of its one line.", rich_help_panel="Output"
    ),
]


class Changes(dict[str, object]):
    """The fields of a library's settings that the user gave, by name."""


@dataclass(frozen=True)
class Of:
    """The annotation of a field of `Changes`: the library's dataclass whose fields it changes.

    Attributes:
        settings: that dataclass.
        shows_defaults: whether `--help` shows the dataclass's own defaults.
    """

    settings: type[Any]
    shows_defaults: bool = False


class _Names:
    def __init__(self, *names: str) -> None:
        self.names = frozenset(names)


class Without(_Names):
    """The annotation of a parameter that leaves some fields of its settings out."""


class Only(_Names):
    """The annotation of a parameter that takes no more than some fields of its settings."""


def command(*examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that makes a function a command of typer's, with these examples in its help.

    A parameter annotated with a dataclass stands for all its fields that carry a `Setting`. One
    annotated `Annotated[type, Setting(...)]` stands for one option. One of type `typer.Context` is
    the context, and all other parameters are typer's own. What the function raises becomes an exit
    code and one line on stderr. Every command gets the option `--debug`. A command with the option
    `--parallel` takes it in `loading`, and runs on rank 0 alone where several processes were
    started.
    """
    return lambda function: _command(function, examples)


def _command(function: Callable[..., None], examples: tuple[str, ...]) -> Callable[..., None]:
    hints = get_type_hints(function, include_extras=True)
    given = inspect.signature(function).parameters.values()
    takes = [
        _Taken(p.name, hints[p.name], p.default)
        for p in given
        if hints[p.name] is not typer.Context
    ]
    asks = [p.name for p in given if hints[p.name] is typer.Context]

    @functools.wraps(function)
    def run(ctx: typer.Context, debug: bool = False, **values: Any) -> None:
        def body(**made: Any) -> None:
            for taken in takes:
                if taken.name not in made:
                    made[taken.name] = taken.assembled(values)
            function(**dict.fromkeys(asks, ctx), **made)

        debug = debug or errors.debugging(ctx)
        if "parallel" in values and launched.count() > 1:
            from mlx_diffgemma.cli import ranks

            loading = next(taken for taken in takes if taken.name == "loading")
            ranks.run(body, loading.assembled(values), debug=debug)
        else:
            errors.run(body, debug=debug)

    options = [option for taken in takes for option in taken.options()]
    # Arguments without a default come first, as Python wants it of a signature.
    options.sort(key=lambda option: option.default is not Parameter.empty)
    signature = [
        Parameter("ctx", Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *options,
        Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=Debug),
    ]
    run.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in signature}
    summary, _, rest = inspect.cleandoc(function.__doc__ or "").partition("\n\n")
    # A \b keeps the lines of a paragraph apart.
    shown = "\n".join(["\b", "Examples:", *(f"  {example}" for example in examples)])
    run.__doc__ = "\n\n".join(filter(None, [summary, shown if examples else "", rest]))
    run.examples = examples  # type: ignore[attr-defined]
    return run


@dataclass(frozen=True)
class _Taken:
    """One parameter of a command. It gives the options that it stands for, and makes its value of
    theirs."""

    name: str
    hint: Any
    default: Any

    def options(self) -> Iterator[Parameter]:
        kind, notes = _parts(self.hint)
        if _is_settings(kind):
            for name, field_kind, note, default in self._fields(kind):
                yield _option(name, field_kind, note, default)
        elif setting := next((note for note in notes if isinstance(note, Setting)), None):
            yield _option(self.name, kind, setting, self.default)
        else:
            yield Parameter(
                self.name, Parameter.KEYWORD_ONLY, default=self.default, annotation=self.hint
            )

    def assembled(self, values: dict[str, Any]) -> Any:
        kind, _ = _parts(self.hint)
        if not _is_settings(kind):
            return _value(kind, values[self.name])
        hints = get_type_hints(kind, include_extras=True)
        own = settings_of(kind)
        made: dict[str, Any] = {}
        for field in fields(kind):
            if field.name in own:
                if field.name in values:
                    made[field.name] = _value(own[field.name][0], values[field.name])
            elif of := _changed(hints[field.name]):
                made[field.name] = Changes(
                    (name, tuple(value) if isinstance(value, list) else value)
                    for name in settings_of(of.settings)
                    if (value := values.get(name)) not in (None, [])
                )
        return kind(**made)

    def _fields(self, kind: type[Any]) -> Iterator[tuple[str, Any, Setting, Any]]:
        """Name, type, setting and default of every option of a settings dataclass."""
        hints = get_type_hints(kind, include_extras=True)
        own = settings_of(kind)
        for field in fields(kind):
            if field.name in own:
                if self._wanted(field.name):
                    field_kind, note = own[field.name]
                    default = field.default if field.default is not MISSING else Parameter.empty
                    yield field.name, field_kind, note, default
            elif of := _changed(hints[field.name]):
                defaults = of.settings() if of.shows_defaults else None
                for name, (field_kind, note) in settings_of(of.settings).items():
                    if self._wanted(name):
                        if defaults is not None and getattr(defaults, name) is not None:
                            shown = str(getattr(defaults, name))
                            note = Setting(note.help, note.flags, note.panel, note.default or shown)
                        yield name, _optional(field_kind), note, None

    def _wanted(self, name: str) -> bool:
        for note in _parts(self.hint)[1]:
            if isinstance(note, Only) and name not in note.names:
                return False
            if isinstance(note, Without) and name in note.names:
                return False
        return True


def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type in an annotation, and the notes beside it."""
    if get_origin(hint) is Annotated:
        kind, *notes = get_args(hint)
        return kind, tuple(notes)
    return hint, ()


def _is_settings(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind)


def _changed(hint: Any) -> Of | None:
    return next((note for note in _parts(hint)[1] if isinstance(note, Of)), None)


def _optional(kind: Any) -> Any:
    """The type of an option that may be left out; a tuple of texts becomes a list, since the option
    may be repeated."""
    repeated = any(get_origin(each) is tuple for each in (kind, *get_args(kind)))
    return (list[str] if repeated else kind) | None


def _value(kind: Any, value: Any) -> Any:
    """A value as the command takes it: a tuple where the option may be repeated, for which typer
    has a list or None."""
    return tuple(value or ()) if get_origin(kind) is tuple else value


def _option(name: str, kind: Any, note: Setting, default: Any) -> Parameter:
    """The option that typer makes of a field."""
    flags = note.flags or (_flag(name, kind, default),)
    if get_origin(kind) is tuple:
        kind, default = list[str] | None, None
    shown: bool | str = note.default or default not in (None, False, True, "", Parameter.empty)
    option = typer.Option(*flags, help=note.help, show_default=shown, rich_help_panel=note.panel)
    return Parameter(
        name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def _flag(name: str, kind: Any, default: Any) -> str:
    flag = name.replace("_", "-")
    switch = kind is bool or bool in get_args(kind)
    return f"--{flag}/--no-{flag}" if switch and default is not False else f"--{flag}"
