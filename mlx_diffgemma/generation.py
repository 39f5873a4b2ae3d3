"""Loading a model, and generating with it: a prompt in, text out, every denoising step between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_diffgemma.checkpoint import adapters, loading, locate, memory
from mlx_diffgemma.checks import check_callable, check_flag, check_integer, check_share
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.encode import ends_of_turns
from mlx_diffgemma.diffusion.events import (
    CanvasCommitted,
    DenoisingStep,
    PrefillProgress,
)
from mlx_diffgemma.diffusion.generate import cut, generate_canvases
from mlx_diffgemma.diffusion.noise import checked_seed, seeded
from mlx_diffgemma.diffusion.profiles import DEFAULT as DEFAULT_PROFILE
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.fitting import (
    cache_of,
    configured,
    denoiser_of,
    fit_to_context,
)
from mlx_diffgemma.generation_response import Clock, GenerationResponse
from mlx_diffgemma.model.cache import MARK_BYTES, PrefixCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.reading import shown
from mlx_diffgemma.text.answer import Answer, stop_strings
from mlx_diffgemma.text.prompt import Encoded, Prompt, encode
from mlx_diffgemma.text.prompt_settings import PromptSettings, parted

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_diffgemma.distributed.group import Ranks


_SHARE_OF_MARKS = 8  # marks of a prefix take at most one part in so many of the memory left


def load(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    lazy: bool = False,
    adapter_path: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    check: bool = False,
    vision: bool | None = None,
    parallel: str | None = None,
    weights: str | None = None,
    ranks: Ranks | None = None,
) -> tuple[DiffusionGemma, TokenizerWrapper]:
    """Load a model and its tokenizer, as `mlx_lm.load` does.

    Args:
        path_or_repo: a folder, a Hugging Face repository, "demo" or "demo-image".
        revision: a branch, tag or commit of the repository; None takes its main branch.
        lazy: leave the weights on disk until they are used.
        adapter_path: a folder with adapters that training wrote.
        chat_template: a Jinja template, or a file that holds one, in place of the checkpoint's.
        trust_remote_code: allow the tokenizer to run code that the repository holds.
        check: look for NaN and infinity in every weight.
        vision: whether to load the vision tower. None loads it when the first picture comes, and
            False refuses pictures.
        parallel: how the model is split among the processes that `mlx.launch` started: "tensor",
            "experts", "pipeline" or "auto". None loads the whole model, unless `ranks` are given.
            Rank 0 returns; on the others this call computes what rank 0 asks for, and exits.
        weights: how much of the model each process takes, such as "2,1"; None gives all the same.
        ranks: the processes, where they have joined already.

    Returns:
        The model, ready to run on the default device, and mlx-lm's wrapper of its tokenizer.

    Raises:
        UsageError: an argument is of another type.
        CheckpointError, ConfigError: the checkpoint cannot be found, or is incomplete, damaged or
            of another kind.
        MemoryShortageError: the model does not fit into memory.
    """
    from mlx_diffgemma.text.tokenizer import load_tokenizer

    if ranks is not None or parallel is not None or weights is not None:
        from mlx_diffgemma.checkpoint.sparse import locate_sparse
        from mlx_diffgemma.distributed.opening import load_together

        if adapter_path is not None:
            raise UsageError(
                "adapters cannot be put onto a model that several Macs share; make one checkpoint "
                "of both with `mlx-diffgemma fuse`."
            )
        if lazy:
            raise UsageError("lazy=True does not go with several processes; leave it out.")
        path = locate_sparse(path_or_repo, revision)
        model = load_together(
            path,
            ranks,
            parallel=parallel,
            weights=weights,
            check=check,
            name=str(path_or_repo),
            vision=vision,
        )
    else:
        path = locate.locate(path_or_repo, revision)
        model, _ = loading.load_model(
            path, lazy=lazy, check=check, name=str(path_or_repo), vision=vision
        )
        if adapter_path is not None:
            adapters.load_adapters(model, adapter_path)
    tokenizer = load_tokenizer(
        path,
        eos_token_ids=list(model.config.stated_end_ids),
        chat_template=chat_template,
        trust_remote_code=trust_remote_code,
    )
    ends = model.config.end_token_ids(tokenizer.eos_token_ids)
    model.config = replace(model.config, eos_token_ids=ends)
    return model, tokenizer


def generate(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    max_tokens: int | None = None,
    *,
    verbose: bool = False,
    **options: Any,
) -> str:
    """The whole text of the answer at once, without thoughts and calls of tools.

    Args:
        verbose: also print the text as it is committed.
        options: the other arguments of `stream_generate`.

    Raises:
        DiffGemmaError: as for `stream_generate`.
    """
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
    initial_noise: float | None = None,
    prefix_cache: PrefixCache | None = None,
    prefill_step_size: int | None = None,
    denoiser: Denoiser | None = None,
    profile: str = DEFAULT_PROFILE,
    config: DiffusionConfig | None = None,
    prompt_settings: PromptSettings | None = None,
    draft: bool = True,
    stop: str | Sequence[str] | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Iterator[GenerationResponse]:
    """Generate an answer, and yield a response after each denoising step, before the next one
    starts, and after each committed canvas.

    Args:
        prompt: text, messages (`{"role": ..., "content": ...}`, whose content may be parts with
            pictures, `{"type": "image", "image": ...}`), or token ids in a list, a tuple, an array
            or a `BatchEncoding`; or what `mlx_diffgemma.text.prompt.encode` made of one.
        max_tokens: most tokens to generate; None takes the checkpoint's setting.
        seed: makes the run repeatable on one machine; None draws a fresh one, which every response
            names.
        initial_canvas: token ids [C] that the first canvas starts from instead of noise, such as
            the `canvas` of an earlier response to a prompt that was changed a little.
        initial_noise: the share of `initial_canvas` that gives way to noise, from 0 to 1; the
            canvas then enters the schedule at the matching step, which saves passes.
        prefix_cache: a cache from `model.make_cache()` to use from one call to the next: what a
            prompt has in common with the previous one is not encoded again. A cache serves one
            call at a time.
        prefill_step_size: positions of the prompt to encode at a time; None takes the model's.
        denoiser: what runs the passes, such as one that steps the canvases of several calls
            together; None takes the model's own.
        profile: "exact" is the reference, token for token; others trade fidelity for speed. The
            path of a file stands for the profile that `tune` wrote there for this model.
        draft: also decode the draft of every step into text.
        stop: texts that end the answer; it is cut before the first that its text completes. Text
            that is thought, stands in a call or was given as the answer's beginning ends nothing.
        on_prefill: called with (positions done, positions in all) while the prompt is encoded.
        config: all settings of the denoising, as `diffusion_config` gives them, in place of the
            checkpoint's and the profile's.
        prompt_settings: how the prompt becomes token ids; None stands for `PromptSettings()`.
        settings: fields of `PromptSettings` and of `DiffusionConfig` to put over `prompt_settings`
            and `config`, such as `system_prompt`, `tools` or `max_denoising_steps`.

    Raises:
        ConfigError: the checkpoint's settings are damaged.
        UsageError, PromptError: a setting or the prompt is out of range.
        MemoryShortageError: the prompt does not fit.
        NumericalError: the model returned NaN or infinity; the step is named.
    """
    prompt_settings, settings = parted(prompt_settings, settings)
    config = configured(model, tokenizer, profile, config, max_tokens=max_tokens, **settings)
    if prefill_step_size is not None:
        check_integer("prefill_step_size", prefill_step_size, 1)
    seed, stops = checked_seed(seed), stop_strings(stop)
    cache, denoiser = cache_of(model, prefix_cache), denoiser_of(model, denoiser)
    if initial_canvas is not None and not hasattr(initial_canvas, "__len__"):
        raise UsageError(f"initial_canvas must be token ids, not {shown(initial_canvas)}.")
    if initial_noise is not None:
        check_share("initial_noise", initial_noise)
    check_flag("draft", draft)
    check_callable("on_prefill", on_prefill)
    encoded = encode(tokenizer, prompt, prompt_settings, config=model.config)
    wanted = config.max_tokens
    (config,) = fit_to_context(model, [encoded.ids], config, step_size=prefill_step_size)
    return _stream(
        model,
        Answer(tokenizer, stop=stops, thinking=encoded.thinking, prompt=encoded.ids),
        encoded,
        config,
        seed=seed,
        initial_canvas=None if initial_canvas is None else [list(initial_canvas)],
        initial_noise=initial_noise,
        cache=cache,
        denoiser=denoiser,
        step_size=prefill_step_size,
        draft=draft,
        fills_context=config.max_tokens < wanted,
        on_prefill=on_prefill or (lambda done, total: None),
    )


def _stream(
    model: DiffusionGemma,
    answer: Answer,
    prompt: Encoded,
    config: DiffusionConfig,
    *,
    seed: int,
    initial_canvas: list[list[int]] | None,
    initial_noise: float | None,
    cache: PrefixCache,
    denoiser: Denoiser,
    step_size: int | None,
    draft: bool,
    fills_context: bool,
    on_prefill: Callable[[int, int], None],
) -> Iterator[GenerationResponse]:
    ids = prompt.ids
    clock = Clock(prompt_tokens=len(ids), seed=seed)
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
            initial_noise=initial_noise,
            prefill_step_size=step_size,
            ends=lambda _, gained: answer.would_stop(gained),
            marks=[ends_of_turns(ids, config.eos_token_ids)],
        )
        steps: list[int] = []
        committed: list[int] = []
        kept = 0  # how many of the committed tokens are part of the answer
        parts = answer.parts()
        for event in events:
            if isinstance(event, PrefillProgress):
                on_prefill(event.done, event.total)
                clock.looking = event.looking
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
