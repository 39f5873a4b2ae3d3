"""Probabilities of choices, beside logits computed without any code of this room."""

from __future__ import annotations

import numpy as np
import pytest
from one_pass import decoded, encoded
from small_models import demo, tiny

from mlx_diffgemma.demo import sudoku
from mlx_diffgemma.diffusion.noise import SeededNoise
from mlx_diffgemma.editing.choose import choose
from mlx_diffgemma.errors import UsageError

RAW = {"raw": True, "bare": True}


def log_probs(model, prompt, canvas):
    """[C, V] of one canvas behind one prompt."""
    hidden = decoded(model, canvas, encoded(model, prompt)[1])
    logits = np.array(model.logits(hidden)).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def noise_canvas(model, seed, draw=0):
    size = model.config.canvas_length, model.config.text.vocab_size
    return SeededNoise(seed).initial(draw, *size).tolist()


def test_one_token_is_a_softmax_of_the_logits_at_its_place():
    model, tokenizer = tiny()
    words = ["a", "b", "<", "1"]
    (found,) = choose(model, tokenizer, "q: b", words, frame="x{}<!", seed=7, **RAW)
    ids = [tokenizer.encode(word, add_special_tokens=False)[0] for word in words]
    canvas = [5] * model.config.canvas_length
    canvas[:4] = tokenizer.encode("xa<!", add_special_tokens=False)
    canvas[1] = noise_canvas(model, 7)[1]
    seen = log_probs(model, tokenizer.encode("q: b"), canvas)[1, ids]
    expected = np.exp(seen) / np.exp(seen).sum()
    assert list(found.probabilities.values()) == pytest.approx(expected.tolist(), rel=1e-4)
    assert found.passes == 1
    assert found.best == words[int(expected.argmax())]


def test_longer_choices_are_seen_token_by_token():
    model, tokenizer = tiny()
    words = ["1", "12", "<1"]
    (found,) = choose(model, tokenizer, "q", words, seed=3, **RAW)
    noise, totals = noise_canvas(model, 3), []
    for word in words:
        ids = [*tokenizer.encode(word, add_special_tokens=False), 5]
        total = 0.0
        for place, token in enumerate(ids):
            canvas = [5] * model.config.canvas_length
            canvas[:place] = ids[:place]
            canvas[place : len(ids)] = noise[place : len(ids)]
            total += log_probs(model, tokenizer.encode("q"), canvas)[place, token]
        totals.append(total)
    expected = np.exp(totals) / np.exp(totals).sum()
    assert list(found.probabilities.values()) == pytest.approx(expected.tolist(), rel=1e-3)


@pytest.mark.parametrize("words", [["1", "2", "a"], ["1", "12", "<1", "ab"]])
def test_order_does_not_matter_and_probabilities_sum_to_1(words):
    model, tokenizer = tiny()
    questions = ["x", "a longer one", "b"]
    given = {"seed": 5, "draws": 3, **RAW}
    forward = choose(model, tokenizer, questions, words, **given)
    backward = choose(model, tokenizer, questions, words[::-1], **given)
    for one, other in zip(forward, backward, strict=True):
        assert sum(one.probabilities.values()) == pytest.approx(1.0)
        for word in words:
            assert one.probabilities[word] == pytest.approx(other.probabilities[word], rel=1e-4)
            assert one.spread[word] == pytest.approx(other.spread[word], abs=1e-5)
        assert max(one.spread.values()) > 0


def test_questions_do_not_touch_each_other():
    model, tokenizer = tiny()
    together = choose(model, tokenizer, ["x", "a longer one"], ["1", "2"], seed=5, **RAW)
    alone = choose(model, tokenizer, "a longer one", ["1", "2"], seed=5, **RAW)
    assert together[1].probabilities == pytest.approx(alone[0].probabilities, rel=1e-4)


def test_the_demo_model_knows_the_missing_digit():
    model, tokenizer = demo()
    puzzle = sudoku.make_puzzle(np.random.default_rng(2))
    right = 0
    for place in range(0, 36, 6):
        cell = place + place // 6
        givens = puzzle.solution[:cell] + "." + puzzle.solution[cell + 1 :]
        (found,) = choose(
            model, tokenizer, f"sudoku\n{givens}", list("123456"),
            frame=puzzle.solution[:cell] + "{}" + puzzle.solution[cell + 1 :], bare=True, seed=1,
        )  # fmt: skip
        right += found.best == puzzle.solution[cell]
    assert right == 6


@pytest.mark.parametrize(
    ("choices", "settings", "message"),
    [
        (["a"], {}, "give at least two choices, all of them different."),
        (["a", "a"], {}, "give at least two choices, all of them different."),
        (["a", ""], {}, "the model's vocabulary cannot write the choice ''; choose another word."),
        (["a", "b"], {"frame": "x"}, "the frame 'x' must hold {} once, where the choice stands."),
        (["a", "b"], {"draws": 0}, "draws must be at least 1, not 0."),
        (
            ["1", "2"],
            {"frame": "<" * 30 + "{}"},
            "the frame with its choice takes 31 tokens, and the canvas holds 24; shorten it.",
        ),
    ],
)
def test_errors(choices, settings, message):
    model, tokenizer = tiny()
    with pytest.raises(UsageError) as error:
        choose(model, tokenizer, "q", choices, **settings, **RAW)
    assert str(error.value) == message


def test_a_word_that_the_vocabulary_lacks():
    model, tokenizer = demo()
    with pytest.raises(UsageError) as error:
        choose(model, tokenizer, "q", ["yes", "né"], **RAW)
    assert str(error.value) == (
        "the model's vocabulary cannot write the choice 'né'; choose another word."
    )
