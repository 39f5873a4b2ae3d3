"""Typed decisions: many questions about a state, answered as probabilities from one look.

The state and the questions are the prompt; a canvas holds a line for each question, pinned but for
one token, the label of the answer. Letters: R orders of the options, K options of a question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
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
from mlx_diffgemma.editing.calibration import Calibration, Example, log_softmax
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
from mlx_diffgemma.generation import cache_of, denoiser_of, diffusion_config, fit_to_context
from mlx_diffgemma.model.cache import Prefix, PrefixCache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.reading import shown
from mlx_diffgemma.text.chat_template import template_text
from mlx_diffgemma.text.picture_places import PictureReader, read_images
from mlx_diffgemma.text.prompt import encode_prompt
from mlx_diffgemma.text.tokenizer import check_tokenizer, hf_tokenizer


@dataclass(frozen=True)
class Answer:
    """What the model believes of a question.

    Attributes:
        question: what was asked.
        labels: what stood for each option in the canvas, [K]; empty where the options took turns.
        log_probs: [draws, K] the logarithms of each draw's probabilities, in nats, before any
            calibration.
        probabilities: [K] the mean over the draws, calibrated where that was asked for; they sum
            to 1.
        spread: [K] the standard deviation over the draws, calibrated alike; 0 for one draw.
    """

    question: Question
    labels: tuple[str, ...]
    log_probs: np.ndarray
    probabilities: tuple[float, ...]
    spread: tuple[float, ...]

    @property
    def best(self) -> str:
        """The most probable option."""
        return self.question.options[int(np.argmax(self.probabilities))]

    @property
    def confidence(self) -> float:
        """1 − H / ln K: 1 where one option has all the mass, and 0 where it is flat."""
        p = np.array(self.probabilities)
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum()
        return float(np.clip(1 - entropy / np.log(len(p)), 0.0, 1.0))

    @property
    def score(self) -> float:
        """The expected number of the option, from 0: of a score its expected level."""
        return float(np.dot(np.arange(len(self.probabilities)), self.probabilities))

    def as_json(self) -> dict[str, Any]:
        """The answer as the wire format has it, and the spread and the confidence beside it."""
        names = self.question.options
        probabilities = dict(zip(names, self.probabilities, strict=True))
        spread = dict(zip(names, self.spread, strict=True))
        kind = self.question.kind
        found: dict[str, Any] = {"type": kind}
        if kind == "noul":
            found |= {"noul": self.probabilities[0], "spread": self.spread[0]}
            return found | {"confidence": self.confidence}
        found |= {"choice": self.best} if kind == "choice" else {"score": self.score}
        found |= {"probabilities": probabilities, "confidence": self.confidence, "spread": spread}
        return found | ({"legend": dict(self.question.legend)} if kind == "score" else {})


@dataclass(frozen=True)
class Decisions:
    """The answers of one request.

    Attributes:
        answers: by the names of the questions, in their order.
        canvases: tokens of each canvas that holds questions; every draw and every order of the
            options has such canvases of its own.
        passes: forward passes over a batch of canvases.
        prompt_tokens: tokens of the prompt, in one order of the options.
        cached_tokens: how many of them were known from an earlier request.
        seed: the seed of every random draw.
    """

    answers: dict[str, Answer]
    canvases: tuple[int, ...]
    passes: int
    prompt_tokens: int
    cached_tokens: int
    seed: int


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

    All questions are answered by one forward pass over as few canvases as hold them. What is pinned
    costs no look at the vocabulary, and where an answer stands only the labels of its options are
    looked at.

    Args:
        state: what the questions are about, a text or any JSON; with pictures it may be empty.
        questions: by name, each as {"type": "noul" | "choice" | "score", "instructions": ...,
            "criteria": ...}, or a `Question`.
        frame: the whole answer with `{name}` in the place of each question's answer, for a model
            that answers in a form of its own. The prompt is then the state alone, and an option
            stands in the answer by its name.
        calibration: what `calibrate` fitted for this model; None leaves probabilities as they are.
        images, image_tokens: pictures that the questions are about too, before the state.
        seed, system_prompt, raw, prefix_cache, prefill_step_size, denoiser: as for
            `stream_generate`.
        settings: fields of `DecisionSettings`.

    Raises:
        UsageError: a setting or a question is wrong, or the vocabulary cannot write its labels.
        PromptError: the state is empty, or state and questions are longer than the context.
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
    text = "" if images and state in (None, "") else state_text(state)
    shown_first = read_images(images, PictureReader(model.config, image_tokens))
    if calibration is not None:
        calibration.require_model(model)
    vocabulary = Vocabulary(tokenizer, model.config.text.vocab_size, config.eos_token_ids)
    longest = how.canvas_length or model.config.canvas_length
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
        shared = _in_common([*prompts, prompt(0, [])])
        prefixes, known = _encoded(model, cache, prompts, shared, prefill_step_size)
    found, passes = _looked_at(denoiser, config, vocabulary, frames, lengths, prefixes, seed, how)
    answers = {
        question.name: _answer(question, own, logits, calibration)
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
    """What makes the probabilities of this model's answers agree with how often they are right.

    Args:
        examples: each with a "state", its "questions", the right "answers" by name (true or false,
            the name of a choice, or the number of a level), and maybe a "frame".
        options: those of `decide`, to be used alike when the calibration is applied.

    Raises:
        UsageError: an example is malformed, or there are too few.
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
                    raise UsageError(f"the answer '{name}' belongs to no question.")
                one = found.answers[name]
                log_probs, best = _pooled(one.log_probs), one.question.index_of(right)
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
    """No thinking, where the template knows of any: the answer follows at once, behind the empty
    channel where the template writes one."""
    return False if "enable_thinking" in template_text(hf_tokenizer(tokenizer)) else None


