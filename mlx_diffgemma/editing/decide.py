"""Typed decisions: many questions about a state, answered as probabilities without writing.

The state and the questions are the prompt; a canvas holds a line for each question, pinned but for
one token, the label of the answer. Letters: R orders of the options, K options of a question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np

from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.checks import check_integer, check_text, overridden
from mlx_diffgemma.diffusion.canvas import Canvas
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.denoiser import Denoiser
from mlx_diffgemma.diffusion.encode import encode
from mlx_diffgemma.diffusion.noise import SeededNoise, checked_seed
from mlx_diffgemma.editing.beliefs import Decisions, answer_from, pooled
from mlx_diffgemma.editing.calibration import Calibration, Example
from mlx_diffgemma.editing.frames import Frame, from_template, labels_for, length_of, lines
from mlx_diffgemma.editing.questions import (
    DecisionSettings,
    Question,
    listing,
    read_questions,
    state_text,
)
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.errors import PromptError, UsageError
from mlx_diffgemma.fitting import (
    cache_of,
    canvas_length,
    denoiser_of,
    diffusion_config,
    fit_to_context,
)
from mlx_diffgemma.model.cache import Prefix, PrefixCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.pictured import in_common
from mlx_diffgemma.reading import shown
from mlx_diffgemma.text.chat_template import template_text
from mlx_diffgemma.text.picture_places import PictureReader, read_images
from mlx_diffgemma.text.prompt import encode_prompt
from mlx_diffgemma.text.prompt_settings import check_images
from mlx_diffgemma.text.tokenizer import check_tokenizer, hf_tokenizer


@memory.wired()
def decide(
    model: DiffusionGemma,
    tokenizer: Any,
    state: Any,
    questions: Mapping[str, Any],
    *,
    frame: str | None = None,
    calibration: Calibration | None = None,
    seed: int | None = None,
    system_prompt: str | None = None,
    raw: bool = False,
    images: Sequence[Any] = (),
    image_tokens: int | None = None,
    prefix_cache: PrefixCache | None = None,
    prefill_step_size: int | None = None,
    denoiser: Denoiser | None = None,
    **settings: Any,
) -> Decisions:
    """How probable each answer to each question about a state is.

    By default one forward pass over as few canvases as hold them answers all questions. In the last
    pass logits are computed only where an answer stands, and only for the labels of its options.

    Args:
        state: what the questions are about, a text or any JSON; with pictures it may be empty.
        questions: by name, each as {"type": "noul" | "choice" | "score", "instructions": ...,
            "criteria": ...}, or a `Question`.
        frame: the whole answer with `{name}` in the place of each question's answer, for a model
            that answers in a form of its own. The prompt is then the state alone, and an option
            stands in the answer by its name.
        calibration: what `calibrate` fitted for this model; None leaves probabilities as they are.
        images: pictures that the questions are about too; they stand before the state.
        image_tokens: most tokens of a picture; None takes the checkpoint's own number.
        seed: as for `stream_generate`.
        system_prompt: as in `PromptSettings`.
        raw: as in `PromptSettings`.
        prefix_cache: as for `stream_generate`.
        prefill_step_size: as for `stream_generate`.
        denoiser: as for `stream_generate`.
        settings: fields of `DecisionSettings`.

    Raises:
        UsageError: a setting or a question is wrong, or the vocabulary cannot write its labels.
        PromptError: the state is empty, or state and questions are longer than the context.
        MemoryShortageError: the request takes more memory than the machine offers.
        NumericalError: the model returned values that are not finite.
    """
    how = overridden(DecisionSettings(), settings)
    config = diffusion_config(model, max_denoising_steps=how.steps)
    check_tokenizer(tokenizer)
    cache, denoiser = cache_of(model, prefix_cache), denoiser_of(model, denoiser)
    if prefill_step_size is not None:
        check_integer("prefill_step_size", prefill_step_size, 1)
    if frame is not None:
        check_text("frame", frame)
    if calibration is not None and not isinstance(calibration, Calibration):
        raise UsageError(f"calibration must come from calibrate, not be {shown(calibration)}.")
    asked, seed = read_questions(questions), checked_seed(seed)
    check_images(images)
    text = "" if images and state in (None, "") else state_text(state)
    shown_first = read_images(images, PictureReader(model.config, image_tokens))
    if calibration is not None:
        calibration.require_model(model)
    vocabulary = Vocabulary(tokenizer, model.config.text.vocab_size, config.eos_token_ids)
    longest = canvas_length(model, config.override(canvas_length=how.canvas_length))
    labels, frames = _frames(tokenizer, vocabulary, asked, frame, how, longest)
    lengths = [how.canvas_length or length_of(each, longest) for each in frames]
    shifts = max(len(question.options) for question in asked) if how.rotate else 1

    def prompt(shift: int, among: Sequence[Question]) -> list[int]:
        behind = (
            ""
            if frame is not None or not among
            else f"\n\n{listing(among, labels[: len(among)], shift)}"
        )
        return encode_prompt(
            tokenizer,
            text + behind,
            raw=raw,
            system_prompt=system_prompt,
            thinking=None if raw else _unless_thinking(tokenizer),
            images=shown_first,
            config=model.config,
        )

    prompts = [prompt(shift, asked) for shift in range(shifts)]
    room = model.config.text.max_position_embeddings - max(lengths)
    if max(map(len, prompts)) > room:
        _refuse_too_long(lambda count: len(prompt(0, asked[:count])), asked, room)
    config = config.override(canvas_length=max(lengths), max_tokens=max(lengths))
    fit_to_context(model, prompts, config, step_size=prefill_step_size)
    with cache.in_use():
        shared = in_common(*prompts, prompt(0, []))
        prefixes, known = _encoded(model, cache, prompts, shared, prefill_step_size)
    found, passes = _looked_at(denoiser, config, vocabulary, frames, lengths, prefixes, seed, how)
    answers = {
        question.name: answer_from(question, own, logits, calibration)
        for question, own, logits in zip(asked, labels, found, strict=True)
    }
    return Decisions(answers, tuple(lengths), passes, len(prompts[0]), known, seed)


def calibrate(
    model: DiffusionGemma,
    tokenizer: Any,
    examples: Iterable[Mapping[str, Any]],
    *,
    seed: int = 0,
    **options: Any,
) -> Calibration:
    """Fit a calibration that makes the probabilities of this model's answers agree with how often
    they are right.

    Args:
        examples: each with a "state", its "questions", the right "answers" by name (true or false,
            the name of a choice, or the number of a level), and maybe a "frame".
        seed: seed of the first example; each further example takes the next.
        options: those of `decide`, to be used alike when the calibration is applied.

    Raises:
        UsageError: an example is malformed, or there are too few of every type.
    """
    seed = checked_seed(seed)
    diffusion_config(model)
    if isinstance(examples, (str, bytes)) or not isinstance(examples, Iterable):
        raise UsageError(f"examples must be a list of them, not {shown(examples)}.")
    cache = model.make_cache()
    seen: list[Example] = []
    for number, example in enumerate(examples):
        where = f"example {number + 1}"
        answers = example.get("answers") if isinstance(example, Mapping) else None
        if not isinstance(answers, Mapping) or not answers:
            raise UsageError(f"{where} must have a state, questions, and answers by name.")
        try:
            own = {"frame": example["frame"]} if "frame" in example else {}
            found = decide(
                model, tokenizer, example.get("state"), example.get("questions") or {},
                seed=seed + number, prefix_cache=cache, **(options | own),
            )  # fmt: skip
            for name, right in answers.items():
                if name not in found.answers:
                    raise UsageError(
                        f"the answer '{name}' belongs to no question; ask it, or drop the answer."
                    )
                one = found.answers[name]
                log_probs, best = pooled(one.log_probs), one.question.index_of(right)
                seen.append(Example(number, one.question.kind, one.labels, log_probs, best))
        except UsageError as error:
            raise type(error)(f"{where}: {error}") from None
    return Calibration.fitted(seen, model, overridden(DecisionSettings(), _settings_of(options)))


def _settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    names = DecisionSettings.__dataclass_fields__
    return {name: value for name, value in options.items() if name in names}


def _frames(
    tokenizer: Any,
    vocabulary: Vocabulary,
    questions: Sequence[Question],
    template: str | None,
    how: DecisionSettings,
    longest: int,
) -> tuple[list[list[str]], list[Frame]]:
    """The labels of each question's options, and the canvases that ask for them."""
    if template is None:
        labels = labels_for(tokenizer, vocabulary, questions)
        return labels, lines(vocabulary, questions, labels, longest, separate=how.separate)
    if how.rotate:
        raise UsageError(
            "rotate changes the order in which options are listed, and a frame of your own lists "
            "none: drop one."
        )
    if how.separate and len(questions) > 1:
        raise UsageError(
            f"separate gives each question a canvas, and the frame holds {len(questions)} of them: "
            "drop one."
        )
    labels = [list(question.options) for question in questions]
    return labels, [from_template(vocabulary, template, questions, longest)]


