"""Every option that commands share, declared once; commands pick theirs by type."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from mlx_diffgemma.diffusion.config import SAMPLERS, DiffusionConfig
from mlx_diffgemma.diffusion.profiles import DEFAULT as DEFAULT_PROFILE
from mlx_diffgemma.diffusion.profiles import PROFILES, profile_settings
from mlx_diffgemma.errors import UsageError

DEFAULT_MODEL = "mlx-community/diffusiongemma-26B-A4B-it-4bit"

_MODEL, _PROMPT, _DIFFUSION, _OUTPUT = "Model", "Prompt", "Denoising", "Output"
_SPEED = "What a profile sets"

# The model.
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Path or Hugging Face repository, or 'demo' for the small model that ships with "
        "the program.",
        show_default=DEFAULT_MODEL,
        rich_help_panel=_MODEL,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit.", rich_help_panel=_MODEL),
]
AdapterPath = Annotated[
    str | None,
    typer.Option(
        "--adapter-path",
        help="Folder of adapters; without --model, their base is loaded.",
        rich_help_panel=_MODEL,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the tokenizer code that the repository ships.",
        rich_help_panel=_MODEL,
    ),
]
Check = Annotated[
    bool,
    typer.Option(
        "--check", help="Look for NaN and inf in the weights first.", rich_help_panel=_MODEL
    ),
]

# The prompt.
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        help="What to ask; '-' reads stdin, and so does leaving it out where stdin is a pipe. "
        "Here, not in stdin, \\n stands for a new line and \\t for a tab.",
        show_default=False,
        rich_help_panel=_PROMPT,
    ),
]
SystemPrompt = Annotated[
    str | None,
    typer.Option("--system-prompt", help="Instructions put first.", rich_help_panel=_PROMPT),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        help="Jinja template, or a file with one, instead of the checkpoint's.",
        rich_help_panel=_PROMPT,
    ),
]
Raw = Annotated[
    bool,
    typer.Option("--raw", help="Give the prompt as it is: no template.", rich_help_panel=_PROMPT),
]
Thinking = Annotated[
    bool | None,
    typer.Option(
        "--thinking/--no-thinking",
        help="Ask for thinking, where the template knows it.",
        rich_help_panel=_PROMPT,
    ),
]
Markers = Annotated[
    bool,
    typer.Option(
        "--markers",
        help="Control tokens that a --raw prompt spells (<|turn>) count as such; without this they "
        "are text.",
        rich_help_panel=_PROMPT,
    ),
]
Tools = Annotated[
    list[str] | None,
    typer.Option(
        "--tools",
        help="JSON file with a function that the model may call, or a list of them; may be given "
        "several times.",
        rich_help_panel=_PROMPT,
    ),
]
ChatTemplateConfig = Annotated[
    str | None,
    typer.Option(
        "--chat-template-config",
        help="JSON object of variables for the chat template.",
        rich_help_panel=_PROMPT,
    ),
]
PrefillResponse = Annotated[
    str | None,
    typer.Option(
        "--prefill-response",
        help="Text that the answer begins with; the model goes on from there.",
        rich_help_panel=_PROMPT,
    ),
]
PrefillStepSize = Annotated[
    int | None,
    typer.Option(
        "--prefill-step-size", help="Prompt tokens encoded at a time.", rich_help_panel=_PROMPT
    ),
]

# The denoising; what is left out is the checkpoint's own.
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", "-m", help="Most tokens to write.", rich_help_panel=_DIFFUSION),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        help="Makes a run repeatable on one machine; drawn afresh where left out.",
        rich_help_panel=_DIFFUSION,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", help="Most denoising steps a canvas.", rich_help_panel=_DIFFUSION),
]
EntropyBound = Annotated[
    float | None,
    typer.Option(
        "--entropy-bound",
        help="Nats of entropy that the tokens accepted in a step may hold between them.",
        rich_help_panel=_DIFFUSION,
    ),
]
TMin = Annotated[
    float | None,
    typer.Option("--t-min", help="Temperature of the last step.", rich_help_panel=_DIFFUSION),
]
TMax = Annotated[
    float | None,
    typer.Option("--t-max", help="Temperature of the first step.", rich_help_panel=_DIFFUSION),
]
CanvasLength = Annotated[
    int | None,
    typer.Option("--canvas-length", help="Tokens drafted at a time.", rich_help_panel=_DIFFUSION),
]
Profile = Annotated[
    str | None,
    typer.Option(
        "--profile",
        show_default=DEFAULT_PROFILE,
        help=f"Speed against fidelity: {', '.join(PROFILES)}. 'exact' is the reference.",
        rich_help_panel=_DIFFUSION,
    ),
]
Sampler = Annotated[
    str | None,
    typer.Option("--sampler", help=f"One of: {', '.join(SAMPLERS)}.", rich_help_panel=_DIFFUSION),
]
AcceptThreshold = Annotated[
    float | None,
    typer.Option(
        "--accept-threshold",
        help="Probability from which confidence-threshold and block-refinement accept.",
        rich_help_panel=_DIFFUSION,
    ),
]
StabilityThreshold = Annotated[
    int | None,
    typer.Option(
        "--stability-threshold",
        help="How many previous steps must agree before a canvas is done.",
        rich_help_panel=_DIFFUSION,
    ),
]
ConfidenceThreshold = Annotated[
    float | None,
    typer.Option(
        "--confidence-threshold",
        help="Mean entropy in nats below which a canvas may be done.",
        rich_help_panel=_DIFFUSION,
    ),
]

Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        help="Text that ends the answer before it; may be given several times. What is thought "
        "ends nothing.",
        rich_help_panel=_DIFFUSION,
    ),
]

ExtraEosToken = Annotated[
    list[str] | None,
    typer.Option(
        "--extra-eos-token",
        help="Token that ends an answer too, as it is spelt or as its id; may be given several "
        "times.",
        rich_help_panel=_DIFFUSION,
    ),
]

# What a profile is made of, one by one.
StopAtEos = Annotated[
    bool | None,
    typer.Option(
        "--stop-at-eos/--no-stop-at-eos",
        help="Look no further than the first certain eos when deciding whether a canvas is done.",
        rich_help_panel=_SPEED,
    ),
]
EosCertainty = Annotated[
    float | None,
    typer.Option(
        "--eos-certainty",
        help="Nats of entropy below which --stop-at-eos takes an eos for certain.",
        rich_help_panel=_SPEED,
    ),
]
ShrinkCanvas = Annotated[
    bool | None,
    typer.Option(
        "--shrink-canvas/--no-shrink-canvas",
        help="Draft no more than --max-tokens leaves.",
        rich_help_panel=_SPEED,
    ),
]
SoftCutoff = Annotated[
    float | None,
    typer.Option(
        "--soft-cutoff",
        help="Leave tokens out of the self-conditioning that are e^-N times less likely than the "
        "likeliest.",
        rich_help_panel=_SPEED,
    ),
]
ConfidentAfter = Annotated[
    int | None,
    typer.Option(
        "--confident-after",
        help="Step from which confidence alone ends a canvas.",
        rich_help_panel=_SPEED,
    ),
]
SettledAfter = Annotated[
    int | None,
    typer.Option(
        "--settled-after",
        help="Steps after which a certain position is computed rarely (an experiment).",
        rich_help_panel=_SPEED,
    ),
]

# The output.
Watch = Annotated[
    bool,
    typer.Option(
        "--watch/--no-watch",
        help="Draw the canvas as it forms, where stdout is a terminal.",
        rich_help_panel=_OUTPUT,
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object instead of the text.", rich_help_panel=_OUTPUT
    ),
]
ShowThought = Annotated[
    bool,
    typer.Option(
        "--show-thought",
        help="Whole thoughts on a terminal, where one line of them is shown else.",
        rich_help_panel=_OUTPUT,
    ),
]
HideThought = Annotated[
    bool,
    typer.Option("--hide-thought", help="No thoughts on stderr.", rich_help_panel=_OUTPUT),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show tracebacks.", rich_help_panel=_OUTPUT),
]


def generation_settings(
    *,
    profile: str | None = None,
    seed: int | None,
    prefill_step_size: int | None,
    stop: list[str] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The keyword arguments of `stream_generate` that the user gave, checked before a model is
    loaded.

    Raises:
        UsageError: one of them is out of range.
    """
    if seed is not None and not 0 <= seed < 2**64:
        raise UsageError(f"--seed must be between 0 and 2^64 - 1, not {seed}.")
    if prefill_step_size is not None and prefill_step_size < 1:
        raise UsageError(f"--prefill-step-size must be at least 1, not {prefill_step_size}.")
    if stop and not all(stop):
        raise UsageError("--stop must be a text of at least one character.")
    given = {name: value for name, value in settings.items() if value is not None}
    _check({**profile_settings(profile or DEFAULT_PROFILE), **given})
    if profile is not None:
        given["profile"] = profile
    if seed is not None:
        given["seed"] = seed
    if prefill_step_size is not None:
        given["prefill_step_size"] = prefill_step_size
    if stop:
        given["stop"] = list(stop)
    return given


