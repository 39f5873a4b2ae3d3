"""The settings and prompts of a request, checked against the model that is to answer it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.generate import reserved
from mlx_diffgemma.diffusion.profiles import profile_settings
from mlx_diffgemma.errors import PromptError, UsageError
from mlx_diffgemma.model.cache import PrefixCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.pictured import pictures_of
from mlx_diffgemma.reading import shown
from mlx_diffgemma.text.tokenizer import check_tokenizer, end_token_ids


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
    config = DiffusionConfig.from_dict(settings).override(
        **profile_settings(profile, model.identity)
    )
    config = replace(config, eos_token_ids=model.config.stated_end_ids)
    return config.override(**overrides)


def configured(
    model: DiffusionGemma,
    tokenizer: Any,
    profile: str,
    config: DiffusionConfig | None = None,
    **overrides: Any,
) -> DiffusionConfig:
    """The settings of one call: `config` where it is given, else `diffusion_config`, in either case
    with the overrides that are not None put over them. An answer also ends at the end tokens that
    the tokenizer has now (`tokenizer.add_eos_token` adds some), unless `eos_token_ids` are given.

    Raises:
        ConfigError: as for `diffusion_config`.
        UsageError: as for `diffusion_config`, or a canvas is as long as the context or longer.
    """
    check_tokenizer(tokenizer)
    if config is None:
        config = diffusion_config(model, profile, **overrides)
    elif not isinstance(config, DiffusionConfig):
        raise UsageError(f"config must be a DiffusionConfig, not {shown(config)}.")
    else:
        config = config.override(**overrides)
    canvas_length(model, config)
    if overrides.get("eos_token_ids") is not None:
        return config
    more = sorted(end_token_ids(tokenizer) - set(config.eos_token_ids))
    return replace(config, eos_token_ids=(*config.eos_token_ids, *more))


def canvas_length(model: DiffusionGemma, config: DiffusionConfig, of_which: str = "") -> int:
    """Tokens of a canvas, by these settings of `of_which`, or the model's own number.

    Raises:
        UsageError: they are as many as the context has positions, or more.
    """
    length = config.canvas_length or model.config.canvas_length
    context = model.config.text.max_position_embeddings
    if length >= context:
        raise UsageError(
            f"{of_which}canvas_length is {length}, and the model's context is {context}; lower it."
        )
    return length


def cache_of(model: DiffusionGemma, given: Any) -> PrefixCache:
    """The cache that is given, or a new one where None is.

    Raises:
        UsageError: what is given is no cache, is one of another model, or was filled before
            adapters were loaded.
    """
    cache = model.make_cache() if given is None else given
    if not isinstance(cache, PrefixCache):
        raise UsageError(f"prefix_cache must come from model.make_cache(), not be {shown(given)}.")
    cache.require_model(model)
    return cache


def denoiser_of(model: DiffusionGemma, given: Any) -> Denoiser:
    """The denoiser that is given, or a new one of the model where None is.

    Raises:
        UsageError: what is given is no denoiser, or one of another model.
    """
    denoiser = Denoiser(model) if given is None else given
    if not isinstance(denoiser, Denoiser) or denoiser.model is not model:
        raise UsageError(f"denoiser must be a Denoiser of the same model, not {shown(given)}.")
    return denoiser


def fit_to_context(
    model: DiffusionGemma,
    prompts: Sequence[Sequence[int]],
    config: DiffusionConfig | Sequence[DiffusionConfig],
    *,
    step_size: int | None = None,
    check_memory: bool = True,
) -> list[DiffusionConfig]:
    """Check prompts that are to be run together, with settings for all or for each, against the
    model; returns the settings of each, with an answer that ends where its context ends. Whether
    there is memory for them now is left open where `check_memory` is False.

    Raises:
        PromptError: a prompt is empty or too long, has ids outside the vocabulary or image tokens
            of no picture, or has pictures where the model has no vision tower.
        UsageError: a canvas is as long as the context or longer, or an id of the settings is
            outside the vocabulary.
        CheckpointError: a prompt has pictures, and the vision tower is damaged.
        MemoryShortageError: prefixes and a denoising step exceed what the machine offers.
    """
    context = model.config.text.max_position_embeddings
    own_length, last = model.config.canvas_length, model.config.text.vocab_size - 1
    shared = isinstance(config, DiffusionConfig)
    configs = [config] * len(prompts) if isinstance(config, DiffusionConfig) else config
    fitted, lengths = [], []
    for row, (ids, settings) in enumerate(zip(prompts, configs, strict=True)):
        name = "the prompt" if len(prompts) == 1 else f"prompt {row + 1}"
        of_which = "" if shared else f"{name}: "
        length = canvas_length(model, settings, of_which)
        pads = (settings.pad_token_id,)
        for setting, given in (("eos_token_ids", settings.eos_token_ids), ("pad_token_id", pads)):
            if max(given, default=0) > last:
                raise UsageError(
                    f"{of_which}{setting} has {max(given)}, and ids go from 0 to {last}; name one "
                    "of those."
                )
        _check_tokens(model, ids, name)
        canvases = (context - len(ids)) // length
        if canvases < 1:
            advice = "lower canvas_length" if length > own_length else "shorten the prompt"
            raise PromptError(
                f"{name} has {len(ids)} tokens and the model's context is {context}, of which a "
                f"canvas takes {length}; {advice}."
            )
        fitted.append(replace(settings, max_tokens=min(settings.max_tokens, canvases * length)))
        lengths.append(length)
    if not check_memory:
        return fitted
    pictures = [span for ids in prompts for span in pictures_of(ids)]
    sizes = [0 if span.patches is None else len(span.patches) for span in pictures]
    estimate = memory.estimate(
        model.config.text,
        0,
        canvas_length=max(lengths),
        sequences=[
            (len(ids), reserved(model, each)) for ids, each in zip(prompts, fitted, strict=True)
        ],
        activation_bytes=model.dtype.size,
        step_size=step_size or model.prefill_step_size,
        vision=model.config.vision if sizes else None,
        patches=max(sizes, default=0),
    )
    longest = max(map(len, prompts))
    what = f"a prompt of {longest} tokens"
    if len(prompts) > 1:
        what = f"a batch of {len(prompts)} prompts of up to {longest} tokens"
    mend = "lower canvas_length, or shorten the prompt" if max(lengths) > own_length else None
    memory.require(estimate, what, mend=mend)
    return fitted


def _check_tokens(model: DiffusionGemma, ids: Sequence[int], name: str) -> None:
    config, pictures = model.config, pictures_of(ids)
    vocab = config.text.vocab_size
    if not ids:
        raise PromptError(f"{name} is empty; give some text or token ids.")
    inside = {place for span in pictures for place in range(span.start, span.stop)}
    for place, token in enumerate(ids):
        if not 0 <= token < vocab:
            raise PromptError(
                f"{name}: token {place} is {shown(token)}; ids go from 0 to {vocab - 1}."
            )
        if (token == config.image_token_id) != (place in inside):
            raise PromptError(
                f"{name}: token {place} ({token}) stands for a picture, and none belongs to it; "
                "give pictures as parts of messages, or take it out."
            )
    if pictures:
        model.require_vision()