def _unless_thinking(tokenizer: Any) -> bool | None:
    """False, for no thinking, where the chat template has a switch for it, and None where it has
    none. The answer then follows at once, behind the empty channel of a thought where the template
    writes one."""
    return False if "enable_thinking" in template_text(hf_tokenizer(tokenizer)) else None


def _refuse_too_long(
    length_with: Callable[[int], int], questions: Sequence[Question], room: int
) -> NoReturn:
    """Raise a PromptError that names the first question that does not fit in `room` tokens, or the
    state; `length_with` counts the tokens of a prompt of so many questions."""
    if length_with(0) > room:
        raise PromptError(
            f"the state takes {length_with(0)} tokens, and the model's context leaves {room} "
            "beside the answers; shorten it."
        )
    fits, breaks = 0, len(questions)
    while breaks - fits > 1:
        middle = (fits + breaks) // 2
        fits, breaks = (middle, breaks) if length_with(middle) <= room else (fits, middle)
    raise PromptError(
        f"{questions[breaks - 1].title}, number {breaks} of {len(questions)}, does not fit in the "
        f"model's context, which leaves {room} tokens beside the answers; ask fewer at a time."
    )


def _encoded(
    model: DiffusionGemma,
    cache: PrefixCache,
    prompts: Sequence[Sequence[int]],
    shared: int,
    step_size: int | None,
) -> tuple[list[Prefix], int]:
    """The prefix of each prompt, and how many tokens of the first prompt the cache knew. All
    prompts begin with the same `shared` tokens, which are encoded once and marked in the cache, so
    that a later request can go on from there."""
    prefixes, known = [], 0
    for number, ids in enumerate(prompts):
        own = cache if number == 0 else cache.snapshot()
        steps = encode(model, own, ids, step_size=step_size, marks=[shared], ahead=True)
        missing = [step.total for step in steps]
        prefixes.append(own.prefix)
        known = len(ids) - missing[0] if number == 0 else known
    return prefixes, known


