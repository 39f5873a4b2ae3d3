"""Typed decisions, beside logits computed without any code of this room."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from big_vocabulary import EOS, big
from one_pass import decoded, encoded
from small_models import demo, tiny
from text import gemma_like

from mlx_diffgemma.bench.counted import as_on_a_gpu, counted
from mlx_diffgemma.bench.presets import RELEASE, config_like
from mlx_diffgemma.bench.random_model import blank_model, chosen_recipe
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.diffusion.constraints import FREE, Layout
from mlx_diffgemma.diffusion.noise import SeededNoise
from mlx_diffgemma.editing import decide as decide_module
from mlx_diffgemma.editing.beliefs import Answer
from mlx_diffgemma.editing.decide import decide
from mlx_diffgemma.editing.frames import labels_for, length_of, lines
from mlx_diffgemma.editing.questions import listing, read_questions
from mlx_diffgemma.editing.vocabulary import Vocabulary
from mlx_diffgemma.errors import PromptError, UsageError

TONES = {"angry": "It is hostile.", "calm": None, "glad": None}
QUESTIONS = {
    "spam": {"type": "noul", "instructions": "It is spam."},
    "tone": {"type": "choice", "instructions": "Which tone?", "criteria": TONES},
    "urgency": {"type": "score", "criteria": ["low", "mid", "high", "now"]},
}
LABELS = [["Y", "N"], ["A", "B", "C"], ["0", "1", "2", "3"]]  # "yes" is three tokens there
TEXT = "1: Y\n2: A\n3: 0\n"


def token(tokenizer, label):
    """In a line a label comes behind a space, which the small tokenizer joins with an "a" alone."""
    return tokenizer.encode(label, add_special_tokens=False)[-1]


def frame_of(tokenizer, text=TEXT):
    return tokenizer.encode(text, add_special_tokens=False)


def chances(model, prompt, canvas, place, ids, soft=None):
    hidden = decoded(model, canvas, encoded(model, prompt)[1], soft)
    logits = np.array(model.logits(hidden)).astype(np.float64)[place, ids]
    p = np.exp(logits - logits.max())
    return p / p.sum()


def naive(model, tokenizer, shift, draw, seed):
    """The probabilities of each question's labels by one pass, by their place."""
    asked = read_questions(QUESTIONS)
    prompt = tokenizer.encode("x\n\n" + listing(asked, LABELS, shift), add_special_tokens=True)
    ids = frame_of(tokenizer)
    length = -(-(len(ids) + 1) // 16) * 16
    canvas = np.array([*ids, *[5] * (length - len(ids))])
    places = [ids.index(token(tokenizer, labels[0])) for labels in LABELS]
    places[2] = len(ids) - 2
    noise = SeededNoise(seed).initial(draw, length, model.config.text.vocab_size)
    canvas[places] = np.array(noise)[places]
    return [
        chances(model, prompt, canvas, place, [token(tokenizer, label) for label in labels])
        for place, labels in zip(places, LABELS, strict=True)
    ]


def test_all_questions_are_softmaxes_of_the_logits_at_their_places():
    model, tokenizer = tiny(48)
    found = decide(model, tokenizer, "x", QUESTIONS, seed=7, draws=3, raw=True)
    assert (found.passes, found.canvases) == (1, (16,))
    by_draw = [naive(model, tokenizer, 0, draw, 7) for draw in range(3)]
    for number, answer in enumerate(found.answers.values()):
        assert answer.labels == tuple(LABELS[number])
        each = np.array([row[number] for row in by_draw])
        assert answer.probabilities == pytest.approx(each.mean(axis=0).tolist(), abs=1e-5)
        assert answer.spread == pytest.approx(each.std(axis=0).tolist(), abs=1e-5)
        assert max(answer.spread) > 1e-4


def test_rotation_averages_over_the_orders_in_log_space():
    model, tokenizer = tiny(48)
    found = decide(model, tokenizer, "x", QUESTIONS, seed=7, rotate=True, raw=True)
    orders = [naive(model, tokenizer, shift, 0, 7) for shift in range(4)]
    # The option `o` of a choice stands where the list begins `shift` options later.
    tone = np.mean([np.log([orders[s][1][(o - s) % 3] for o in range(3)]) for s in range(3)], 0)
    spam = np.mean([np.log(orders[s][0]) for s in range(4)], 0)
    urgency = np.mean([np.log(orders[s][2]) for s in range(4)], 0)
    for name, logs in (("spam", spam), ("tone", tone), ("urgency", urgency)):
        expected = np.exp(logs) / np.exp(logs).sum()
        assert found.answers[name].probabilities == pytest.approx(expected.tolist(), abs=1e-5)
    assert found.answers["tone"].labels == ()


def test_separate_questions_stand_alone():
    model, tokenizer = tiny(48)
    found = decide(model, tokenizer, "x", QUESTIONS, seed=7, separate=True, raw=True)
    assert (found.canvases, found.passes) == ((16, 16, 16), 1)
    asked = read_questions(QUESTIONS)
    prompt = tokenizer.encode("x\n\n" + listing(asked, LABELS), add_special_tokens=True)
    ids = frame_of(tokenizer, "2: A\n")
    canvas = np.array([*ids, *[5] * (16 - len(ids))])
    place = len(ids) - 2
    canvas[place] = np.array(SeededNoise(7).initial(1, 16, 416))[place]
    expected = chances(model, prompt, canvas, place, [token(tokenizer, x) for x in "ABC"])
    assert found.answers["tone"].probabilities == pytest.approx(expected.tolist(), abs=1e-5)


def test_steps_settle_as_under_the_masks_of_a_whole_pass(monkeypatch):
    """What is computed from few rows is what the pass over all words says under their masks. The
    two draw from other random numbers, so that each draw is the likeliest token here."""
    model, tokenizer = tiny(48)
    monkeypatch.setattr(mx.random, "categorical", lambda x, key=None: mx.argmax(x, axis=-1))
    kinds = []
    predict = model.predict
    monkeypatch.setattr(
        type(model), "predict",
        lambda self, hidden, rows, standing=None: (
            kinds.append({row.candidates is None for row in rows}), predict(hidden, rows, standing)
        )[1],
    )  # fmt: skip
    given = {"seed": 3, "draws": 2, "steps": 4, "raw": True}
    few = decide(model, tokenizer, "x", QUESTIONS, **given)
    assert kinds == [{False}] * 3 and few.passes == 4
    kept = Layout.few
    masked = property(lambda self: None)
    seen = []
    step = decide_module.Denoiser.step

    def whole_step(self, canvases, prefixes):
        monkeypatch.setattr(Layout, "few", masked)
        stepped = step(self, canvases, prefixes)
        monkeypatch.setattr(Layout, "few", kept)
        seen.append([canvas.soft_embeddings for canvas in stepped])
        return stepped

    monkeypatch.setattr(decide_module.Denoiser, "step", whole_step)
    whole = decide(model, tokenizer, "x", QUESTIONS, **given)
    assert kinds[3:] == [{True}] * 3 and len(seen) == 3
    one_pass = decide(model, tokenizer, "x", QUESTIONS, **given | {"steps": 1})
    for name, answer in few.answers.items():
        assert answer.probabilities == pytest.approx(whole.answers[name].probabilities, abs=1e-5)
    moved = [
        np.abs(np.subtract(answer.probabilities, one_pass.answers[name].probabilities)).max()
        for name, answer in few.answers.items()
    ]
    assert max(moved) > 1e-3


def test_what_does_not_fit_goes_into_further_canvases():
    model, tokenizer = tiny(24)
    names = {f"q{n}": QUESTIONS["tone"] for n in range(12)}
    found = decide(model, tokenizer, "x", names, seed=0, raw=True)
    assert len(found.canvases) > 1 and max(found.canvases) <= 24 and found.passes == 1
    vocabulary = Vocabulary(tokenizer, 416, (1, 5))
    asked = read_questions(names)
    frames = lines(vocabulary, asked, labels_for(tokenizer, vocabulary, asked), 24)
    assert [number for frame in frames for number, _, _ in frame.slots] == list(range(12))
    text = vocabulary.decode(
        [t if t != FREE else frames[0].slots[0][2][0] for t in frames[0].tokens]
    )
    assert text.startswith("1: A\n2: A\n")


def test_a_state_that_goes_on_is_encoded_from_where_it_does():
    model, tokenizer = tiny(48)
    cache = model.make_cache()
    first, given = "a b " * 40, {"seed": 1, "raw": True}
    one = decide(model, tokenizer, first, QUESTIONS, prefix_cache=cache, **given)
    longer = first + "1 b " * 9
    two = decide(model, tokenizer, longer, QUESTIONS, prefix_cache=cache, rotate=True, **given)
    known = len(tokenizer.encode(first, add_special_tokens=False))
    assert one.cached_tokens == 0 and known - 2 <= two.cached_tokens <= known + 1
    again = decide(model, tokenizer, longer, QUESTIONS, rotate=True, **given)
    for name, answer in again.answers.items():
        assert two.answers[name].probabilities == pytest.approx(answer.probabilities, abs=1e-5)


def test_a_request_waits_once_on_a_gpu():
    config = ModelConfig.from_dict(config_like(RELEASE, 2))
    names = {f"q{n}": QUESTIONS["tone"] for n in range(12)}
    with as_on_a_gpu():
        model = blank_model(config, chosen_recipe(None, "4bit"), mx.bfloat16)
        model.compile()
        tokenizer = gemma_like.build()
        decide(model, tokenizer, "x", names, seed=0, raw=True, draws=2)
        with counted() as counts:
            found = decide(model, tokenizer, "x", names, seed=0, raw=True, draws=4)
    assert counts.waits <= 1 and found.passes == 1 and found.canvases == (64,)


def test_the_frame_follows_the_empty_channel():
    """Where the template ends the prompt without thinking by an empty channel."""
    model, _ = tiny(48)
    template = gemma_like.TEMPLATE.replace(
        "<|turn>model\n{% endif %}",
        "<|turn>model\n{% if not (enable_thinking is defined and enable_thinking) %}"
        "<|channel>thought\n<channel|>{% endif %}{% endif %}",
    )
    tokenizer = gemma_like.build(template)
    cache = model.make_cache()
    decide(model, tokenizer, "x", QUESTIONS, seed=0, prefix_cache=cache)
    assert tokenizer.decode(cache.prefix.ids).endswith(
        "<|turn>model\n<|channel>thought\n<channel|>"
    )


def test_the_demo_model_fills_all_blanks_of_a_sudoku_at_once():
    model, tokenizer = demo()
    right = count = 0
    for seed in range(3):
        puzzle = sudoku.make_puzzle(np.random.default_rng(seed))
        cells = [n for n, sign in enumerate(puzzle.givens) if sign == "."]
        frame = "".join(
            f"{{c{n}}}" if sign == "." else sign for n, sign in enumerate(puzzle.givens)
        )
        digits = {"type": "choice", "criteria": dict.fromkeys("123456")}
        found = decide(
            model, tokenizer, sudoku.prompt([puzzle]), {f"c{n}": digits for n in cells},
            frame=frame, seed=seed, steps=4, canvas_length=64,
        )  # fmt: skip
        assert found.canvases == (64,)
        right += sum(found.answers[f"c{n}"].best == puzzle.solution[n] for n in cells)
        count += len(cells)
    assert right / count > 0.9


@pytest.mark.slow
def test_every_number_of_options_has_labels_of_one_token():
    vocabulary = Vocabulary(big(), 262_144, EOS)
    for count in (2, 26, 63, 255):
        asked = read_questions(
            {"c": {"type": "choice", "criteria": {f"option {n}": None for n in range(count)}}}
        )
        (labels,) = labels_for(big(), vocabulary, asked)
        assert len(set(labels)) == count and labels[0] in "Aa"
        (frame,) = lines(vocabulary, asked, [labels], 256)
        (_, place, tokens) = frame.slots[0]
        spelled = [vocabulary.pieces[each].decode().strip() for each in tokens]
        assert spelled == labels and frame.tokens[place] == FREE
        assert length_of(frame, 256) == 16


def test_confidence_and_the_wire_format():
    model, tokenizer = tiny(48)
    found = decide(model, tokenizer, {"k": [1, "é"]}, QUESTIONS, seed=7, raw=True)
    answers = {name: answer.as_json() for name, answer in found.answers.items()}
    assert json.loads(json.dumps(answers)) == answers
    assert set(answers["spam"]) == {"type", "noul", "spread", "confidence"}
    urgency = answers["urgency"]
    assert urgency["legend"] == {"0": "low", "1": "mid", "2": "high", "3": "now"}
    assert urgency["score"] == pytest.approx(
        sum(int(level) * p for level, p in urgency["probabilities"].items())
    )
    tone = answers["tone"]["probabilities"]
    assert list(tone) == list(TONES) and sum(tone.values()) == pytest.approx(1)
    assert answers["tone"]["choice"] == max(tone, key=tone.__getitem__)
    one = found.answers["tone"]
    flat, sure = (Answer(one.question, (), one.log_probs, p, p) for p in (
        (1 / 3, 1 / 3, 1 / 3), (0.0, 1.0, 0.0)
    ))  # fmt: skip
    assert (flat.confidence, sure.confidence) == (pytest.approx(0), 1.0)


CHOICE = {"type": "choice", "criteria": {"a": None, "b": None}}
DEEP = {}
for _ in range(70):
    DEEP = {"x": DEEP}


@pytest.mark.parametrize(
    ("state", "question", "settings", "message"),
    [
        ("x", {"type": "rank"}, {}, "question 'q': type 'rank' is unknown; known are noul, choice"),
        ("x", {"type": "choice", "criteria": {"a": None}}, {}, "question 'q' has 1 option; give"),
        (
            "x",
            {"type": "choice", "criteria": {str(n): None for n in range(256)}},
            {},
            "question 'q' has 256 options; give 2 to 255.",
        ),
        ("x", {"type": "score", "criteria": ["a", "b", "a "]}, {}, "question 'q' has two options"),
        ("x", {"type": "choice", "criteria": {"a": None, " a": None}}, {}, "question 'q' has two "),
        (
            "x",
            {"type": "choice", "criteria": {f"o{n}": None for n in range(200)}},
            {},
            "question 'q' has 200 options, and the model's vocabulary has labels of one token for ",
        ),
        ("x", CHOICE | {"instructions": DEEP}, {}, "question 'q' is nested more than 64 levels"),
        ("x", CHOICE | {"answer": 1}, {}, "question 'q': 'answer' is unknown; known are type, in"),
        ("x", "is it?", {}, "question 'q' must be an object with a type, not 'is it?'."),
        (DEEP, CHOICE, {}, "the state is nested more than 64 levels deep; flatten it."),
        ({"a": float("nan")}, CHOICE, {}, "the state is not JSON: "),
        (" \n", CHOICE, {}, "the state is empty; say what the questions are about."),
        ([], CHOICE, {}, "the state is empty; say what the questions are about."),
        ("x" * 5000, CHOICE, {}, "the state takes "),
        ("x", CHOICE | {"instructions": "y" * 5000}, {}, "question 'q', number 1 of 1, does not f"),
        ("x", CHOICE, {"draws": 0}, "draws must be an integer of at least 1, not 0."),
        ("x", CHOICE, {"frame": "{q} {r}"}, "the frame has a place 'r' that is not the bare name"),
        ("x", CHOICE, {"frame": "{q} {q}"}, "question 'q' has 2 places in the frame; give it one"),
        ("x", CHOICE, {"frame": "{q}", "rotate": True}, "rotate changes the order in which option"),
        ("x", CHOICE, {"frame": "{q}" + "<" * 70}, "the frame takes 71 tokens, and the canvas ho"),
        (
            "x",
            {"type": "choice", "criteria": {"a": None, "bc": None}},
            {"frame": "{q}"},
            "question 'q': 'bc' is not one token of the model's vocabulary where it is to stand;",
        ),
        ("x", CHOICE, {"canvas_length": 4}, "question 'q': its line takes 5 tokens, and the c"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_that_names_the_question(state, question, settings, message):
    model, tokenizer = demo()
    with pytest.raises(UsageError) as error:
        decide(model, tokenizer, state, {"q": question}, seed=0, raw=True, **settings)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_the_first_question_that_does_not_fit_is_named():
    model, tokenizer = demo()
    asked = {f"q{n}": CHOICE | {"instructions": "y" * 300} for n in range(40)}
    with pytest.raises(PromptError) as error:
        decide(model, tokenizer, "x", asked, seed=0, raw=True)
    assert str(error.value).startswith("question 'q12', number 13 of 40, does not fit in the ")
    read = read_questions(asked)
    twelve, thirteen = (
        len(f"x\n\n{listing(read[:count], [['A', 'B']] * count)}") for count in (12, 13)
    )
    # A token a character, and the longest of the canvases that hold 40 lines.
    assert twelve + 64 <= 4096 < thirteen + 64
