"""The settings by which a prompt becomes token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mlx_diffgemma.checks import check_flag, check_integer, check_text, overridden
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.reading import shown

Tools: TypeAlias = "Sequence[Mapping[str, Any] | Callable[..., Any]]"


@dataclass(frozen=True)
class PromptSettings:
    """How a prompt becomes token ids.

    Attributes:
        system_prompt: a system message before the others.
        raw: whether the prompt is a text that goes to the model without the chat template.
        markers: whether the control tokens that a raw prompt spells are control tokens, not text.
        thinking: whether the answer begins with a chain of thought; None leaves it to the template.
        tools: what the model may call: Python functions with type hints and a docstring, or objects
            that describe them. Calls come back as `tool_calls`, and results go in as messages.
        chat_template_kwargs: variables for the chat template.
        prefill_response: the text that the model's turn begins with; it is part of the answer.
        images: pictures that stand before the text of the last turn of a user, beside those that
            messages hold as `{"type": "image", "image": ...}`: paths, the bytes of files, Pillow
            images or arrays. Videos are parts `{"type": "video", "video": path}` in `images` or in
            messages; their keys "fps" and "max_frames" choose other frames than `read_frames` does
            by itself.
        image_tokens: most tokens of a picture, one of 70, 140, 280, 560 and 1120; None takes the
            checkpoint's own number. A frame of a video takes 70 at most.

    Raises:
        UsageError: a setting is of another type, or two contradict each other.
    """

    system_prompt: str | None = None
    raw: bool = False
    markers: bool = False
    thinking: bool | None = None
    tools: Tools | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    prefill_response: str | None = None
    images: Sequence[Any] = ()
    image_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.system_prompt is not None:
            check_text("system_prompt", self.system_prompt)
        check_flag("raw", self.raw)
        check_flag("markers", self.markers)
        if self.thinking is not None:
            check_flag("thinking", self.thinking)
        prefill = self.prefill_response
        if prefill is not None and not (isinstance(prefill, str) and prefill.strip()):
            raise UsageError("prefill_response must be a text that is not blank; leave it out.")
        if self.markers and not self.raw:
            raise UsageError("markers count in a raw prompt only; add raw, or leave markers out.")
        check_images(self.images)
        if self.image_tokens is not None:
            check_integer("image_tokens", self.image_tokens, 1)

    def refuse_template(self, what: str) -> None:
        """Raise UsageError where a setting needs the chat template, since `what`, as the error
        calls the prompt, uses none."""
        for name, value in {
            "system prompt": self.system_prompt,
            "thinking mode": self.thinking,
            "list of tools": self.tools or None,
            "variable of the template": self.chat_template_kwargs or None,
            "prefilled response": self.prefill_response,
        }.items():
            if value is not None:
                raise UsageError(
                    f"a {name} needs the chat template, and {what} uses none; leave it out."
                )


def check_images(images: Any) -> None:
    """Raise UsageError unless `images` is a list."""
    if not isinstance(images, Sequence) or isinstance(images, (str, bytes)):
        raise UsageError(f"images must be a list of pictures, not {shown(images)}.")


def parted(
    given: PromptSettings | None, settings: Mapping[str, Any]
) -> tuple[PromptSettings, dict[str, Any]]:
    """What was given for the prompt, with those of `settings` that are fields of `PromptSettings`
    put over it, and the other settings.

    Raises:
        UsageError: something else is given, or a setting is out of range.
    """
    if given is not None and not isinstance(given, PromptSettings):
        raise UsageError(f"prompt_settings must be PromptSettings, not {shown(given)}.")
    own = PromptSettings.__dataclass_fields__
    ours = {name: value for name, value in settings.items() if name in own}
    others = {name: value for name, value in settings.items() if name not in own}
    return overridden(given or PromptSettings(), ours), others
