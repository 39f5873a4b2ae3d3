"""What is asked, checked and encoded before a request takes its place at the engine."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.noise import checked_seed
from mlx_diffgemma.diffusion.profiles import DEFAULT as DEFAULT_PROFILE
from mlx_diffgemma.editing.edit import candidate_lengths
from mlx_diffgemma.editing.infill import LENGTHS
from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma.fitting import canvas_length, configured, fit_to_context
from mlx_diffgemma.server.engine import Engine
from mlx_diffgemma.server.pieces import Asked
from mlx_diffgemma.server.refusals import RefusedError
from mlx_diffgemma.text.answer import stop_strings
from mlx_diffgemma.text.chat_template import template_text
from mlx_diffgemma.text.control_tokens import control_tokens_of
from mlx_diffgemma.text.messages import checked_tools
from mlx_diffgemma.text.parts import markers_of
from mlx_diffgemma.text.prompt import Encoded, encode
from mlx_diffgemma.text.tokenizer import hf_tokenizer

MOST_ANSWERS = 128
_LONGER = (48, 64, 96, 128, 192)  # further lengths of a gap, where `max_tokens` allows them
_MORE_NAMES = {
    "additionalProperties", "allOf", "anyOf", "dependencies", "dependentRequired",
    "dependentSchemas", "else", "if", "minProperties", "oneOf", "patternProperties",
    "propertyNames", "then", "unevaluatedProperties",
}  # fmt: skip
"""Keywords of a schema by which an object may or must hold names that are not among its
properties."""
_COLDEST = 1e-4  # the least `t_max` of `DiffusionConfig`


@dataclass(frozen=True)
class Prepared:
    """One request, ready for the engine.

    Attributes:
        asked: what was asked.
        encoded: the prompt.
        config: how to denoise.
        seed: that of the first answer.
        names: JSON schemas of the arguments of the functions of which one must be called, by name;
            empty where none must be called.
        pinned: the tokens that a call begins with, before the function's name.
        lengths: numbers of tokens that a gap may take; empty where no gap is to be filled.
    """

    asked: Asked
    encoded: Encoded
    config: DiffusionConfig
    seed: int
    names: Mapping[str, Mapping[str, Any]]
    pinned: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()


_tokenizers: WeakKeyDictionary[Engine, Any] = WeakKeyDictionary()


def tokenizer_of(engine: Engine) -> Any:
    """A tokenizer like the engine's for the threads of clients, to be used under
    `engine.tokenizing`. It is a copy: whether a Hugging Face tokenizer takes the spelling of a
    control token for one is a state of it that changes from call to call, and the engine's thread
    must not see it change in between."""
    own = _tokenizers.get(engine)
    if own is None:
        own = copy.copy(engine.tokenizer)
        own._tokenizer = copy.deepcopy(hf_tokenizer(engine.tokenizer))
        _tokenizers[engine] = own
    return own


def count(engine: Engine, asked: Asked) -> int:
    """Number of tokens of a prompt.

    Raises:
        UsageError, PromptError, RefusedError: the prompt is malformed or cannot be rendered.
    """
    with engine.tokenizing:
        return len(_encoded(engine, asked).ids)


def prepare(engine: Engine, asked: Asked) -> Prepared:
    """Check and encode a request. It takes time, so it is no work for an event loop.

    Raises:
        UsageError, PromptError, RefusedError: what is asked contradicts itself or cannot be done.
    """
    _check(asked)
    with engine.tokenizing:
        encoded = _encoded(engine, asked)
        pinned = _call_marker(tokenizer_of(engine)) if _must_call(asked) else ()
        config = configured(
            engine.model,
            tokenizer_of(engine),
            asked.profile or DEFAULT_PROFILE,
            max_tokens=asked.max_tokens or engine.context,
            **asked.settings,
        )
    config = at_temperature(config, asked.temperature)
    # The engine judges memory: what does not fit beside others now may wait until they are done.
    fit_to_context(engine.model, [encoded.ids], config, check_memory=False)
    return Prepared(
        asked,
        encoded,
        config,
        checked_seed(asked.seed),
        _functions(asked) if _must_call(asked) else {},
        pinned,
        _lengths(engine, config, asked) if asked.suffix is not None else (),
    )


def at_temperature(config: DiffusionConfig, factor: float | None) -> DiffusionConfig:
    """The settings at a client's temperature, which is a factor of both ends of the schedule. A
    factor of 0 changes only the draws: with a temperature of 0, the sampler would take every token
    for certain and accept its first guess."""
    if factor is None or factor == 1:
        return config
    if factor == 0:
        return config.override(draw_likeliest=True)
    return config.override(t_min=config.t_min * factor, t_max=max(_COLDEST, config.t_max * factor))


def _check(asked: Asked) -> None:
    if (asked.messages is None) == (asked.prompt is None):
        raise UsageError("give either messages or a prompt.")
    if not 1 <= asked.n <= MOST_ANSWERS:
        raise RefusedError(400, f"n must be from 1 to {MOST_ANSWERS}, not {asked.n}.", "n")
    if asked.temperature is not None and not 0 <= asked.temperature <= 100:
        raise RefusedError(
            400, f"temperature must be from 0 to 100, not {asked.temperature:g}.", "temperature"
        )
    stop_strings(asked.stop)
    forms = (asked.json_schema not in (None, False), asked.regex, asked.suffix is not None)
    if sum(map(bool, forms)) + _must_call(asked) > 1:
        raise UsageError(
            "an answer has one form: a JSON schema, a regular expression, a call of a tool, or a "
            "text with a suffix; leave out the others."
        )
    if any(forms[:2]) and asked.tools and asked.tool_choice != "none":
        raise UsageError(
            "tools may be called or the answer has a form, not both; set tool_choice to 'none', or "
            "leave out the form."
        )
    if asked.prefill is not None and (any(forms) or _must_call(asked)):
        raise UsageError("the beginning of an answer is given, and its form as well; drop one.")
    if asked.suffix is not None and not isinstance(asked.prompt, str):
        raise UsageError("a suffix goes with a prompt that is a text.")
    if _must_call(asked):
        functions = _functions(asked)
        if not asked.tools:
            raise RefusedError(400, "a call is required and no tools are given.", "tools")
        if asked.tool_choice not in ("required", *functions):
            raise RefusedError(
                400, f"tool_choice names '{asked.tool_choice:.60}', which is none of the tools.",
                "tool_choice",
            )  # fmt: skip


def _must_call(asked: Asked) -> bool:
    return asked.tool_choice not in (None, "auto", "none")


def _functions(asked: Asked) -> dict[str, Mapping[str, Any]]:
    """The JSON schemas of the arguments of the functions that may be called, by name."""
    found: dict[str, Mapping[str, Any]] = {}
    for tool in checked_tools(asked.tools or []):
        function = tool["function"]
        if asked.tool_choice in ("required", function["name"]):
            found[function["name"]] = arguments_schema(function.get("parameters") or {})
    return found


def arguments_schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of the arguments of a call that must be made: an object that holds no names
    but those of the function's `parameters`, unless these say that there may be others."""
    if "$ref" in parameters:
        return dict(parameters)
    schema = {"properties": {}, **parameters, "type": "object"}
    properties, required = schema["properties"], schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return schema
    known = all(isinstance(name, str) and name in properties for name in required)
    if known and not _MORE_NAMES.intersection(schema):
        schema["additionalProperties"] = False
    return schema