def prompt_settings(
    tools: list[str] | None,
    chat_template_config: str | None,
    **given: Any,
) -> dict[str, Any]:
    """The keyword arguments of `stream_generate` about the prompt, files read and JSON parsed;
    without those that were not given (None or False).

    Raises:
        UsageError: a file cannot be read, or one of them is no JSON of the right kind.
    """
    settings = {name: value for name, value in given.items() if value not in (None, False)}
    if tools:
        settings["tools"] = [tool for path in tools for tool in _tools_in(path)]
    if chat_template_config is not None:
        variables = _parsed(chat_template_config, "--chat-template-config")
        if not isinstance(variables, dict):
            raise UsageError('--chat-template-config must be a JSON object, like {"name": true}.')
        settings["chat_template_kwargs"] = variables
    return settings


def spaced(prompt: str | None) -> str | None:
    """A prompt from the command line with its `\\n` and `\\t` as what they stand for, as mlx-lm
    reads them."""
    return prompt and prompt.replace("\\n", "\n").replace("\\t", "\t")


def _tools_in(path: str) -> list[Any]:
    from mlx_diffgemma.editing.files import read_text
    from mlx_diffgemma.text.messages import checked_tools

    found = _parsed(read_text(path), path)
    try:
        return list(checked_tools(found if isinstance(found, list) else [found]))
    except UsageError as error:
        raise UsageError(f"--tools {path}: {error}") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{where} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}."
        ) from None


def check_thoughts(show: bool, hide: bool) -> None:
    """Refuse to show thoughts and hide them.

    Raises:
        UsageError: both are wanted.
    """
    if show and hide:
        raise UsageError("--show-thought and --hide-thought contradict each other: drop one.")


def _check(given: dict[str, Any]) -> None:
    """Let DiffusionConfig judge. Where only one end of the temperature is given, the other is the
    checkpoint's, not known yet: one that agrees stands in for it."""
    trial = dict(given)
    if "t_min" in given and "t_max" not in given:
        trial["t_max"] = max(given["t_min"], 1.0)
    elif "t_max" in given and "t_min" not in given:
        trial["t_min"] = 0.0
    DiffusionConfig().override(**trial)
