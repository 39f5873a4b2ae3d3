"""The rooms joined: a prompt in, text out, with every denoising step in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_diffgemma.checkpoint import adapters, loading, locate, memory
from mlx_diffgemma.checks import check_callable, check_flag, check_integer
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.encode import ends_of_turns
from mlx_diffgemma.diffusion.events import (
    CanvasCommitted,
    DenoisingStep,
    PrefillProgress,
)
from mlx_diffgemma.diffusion.generate import cut, generate_canvases, reserved
from mlx_diffgemma.diffusion.noise import checked_seed, seeded
from mlx_diffgemma.diffusion.profiles import DEFAULT as DEFAULT_PROFILE
from mlx_diffgemma.diffusion.profiles import profile_settings
from mlx_diffgemma.errors import PromptError, UsageError
from mlx_diffgemma.model.cache import MARK_BYTES, PrefixCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.reading import shown
from mlx_diffgemma.text.answer import Answer, stop_strings
from mlx_diffgemma.text.parts import EndReason, Parts
from mlx_diffgemma.text.prompt import Encoded, Prompt, Tools, encode, rows_of
from mlx_diffgemma.text.tokenizer import check_tokenizer, end_token_ids
from mlx_diffgemma.text.tool_calls import ToolCall

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


_SHARE_OF_MARKS = 8  # of what memory is left, one part in so many for places to come back to


@dataclass(frozen=True)
class GenerationResponse:
    """One moment of a generation: mlx-lm's fields, then those of text diffusion.

    A response comes after every denoising step (`text` is empty then: nothing is committed) and
    after every committed canvas (`text` is what the canvas added). The last one has a
    `finish_reason`. Where the answer's beginning was given (`prefill_response`), the first response
    has it as its `text`, before any step.

    Attributes:
        text: text committed since the previous response; never half a character. What was thought
            and the calls of tools are no part of it.
        token: the last token committed, or None.
        tokens: all tokens committed so far, those of thoughts and calls included; cut where a stop
            string cuts the text.
        prompt_tokens: tokens of the prompt.
        prompt_tps: prompt tokens encoded per second.
        generation_tokens: tokens committed so far.
        generation_tps: tokens committed per second of generation so far.
        peak_memory: most memory that this process has held so far, in GB (1e9 bytes).
        finish_reason: "stop" (an eos or a stop string), "length", or "tool_calls" (the model
            stopped and waits for results), on the last response only.
        thought: what was thought and committed since the previous response.
        tool_calls: the calls completed since the previous response, as mlx-lm's server streams
            them; joined over all responses they are all calls.
        failed_calls: the calls since the previous response that are malformed or cut off, with
            their raw text and what is wrong with them.
        draft: the text of the canvas as it stands, or "" where nothing is drafted.
        draft_thought: what is thought on the canvas as it stands, or "".
        canvas: token ids of the draft, [C]; fewer where a stop string cuts it.
        entropy: nats of uncertainty of each draft token, as many as there are in `canvas`.
        probability: of each draft token, likewise, at the temperature of the step.
        step: denoising steps run on this canvas, from 1.
        canvas_index: which canvas of the answer, from 0.
        denoising_steps: steps of each canvas so far, the current one included.
        tokens_per_forward: tokens committed per denoising step so far.
        stop_token: the eos that ended the answer, on the last response; None where none did.
        stop_string: the stop string that ended the answer, on the last response, or None.
        converged: whether every canvas committed so far was done before its steps were used up.
        context_full: whether the answer was cut because the model's context ends there, and not by
            `max_tokens`; on the last response.
        parts: the parts of the answer before this canvas; `parts.pieces(canvas)` says what each
            token of the draft is part of.
        seed: the seed of every random draw of this run.
    """

    text: str
    token: int | None
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: EndReason | None = None
    thought: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    failed_calls: tuple[ToolCall, ...] = ()
    draft: str = ""
    draft_thought: str = ""
    canvas: list[int] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    probability: list[float] = field(default_factory=list)
    tokens: tuple[int, ...] = ()
    step: int = 0
    canvas_index: int = 0
    denoising_steps: tuple[int, ...] = ()
    tokens_per_forward: float = 0.0
    stop_token: int | None = None
    stop_string: str | None = None
    converged: bool = True
    context_full: bool = False
    parts: Parts | None = field(default=None, repr=False, compare=False)
    seed: int = 0


def load(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    lazy: bool = False,
    adapter_path: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    check: bool = False,
) -> tuple[DiffusionGemma, TokenizerWrapper]:
    """Load a model and its tokenizer, as `mlx_lm.load` does.

    Args:
        path_or_repo: a folder, a Hugging Face repository, or "demo".
        lazy: leave the weights on disk until they are used.
        adapter_path: a folder with adapters that training wrote.
        chat_template: a Jinja template, or a file that holds one, in place of the checkpoint's.
        check: look for NaN and infinity in every weight.

    Raises:
        CheckpointError, ConfigError, MemoryShortageError: each in one line.
    """
    from mlx_diffgemma.text.tokenizer import load_tokenizer

    path = locate.locate(path_or_repo, revision)
    model, _ = loading.load_model(path, lazy=lazy, check=check, name=str(path_or_repo))
    if adapter_path is not None:
        adapters.load_adapters(model, adapter_path)
        if not lazy:  # what another thread finds unevaluated belongs to a stream that it lacks
            mx.eval(model.parameters())
    tokenizer = load_tokenizer(
        path,
        eos_token_ids=list(diffusion_config(model).eos_token_ids),
        chat_template=chat_template,
        trust_remote_code=trust_remote_code,
    )
    ends = model.config.end_token_ids(tokenizer.eos_token_ids)
    model.config = replace(model.config, eos_token_ids=ends)
    return model, tokenizer


def diffusion_config(
    model: DiffusionGemma, profile: str = "exact", **overrides: Any
) -> DiffusionConfig:
    """The denoising settings that the checkpoint ships, with those of a profile (see
    `mlx_diffgemma.diffusion.profiles`) and those given replaced.

    Raises:
        ConfigError: the checkpoint's settings are damaged.
        UsageError: the profile or an override is unknown, or a value is out of range.
    """
    if not isinstance(getattr(model, "config", None), ModelConfig):
        raise UsageError(f"model must be what `load` returns, not {shown(model)}.")
    settings: Mapping[str, Any] = model.config.raw.get("generation_config") or {}
    config = DiffusionConfig.from_dict(settings).override(**profile_settings(profile))
    config = config.override(**overrides)
    if not config.eos_token_ids:
        config = replace(config, eos_token_ids=model.config.eos_token_ids)
    return config


def configured(
    model: DiffusionGemma,
    tokenizer: Any,
    profile: str,
    config: DiffusionConfig | None = None,
    **overrides: Any,
) -> DiffusionConfig:
    """The settings of one call: `config` where it is given, else `diffusion_config`, in either case
    with the overrides that are not None put over them. An answer also ends at what the tokenizer
    takes for an end by now (`tokenizer.add_eos_token`), unless `eos_token_ids` are given.

    Raises:
        ConfigError, UsageError: as for `diffusion_config`.
    """
    check_tokenizer(tokenizer)
    if config is None:
        config = diffusion_config(model, profile, **overrides)
    elif not isinstance(config, DiffusionConfig):
        raise UsageError(f"config must be a DiffusionConfig, not {shown(config)}.")
    else:
        config = config.override(**overrides)
    if overrides.get("eos_token_ids") is not None:
        return config
    more = sorted(end_token_ids(tokenizer) - set(config.eos_token_ids))
    return replace(config, eos_token_ids=(*config.eos_token_ids, *more))


def cache_of(model: DiffusionGemma, given: Any) -> PrefixCache:
    """The cache that is given, or a new one.

    Raises:
        UsageError: it is none, or one of another model.
    """
    cache = model.make_cache() if given is None else given
    if not isinstance(cache, PrefixCache):
        raise UsageError(f"prefix_cache must come from model.make_cache(), not be {shown(given)}.")
    cache.require_model(model)
    return cache


def denoiser_of(model: DiffusionGemma, given: Any) -> Denoiser:
    """The denoiser that is given, or the model's own.

    Raises:
        UsageError: it is none, or one of another model.
    """
    denoiser = Denoiser(model) if given is None else given
    if not isinstance(denoiser, Denoiser) or denoiser.model is not model:
        raise UsageError(f"denoiser must be a Denoiser of the same model, not {shown(given)}.")
    return denoiser


def generate(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    max_tokens: int | None = None,
    *,
    verbose: bool = False,
    **options: Any,
) -> str:
    """The whole text of the answer at once, without thoughts and calls of tools; `verbose` also
    prints it as it is committed. Other arguments are those of `stream_generate`."""
    text = ""
    for response in stream_generate(model, tokenizer, prompt, max_tokens, draft=False, **options):
        text += response.text
        if verbose:
            print(response.text, end="" if response.finish_reason is None else "\n", flush=True)
    return text


def stream_generate(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    prompt: Prompt | Encoded,
    max_tokens: int | None = None,
    *,
    seed: int | None = None,
    initial_canvas: Sequence[int] | None = None,
    system_prompt: str | None = None,
    raw: bool = False,
    markers: bool = False,
    thinking: bool | None = None,
    tools: Tools | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    prefill_response: str | None = None,
    prefix_cache: PrefixCache | None = None,
    prefill_step_size: int | None = None,
    denoiser: Denoiser | None = None,
    profile: str = DEFAULT_PROFILE,
    config: DiffusionConfig | None = None,
    draft: bool = True,
    stop: str | Sequence[str] | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Iterator[GenerationResponse]:
    """Generate, yielding after each denoising step, before the next one starts.

    Args:
        prompt: text, messages (`{"role": ..., "content": ...}`), or token ids in a list, a tuple,
            an array or a `BatchEncoding`; or what `mlx_diffgemma.text.prompt.encode` made of one.
        max_tokens: most tokens to generate; None takes the checkpoint's setting.
        seed: makes the run repeatable on one machine; None draws a fresh one (see the responses).
        initial_canvas: token ids [C] that the first canvas starts from instead of noise.
        raw: no chat template.
        markers: control tokens that a raw prompt spells are control tokens, not text.
        thinking: turn thinking on or off, where the chat template knows it.
        tools: what the model may call: Python functions with type hints and a docstring, or
            objects that describe them. Calls come back as `tool_calls`, and results go in as
            messages.
        chat_template_kwargs: variables for the chat template.
        prefill_response: the text that the model's turn begins with; it is part of the answer.
        prefix_cache: a cache from `model.make_cache()` to use from one call to the next: what a
            prompt has in common with the previous one is not encoded again. One call at a time.
        denoiser: what runs the passes, such as one that steps the canvases of several calls
            together; None takes the model's own.
        profile: "exact" is the reference, token for token; others trade fidelity for speed.
        draft: also decode the draft of every step into text.
        stop: texts that end the answer; it is cut before the first that its text completes. What
            is thought, stands in a call or was given as the answer's beginning ends nothing.
        on_prefill: called with (positions done, positions in all) while the prompt is encoded.
        config: all settings of the denoising, as `diffusion_config` gives them, in place of the
            checkpoint's and the profile's.
        settings: fields of `DiffusionConfig` to put over them, such as `max_denoising_steps`.

    Raises:
        UsageError, PromptError: a setting or the prompt is out of range.
        MemoryShortageError: the prompt does not fit.
        NumericalError: the model returned NaN; the step is named.
    """
    config = configured(model, tokenizer, profile, config, max_tokens=max_tokens, **settings)
    if prefill_step_size is not None:
        check_integer("prefill_step_size", prefill_step_size, 1)
    seed, stops = checked_seed(seed), stop_strings(stop)
    cache, denoiser = cache_of(model, prefix_cache), denoiser_of(model, denoiser)
    if initial_canvas is not None and not hasattr(initial_canvas, "__len__"):
        raise UsageError(f"initial_canvas must be token ids, not {shown(initial_canvas)}.")
    check_flag("draft", draft)
    check_callable("on_prefill", on_prefill)
    if isinstance(prompt, Encoded):
        encoded = prompt
    else:
        encoded = encode(
            tokenizer,
            prompt,
            raw=raw,
            markers=markers,
            system_prompt=system_prompt,
            thinking=thinking,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            prefill_response=prefill_response,
        )
    wanted = config.max_tokens
    (config,) = fit_to_context(model, [encoded.ids], config, step_size=prefill_step_size)
    return _stream(
        model,
        Answer(tokenizer, stop=stops, thinking=encoded.thinking, prompt=encoded.ids),
        encoded,
        config,
        seed=seed,
        initial_canvas=None if initial_canvas is None else [list(initial_canvas)],
        cache=cache,
        denoiser=denoiser,
        step_size=prefill_step_size,
        draft=draft,
        fills_context=config.max_tokens < wanted,
        on_prefill=on_prefill or (lambda done, total: None),
    )


def fit_to_context(
    model: DiffusionGemma,
    prompts: Sequence[Sequence[int]],
    config: DiffusionConfig,
    *,
    step_size: int | None = None,
) -> list[DiffusionConfig]:
    """Check prompts that are to be run together against the model; returns the settings of each,
    with an answer that ends where its context ends.

    Raises:
        PromptError: empty, outside the vocabulary, with image tokens, or too long.
        UsageError: the canvas is longer than the context.
        MemoryShortageError: prefixes and a denoising step exceed what the machine offers.
    """
    context = model.config.text.max_position_embeddings
    length = config.canvas_length or model.config.canvas_length
    if length >= context:
        raise UsageError(f"canvas_length is {length}, and the model's context is {context}.")
    last = model.config.text.vocab_size - 1
    pads = (config.pad_token_id,)
    for setting, given in (("eos_token_ids", config.eos_token_ids), ("pad_token_id", pads)):
        if max(given, default=0) > last:
            raise UsageError(f"{setting} has {max(given)}; ids go to {last}.")
    long_canvas = length > model.config.canvas_length
    configs = []
    for row, ids in enumerate(prompts):
        name = "the prompt" if len(prompts) == 1 else f"prompt {row + 1}"
        _check_tokens(model, ids, name)
        canvases = (context - len(ids)) // length
        if canvases < 1:
            raise PromptError(
                f"{name} has {len(ids)} tokens and the model's context is {context}, of which a "
                f"canvas takes {length}; "
                + ("lower canvas_length." if long_canvas else "shorten the prompt.")
            )
        configs.append(replace(config, max_tokens=min(config.max_tokens, canvases * length)))
    estimate = memory.estimate(
        model.config.text,
        0,
        canvas_length=length,
        sequences=[
            (len(ids), reserved(model, each)) for ids, each in zip(prompts, configs, strict=True)
        ],
        activation_bytes=model.dtype.size,
        step_size=step_size or model.prefill_step_size,
    )
    longest = max(map(len, prompts))
    what = f"a prompt of {longest} tokens"
    if len(prompts) > 1:
        what = f"a batch of {len(prompts)} prompts of up to {longest} tokens"
    mend = "lower canvas_length, or shorten the prompt" if long_canvas else None
    memory.require(estimate, what, mend=mend)
    return configs


def _check_tokens(model: DiffusionGemma, ids: Sequence[int], name: str) -> None:
    vocab, images = model.config.text.vocab_size, set(model.config.image_token_ids)
    if not ids:
        raise PromptError(f"{name} is empty; give some text or token ids.")
    for place, token in enumerate(ids):
        if not 0 <= token < vocab:
            raise PromptError(
                f"{name}: token {place} is {shown(token)}; ids go from 0 to {vocab - 1}."
            )
        if token in images:
            raise PromptError(
                f"{name}: token {place} ({token}) stands for an image; images are not supported "
                "yet, take it out."
            )


def _stream(
    model: DiffusionGemma,
    answer: Answer,
    prompt: Encoded,
    config: DiffusionConfig,
    *,
    seed: int,
    initial_canvas: list[list[int]] | None,
    cache: PrefixCache,
    denoiser: Denoiser,
    step_size: int | None,
    draft: bool,
    fills_context: bool,
    on_prefill: Callable[[int, int], None],
) -> Iterator[GenerationResponse]:
    ids = prompt.ids
    clock = _Clock(prompt_tokens=len(ids), seed=seed)
    available = memory.available_memory()
    if available is not None:
        cache.mark_bytes = min(MARK_BYTES, available // _SHARE_OF_MARKS)
    with cache.in_use(), memory.wired():
        events = generate_canvases(
            model,
            [ids],
            config,
            seeded(seed),
            caches=[cache],
            denoiser=denoiser,
            initial_canvas=initial_canvas,
            prefill_step_size=step_size,
            ends=lambda _, gained: answer.would_stop(gained),
            marks=[ends_of_turns(ids, config.eos_token_ids)],
        )
        steps: list[int] = []
        committed: list[int] = []
        kept = 0  # how many of them are part of the answer
        parts = answer.parts()
        for event in events:
            if isinstance(event, PrefillProgress):
                on_prefill(event.done, event.total)
                if event.done == event.total:
                    clock.prompt_is_encoded(event.total)
                    if prompt.prefill:
                        yield clock.response([], [], text=prompt.prefill)
            elif isinstance(event, DenoisingStep):
                canvas = event.canvas
                steps[canvas.index :] = [canvas.passes]
                standing, entropy = canvas.draft.tolist(), canvas.entropy.tolist()
                probability = canvas.probability.tolist()
                room = config.max_tokens - len(committed)
                said = None
                if draft or answer.stops:
                    said = answer.peek(cut(standing, config.eos_token_ids, room)[0])
                    if said.stop_string is not None:
                        end = max(0, said.tokens - len(committed))
                        standing, entropy = standing[:end], entropy[:end]
                        probability = probability[:end]
                yield clock.response(
                    committed[:kept],
                    steps,
                    draft=said.text if said and draft else "",
                    draft_thought=said.thought if said and draft else "",
                    canvas=standing,
                    entropy=entropy,
                    probability=probability,
                    step=canvas.passes,
                    canvas_index=canvas.index,
                    parts=parts,
                )
            elif isinstance(event, CanvasCommitted):
                committed += event.tokens
                said = answer.add(event.tokens, event.finish_reason, event.stop_token)
                kept, parts = said.tokens, answer.parts()
                ended = said.end.reason if said.end else None
                clock.converged &= event.converged
                yield clock.response(
                    committed[:kept],
                    steps,
                    text=said.text,
                    thought=said.thought,
                    tool_calls=said.tool_calls,
                    failed_calls=said.failed_calls,
                    finish_reason=ended,
                    context_full=fills_context and ended == "length",
                    parts=parts,
                    stop_token=said.end.token if said.end else None,
                    stop_string=said.stop_string,
                    canvas_index=event.canvas_index,
                )


class _Clock:
    """Turns the progress of one generation into responses with its speeds."""

    def __init__(self, prompt_tokens: int, seed: int) -> None:
        self.prompt_tokens, self.seed = prompt_tokens, seed
        self.start = time.perf_counter()
        self.prompt_seconds = 0.0
        self.encoded = 0
        self.converged = True

    def prompt_is_encoded(self, positions: int) -> None:
        self.prompt_seconds, self.encoded = time.perf_counter() - self.start, positions

    def response(
        self, tokens: Sequence[int], steps: Sequence[int], *, text: str = "", **now: Any
    ) -> GenerationResponse:
        seconds = time.perf_counter() - self.start - self.prompt_seconds
        return GenerationResponse(
            text=text,
            token=tokens[-1] if tokens else None,
            tokens=tuple(tokens),
            prompt_tokens=self.prompt_tokens,
            prompt_tps=self.encoded / self.prompt_seconds if self.prompt_seconds else 0.0,
            generation_tokens=len(tokens),
            generation_tps=len(tokens) / seconds if seconds else 0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
            denoising_steps=tuple(steps),
            tokens_per_forward=len(tokens) / sum(steps) if steps else 0.0,
            converged=self.converged,
            seed=self.seed,
            **now,
        )


def batch_generate(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt] | Any,
    max_tokens: int | None = None,
    *,
    seed: int | None = None,
    system_prompt: str | None = None,
    raw: bool = False,
    markers: bool = False,
    thinking: bool | None = None,
    tools: Tools | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    prefill_response: str | None = None,
    profile: str = DEFAULT_PROFILE,
    config: DiffusionConfig | None = None,
    stop: str | Sequence[str] | None = None,
    **settings: Any,
) -> list[str]:
    """Answer several prompts at once, each as it would be answered alone by the sequence of its
    number; arguments as for `stream_generate`."""
    rows = rows_of(prompts)
    if not rows:
        return []
    config = configured(model, tokenizer, profile, config, max_tokens=max_tokens, **settings)
    seed, stops = checked_seed(seed), stop_strings(stop)
    encoded = [
        encode(
            tokenizer,
            prompt,
            raw=raw,
            markers=markers,
            system_prompt=system_prompt,
            thinking=thinking,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            prefill_response=prefill_response,
        )
        for prompt in rows
    ]
    ids = [each.ids for each in encoded]
    configs = fit_to_context(model, ids, config)
    answers = [
        Answer(tokenizer, stop=stops, thinking=each.thinking, prompt=each.ids) for each in encoded
    ]
    texts = [each.prefill for each in encoded]
    with memory.wired():
        for event in generate_canvases(
            model,
            ids,
            configs,
            seeded(seed),
            ends=lambda row, gained: answers[row].would_stop(gained),
        ):
            if isinstance(event, CanvasCommitted):
                said = answers[event.row].add(event.tokens, event.finish_reason, event.stop_token)
                texts[event.row] += said.text
    return texts
