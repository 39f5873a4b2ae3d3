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


def not_finite(where: str, *, float16: bool, adapter: bool = False) -> str:
    """The line of a `NumericalError`: what happened at `where` ("canvas 1, step 2"), and what it
    may come from.

    Args:
        float16: whether the activations are in float16, whose largest number is 65,504.
        adapter: whether an adapter sits on the model.
    """
    culprit = "its weights or those of the adapter" if adapter else "its weights"
    damaged = f"{culprit} may be damaged (load them with check=True, or add --check)"
    if float16:
        reason = (
            "float16 overflows on activations of this model (convert it to bf16); if it still does "
            f"so then, {damaged}"
        )
    else:
        reason = damaged
    return f"{where}: the model returned NaN or infinity; {reason}."