def _encoded(engine: Engine, asked: Asked) -> Encoded:
    try:
        return _encode(engine, asked)
    except (CheckpointError, RecursionError) as error:
        # The template cannot render this request, so the request is to blame.
        why = "it is nested too deep." if isinstance(error, RecursionError) else str(error)
        raise RefusedError(400, f"this request cannot be rendered: {why}") from None


def _encode(engine: Engine, asked: Asked) -> Encoded:
    tokenizer = tokenizer_of(engine)
    if asked.prompt is not None:
        if asked.suffix is not None:
            told = asked.instruction or f"{asked.prompt}{asked.suffix}"
            return encode(tokenizer, told or " ", raw=True)
        return encode(tokenizer, asked.prompt, raw=isinstance(asked.prompt, str))
    template = template_text(hf_tokenizer(tokenizer), tools=bool(asked.tools))
    thinks = asked.thinking or "enable_thinking" in template
    # Where no tool may be called, the model is told of none.
    return encode(
        tokenizer,
        asked.messages,
        system_prompt=asked.system,
        thinking=asked.thinking if thinks else None,
        tools=None if asked.tool_choice == "none" else asked.tools,
        chat_template_kwargs=asked.chat_template_kwargs,
        prefill_response=asked.prefill,
        config=engine.model.config,
    )


def _call_marker(tokenizer: Any) -> tuple[int, ...]:
    """The tokens before the name in a call, as this model writes it."""
    marker = markers_of(tokenizer).call
    if marker is None or marker < 0:
        raise UsageError("this model has no marker for calls of tools, so none can be required.")
    named = hf_tokenizer(tokenizer).encode("call:", add_special_tokens=False)
    return (marker, *named)


def _lengths(engine: Engine, config: DiffusionConfig, asked: Asked) -> tuple[int, ...]:
    """The numbers of tokens that a gap may take."""
    canvas = canvas_length(engine.model, config)
    if asked.present is not None:
        room = canvas - 2
        with engine.tokenizing:
            controls = control_tokens_of(hf_tokenizer(tokenizer_of(engine)))
            present = len(controls.encode_text(asked.present)) if asked.present else 0
        if present > room:
            raise UsageError(
                f"the text to be replaced has {present} tokens, and a canvas holds {room}; give "
                "less of it."
            )
        return tuple(candidate_lengths(present, 1.0, canvas))
    # A token on each side may grow into the gap, and the answer's end takes a place too.
    room = min(canvas - 3, asked.max_tokens or max(LENGTHS))
    known = [length for length in (*LENGTHS, *_LONGER) if length < room]
    return (*known, max(1, room))
