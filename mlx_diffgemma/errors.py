"""The errors a user can cause. Each is one line: what is wrong, where, and what to do about it.

The command line prints the line and exits with `exit_code`; from Python they are caught as
`DiffGemmaError` or by kind.
"""


class DiffGemmaError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class UsageError(DiffGemmaError, ValueError):
    """A setting or an argument is out of range or contradicts another."""

    exit_code = 2


class ConfigError(DiffGemmaError, ValueError):
    """A checkpoint's `config.json` or `generation_config.json` lacks or contradicts something."""


class CheckpointError(DiffGemmaError):
    """A checkpoint cannot be found, is incomplete, damaged, or of another kind."""


class PromptError(UsageError):
    """A prompt that cannot be run: empty, too long, or holding what the model cannot read."""


class MemoryShortageError(DiffGemmaError):
    """The model, or the request, needs more memory than there is."""


class NumericalError(DiffGemmaError, ArithmeticError):
    """The model returned values that are not finite."""


def not_finite(where: str, *, float16: bool, adapter: bool) -> str:
    """What a `NumericalError` says: where NaN or infinity was met, and what may be its cause."""
    if float16:
        return (
            f"{where}: the model returned NaN or infinity; float16 overflows in this model, take "
            "weights in bfloat16."
        )
    what = "its weights or the adapter may be" if adapter else "its weights may be"
    return (
        f"{where}: the model returned NaN or infinity; {what} damaged (check them with --check)."
    )