def _looked_at(
    denoiser: Denoiser,
    config: DiffusionConfig,
    vocabulary: Vocabulary,
    frames: Sequence[Frame],
    lengths: Sequence[int],
    prefixes: Sequence[Prefix],
    seed: int,
    how: DecisionSettings,
) -> tuple[list[np.ndarray], int]:
    """The logits [R, draws, K] of each question's labels at temperature 1 after the last pass, and
    the passes over batches that it took."""
    noise = SeededNoise(seed)
    layouts = [f.layout(n, vocabulary.end) for f, n in zip(frames, lengths, strict=True)]
    canvases, behind, of = [], [], []
    for prefix in prefixes:
        for draw in range(how.draws):
            for number, layout in enumerate(layouts):
                index = draw * len(layouts) + number
                size = lengths[number], vocabulary.size
                canvases.append(Canvas.start(config, noise, index, *size, layout=layout))
                behind.append(prefix)
                of.append(number)
    rows: list[list[list[np.ndarray]]] = [[] for _ in frames]
    passes = 0
    for start, stop in denoiser.few_at_a_time(canvases):
        some = canvases[start:stop]
        for _ in range(how.steps - 1):
            some = denoiser.step(some, behind[start:stop])
        for number, seen in zip(
            of[start:stop], denoiser.weigh(some, behind[start:stop]), strict=True
        ):
            rows[number].append(seen)
        passes += how.steps
    mx.clear_cache()
    by_question: dict[int, np.ndarray] = {}
    for frame, seen_by_row in zip(frames, rows, strict=True):
        for place, (question, _, _) in enumerate(sorted(frame.slots, key=lambda slot: slot[1])):
            logits = np.stack([seen[place] for seen in seen_by_row]).astype(np.float64)
            by_question[question] = logits.reshape(len(prefixes), how.draws, -1)
    return [by_question[number] for number in range(len(by_question))], passes
