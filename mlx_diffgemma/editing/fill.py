"""Fill a template with named slots: free text, kinds of text, choices, regular expressions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.checks import check_lengths, check_text
from mlx_diffgemma.diffusion.closing import Closer
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.constraints import token_mask
from mlx_diffgemma.diffusion.lookahead import look_ahead
from mlx_diffgemma.editing.gaps import Filled, choose_lengths, fill_gaps, read
from mlx_diffgemma.editing.grammar import GrammarMatcher, closer, regex_matcher
from mlx_diffgemma.editing.infill import LENGTHS
from mlx_diffgemma.editing.scoring import Option, comparable, option_log_probs, softmax
from mlx_diffgemma.editing.session import OnStep, Session
from mlx_diffgemma.editing.template import Slot, parse_template
from mlx_diffgemma.editing.window import Gap, lay_out
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.text.prompt import Prompt

_PROMPT = """\
Fill in this template. Write the whole text with something fitting in the place of every slot in \
braces, and nothing else.

{template}"""


@dataclass(frozen=True)
class FilledTemplate:
    """A template with its slots filled.

    Attributes:
        text: the whole text.
        slots: the text of each slot, by name.
        filled: how each slot came about, by name.
        cut: most tokens behind a slot that did not fit in its canvas and went unseen.
        passes: forward passes over a canvas.
        seed: the seed of every random draw.
    """

    text: str
    slots: dict[str, str]
    filled: dict[str, Filled]
    cut: int
    passes: int
    seed: int

    @property
    def converged(self) -> bool:
        """Whether every canvas was done before its steps were used up."""
        return all(each.converged for each in self.filled.values())


@memory.wired()
def fill(
    model: DiffusionGemma,
    tokenizer: Any,
    template: str,
    *,
    lengths: Sequence[int] = LENGTHS,
    prompt: Prompt | None = None,
    seed: int | None = None,
    config: DiffusionConfig | None = None,
    on_step: OnStep | None = None,
    **settings: Any,
) -> FilledTemplate:
    """Fill the slots of a template from left to right, each in sight of the text on both its sides.

    Args:
        template: as `parse_template` reads it.
        lengths: how many tokens a slot may take; the model chooses.
        prompt: what to tell the model; by default, to write the template filled in.
        seed: as for `stream_generate`.
        config: as for `stream_generate`.
        on_step: called with the `DenoisingStep` after each step.
        settings: fields of `DiffusionConfig` and `PromptSettings`, as for `stream_generate`.

    Raises:
        UsageError: the template is malformed, or a slot cannot be satisfied or does not fit.
        PromptError: the prompt is empty or malformed, or the text is longer than the context.
        MemoryShortageError: the request takes more memory than the machine offers.
        NumericalError: the model returned values that are not finite.
    """
    check_text("template", template)
    check_lengths("lengths", lengths)
    literals, slots = parse_template(template)
    session = Session(
        model,
        tokenizer,
        _PROMPT.format(template=template) if prompt is None else prompt,
        seed=seed,
        config=config,
        on_step=on_step,
        **settings,
    )
    filler = _Filler(session, tuple(lengths))
    known: dict[str, Filled] = {}
    left, rest, waiting = literals[0], literals[1:], list(slots)
    while waiting:
        name = waiting[0].name
        if name not in known:
            known[name] = filler.fill([left, *rest], waiting, known)
        left += known[name].text + rest.pop(0)
        del waiting[0]
    return FilledTemplate(
        text=left,
        slots={name: filled.text for name, filled in known.items()},
        filled=known,
        cut=filler.cut,
        passes=session.passes,
        seed=session.seed,
    )


class _Filler:
    """Fills the first of the slots that wait, whatever its kind."""

    def __init__(self, session: Session, lengths: tuple[int, ...]) -> None:
        if not lengths or min(lengths) < 1:
            raise UsageError(f"a slot takes at least 1 token; its lengths are {list(lengths)}.")
        self.longest = session.length - 2
        self.lengths = tuple(length for length in lengths if length <= self.longest)
        if not self.lengths:
            raise UsageError(
                f"a slot of {min(lengths)} tokens does not fit in the canvas of {session.length}; "
                "make it shorter, or take a longer --canvas-length."
            )
        self.session = session
        self.closer: Closer = closer(session.vocabulary)
        self.cut = 0

    def fill(
        self, literals: Sequence[str], slots: Sequence[Slot], known: dict[str, Filled]
    ) -> Filled:
        """Fill `slots[0]`, while the other slots hold what is known of them or stand open."""
        literals, slots = _with_known(literals, slots, known)
        gaps = [self._gap(slot) for slot in slots]
        slot = slots[0]
        if slot.kind == "choices":
            return self._choose(literals, gaps, slot)
        if slot.kind == "regex":
            return self._match(literals, gaps, slot)
        # The slots behind stay open: only the first is settled.
        middles = [replace(gap, lengths=(gap.middle,)) for gap in gaps[1:]]
        chosen = [gaps[0], *middles]
        scores = choose_lengths(self.session, literals, chosen)[0] if len(self.lengths) > 1 else {}
        done = fill_gaps(self.session, literals, chosen, first_only=True)
        self.cut = max(self.cut, done.cut)
        return replace(done.gaps[0], scores=scores)

    def _gap(self, slot: Slot) -> Gap:
        vocabulary = self.session.vocabulary
        if slot.kind == "text":
            return Gap(self.lengths)
        if slot.kind == "choices":
            middle = sorted(len(vocabulary.encode(choice)) for choice in slot.choices)
            return Gap((max(1, middle[len(middle) // 2]),), joins=False)
        if slot.kind == "regex":
            return Gap(self._lengths(self._matcher(slot)), joins=False)
        kind: Any = slot.kind  # one that `Vocabulary.kind` knows, since the others returned
        return Gap(self.lengths, vocabulary.kind(kind), joins=False)

    def _choose(self, literals: Sequence[str], gaps: Sequence[Gap], slot: Slot) -> Filled:
        """Pin each choice in its place, and take the most probable."""
        session = self.session
        answers = [session.vocabulary.encode(choice) for choice in slot.choices]
        lengths = [[len(answer), *(gap.middle for gap in gaps[1:])] for answer in answers]
        windows = lay_out(session.vocabulary, literals, gaps, lengths, session.length)
        options = []
        for window, answer in zip(windows, answers, strict=True):
            span = window.spans[0]
            tokens = list(window.layout.tokens)
            tokens[span.start : span.stop] = answer
            options.append(Option(0, tuple(tokens), span.start, span.stop))
        self.cut = max(self.cut, *(window.cut for window in windows))
        prefix = session.prefix(windows[0].prefix)
        found = option_log_probs(session, [prefix], comparable(options))
        chances = softmax(found)
        best = int(np.argmax(chances))
        entropy = float(-(chances * np.log(np.maximum(chances, 1e-30))).sum())
        return Filled(
            text=slot.choices[best],
            tokens=tuple(answers[best]),
            entropy=(entropy, *[0.0] * (len(answers[best]) - 1)),
        )

    def _match(self, literals: Sequence[str], gaps: Sequence[Gap], slot: Slot) -> Filled:
        """Pin what matches of each draft and restrict what comes next, as `generate_matching`
        does."""
        session, vocabulary = self.session, self.session.vocabulary
        matcher = self._matcher(slot)
        if self.closer.shortest(matcher, self.longest + 1) > self.longest:
            raise UsageError(
                f"no text of at most {self.longest} tokens was found that matches the pattern of "
                f"slot '{slot.name}'; loosen it, or take a longer --canvas-length."
            )
        if matcher.may_end and matcher.must_end:
            return Filled("")
        lengths = gaps[0].lengths
        first = replace(gaps[0], following=self._ahead(matcher, max(lengths)))
        chosen = [first, *gaps[1:]]
        scores: dict[int, float] = {}
        if len(lengths) > 1:
            scores = choose_lengths(session, literals, chosen)[0]
        length, given, entropy = chosen[0].lengths[0], list[int](), list[float]()
        config, canvas, steps, converged = session.config, None, 0, True
        while True:
            forced = matcher.forced()[: length - len(given)]
            matcher.advance(forced)
            given += forced
            entropy += [0.0] * len(forced)
            if matcher.must_end or len(given) == length:
                break
            following = self._ahead(matcher, length - len(given))
            if not following[0].any():
                break
            gap = replace(first, lengths=(length,), given=tuple(given), following=following)
            window = lay_out(
                vocabulary,
                literals,
                [gap, *gaps[1:]],
                [[length, *(other.middle for other in gaps[1:])]],
                session.length,
            )[0]
            done = session.denoise(
                session.prefix(window.prefix),
                window.layout,
                initial=canvas,
                watched=window.spans[0].places,
                first_step=1 if canvas is None else config.max_denoising_steps,
            )
            if canvas is None:  # the canvases behind the first take up its draft, in one step each
                converged = done.converged
            canvas, self.cut = done.tokens, max(self.cut, window.cut)
            steps += done.steps
            seen = read(session, window.spans[0], done)
            draft = seen.tokens[len(given) :]
            kept = self.closer.affordable(
                matcher, draft[: matcher.matching(draft)], length - len(given)
            ) or self.closer.ending(matcher, length - len(given))
            if not kept:
                break
            entropy += seen.entropy[len(given) : len(given) + len(kept)]
            matcher.advance(kept)
            given += kept
            if matcher.may_end and len(kept) < len(draft):
                break  # the draft goes on with what does not match, and the text is complete
        text = vocabulary.decode(given)
        return Filled(text, tuple(given), tuple(entropy), steps, scores, converged)

    def _matcher(self, slot: Slot) -> GrammarMatcher:
        return regex_matcher(
            self.session.vocabulary, slot.pattern, f"the pattern of slot '{slot.name}'"
        )

    def _lengths(self, matcher: GrammarMatcher) -> tuple[int, ...]:
        """How many tokens the text that matches a pattern may take: of the lengths of all slots
        those that the grammar allows, or else the lengths that it is known to allow."""
        longest, ends = max(self.lengths), self._ends
        shortest = self.closer.shortest(matcher, self.longest)
        ahead = look_ahead(matcher, longest + 1, ends)
        # It may end behind n tokens where an eos may be, and something else before that.
        able = [
            n
            for n, (last, mask) in enumerate(pairwise(ahead), 1)
            if (mask & ends).any() and (last & ~ends).any()
        ]
        known = len(ahead) > longest
        fitting = tuple(n for n in self.lengths if n >= shortest and (n in able or not known))
        return fitting or tuple(able) or (max(1, shortest),)

    def _ahead(self, matcher: GrammarMatcher, depth: int) -> tuple[np.ndarray, ...]:
        """Masks [W] of the text that may stand at the next positions, as far as that is known."""
        text = self.session.vocabulary.text
        return tuple(
            mask & text if place == 0 or (mask & text).any() else text
            for place, mask in enumerate(look_ahead(matcher, depth, self._ends))
        )

    @property
    def _ends(self) -> np.ndarray:
        """Mask [W] of the tokens that end a slot."""
        return token_mask(self.session.vocabulary.eos, self.session.vocabulary.size)


def _with_known(
    literals: Sequence[str], slots: Sequence[Slot], known: dict[str, Filled]
) -> tuple[list[str], list[Slot]]:
    """The slots that are not known yet, and the text around them, which holds the known ones."""
    around, open_slots = [literals[0]], list[Slot]()
    for slot, literal in zip(slots, literals[1:], strict=True):
        if slot.name in known:
            around[-1] += known[slot.name].text + literal
        else:
            open_slots.append(slot)
            around.append(literal)
    return around, open_slots
