"""Rendering of a checkpoint's chat template, with its errors made readable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_diffgemma.errors import CheckpointError, PromptError

_MEND = "mend it, or give another with --chat-template"


def template_text(tokenizer: Any, *, tools: bool = False) -> str:
    """The Jinja text of the template of a Hugging Face tokenizer; with `tools`, of the one that it
    has for them, if it has one.

    Raises:
        CheckpointError: it has none.
    """
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = (template.get("tool_use") if tools else None) or template.get("default")
    if not template:
        where = tokenizer.name_or_path or "the tokenizer"
        raise CheckpointError(
            f"{where} has no chat template; give one with --chat-template FILE, or send the "
            "prompt as it is with --raw."
        )
    return str(template)


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    open_turn: bool = True,
    prefilled: bool = False,
    **settings: Any,
) -> str:
    """The prompt that a template makes of `messages`.

    Args:
        template: the template's text, or None for that of the tokenizer.
        open_turn: whether the prompt ends with the opening of the answer's turn.
        prefilled: whether the last message is the beginning of the answer, which stays open.
        settings: what is handed to the template (`tools`, `enable_thinking`).

    Raises:
        CheckpointError: the template is broken.
        PromptError: the template refuses the messages, in its own words.
    """
    from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError

    text = template or template_text(tokenizer)
    try:
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=text,
            add_generation_prompt=open_turn and not prefilled,
            continue_final_message=prefilled,
            tokenize=False,
            **settings,
        )
        return str(rendered)
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"the chat template is broken: line {error.lineno}: {error.message}; {_MEND}."
        ) from error
    except TemplateError as error:
        if type(error) is TemplateError:  # raised by the template itself, with raise_exception()
            raise PromptError(
                f"the chat template refuses these messages: {_one_line(error)}"
            ) from error
        failure: Exception = error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        if prefilled and "continue_final_message" in str(error):
            raise CheckpointError(
                "the chat template does not print the beginning of an answer as it is given; leave "
                "out the prefilled response."
            ) from error
        failure = error
    kind = "" if isinstance(failure, UndefinedError) else f"{type(failure).__name__}: "
    raise CheckpointError(
        f"the chat template fails: {_line_of(failure)}{kind}{_one_line(failure)}; {_MEND}."
    ) from failure


def _line_of(error: Exception) -> str:
    """The line of the template where `error` happened; Jinja rewrites tracebacks to say it."""
    line = None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return "" if line is None else f"line {line}: "


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