def _refuse_too_long(
    length_with: Callable[[int], int], questions: Sequence[Question], room: int
) -> NoReturn:
    """Name the first question that does not fit; `length_with` counts the tokens of a prompt of so
    many questions."""
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


def _in_common(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with: those of the state, whatever stands behind it."""
    rows = zip(*prompts, strict=False)
    return sum(1 for _ in takewhile(lambda row: len(set(row)) == 1, rows))


def _encoded(
    model: DiffusionGemma,
    cache: PrefixCache,
    prompts: Sequence[Sequence[int]],
    shared: int,
    step_size: int | None,
) -> tuple[list[Prefix], int]:
    """The prefix of each prompt, and how many tokens of the first were known. All begin with the
    same `shared` tokens, which are encoded once and remembered as a place to come back to."""
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


def _answer(
    question: Question, labels: Sequence[str], logits: np.ndarray, calibration: Calibration | None
) -> Answer:
    """From the logits [R, draws, K] of a question's labels to the answer."""
    count = logits.shape[-1]
    orders = max(1, len(logits) // count * count)
    log_probs = log_softmax(logits[:orders])
    if question.kind == "choice":
        # The option `o` stands at the place (o − shift) of the list, whose label it has.
        shifts = [np.roll(each, shift, axis=-1) for shift, each in enumerate(log_probs)]
        log_probs = np.stack(shifts)
    by_draw = log_softmax(log_probs.mean(axis=0))
    pooled, each = _pooled(by_draw), by_draw
    own = tuple(labels) if len(logits) == 1 or question.kind != "choice" else ()
    if calibration is not None:
        pooled, each = (calibration.applied(question.kind, own, x) for x in (pooled, each))
    probabilities, spread = np.exp(pooled), np.exp(each).std(axis=0)
    return Answer(question, own, by_draw, tuple(probabilities.tolist()), tuple(spread.tolist()))


def _pooled(log_probs: np.ndarray) -> np.ndarray:
    """The logarithm [K] of the mean over the draws, from log-probabilities [draws, K]."""
    most = log_probs.max(axis=0)
    pooled = most + np.log(np.exp(log_probs - most).mean(axis=0))
    return log_softmax(pooled)
