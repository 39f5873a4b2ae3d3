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
