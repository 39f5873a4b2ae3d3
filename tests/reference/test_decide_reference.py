"""Typed decisions beside the reference: the same canvases, the softmax of its logits."""

from __future__ import annotations

import numpy as np
import pytest
from reference_model import Prefix, build_reference
from text.gemma_like import build
from tiny_models import make_config, make_model, make_weights

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.diffusion.constraints import FREE
from mlx_diffgemma.diffusion.noise import SeededNoise
from mlx_diffgemma.editing.decide import decide
from mlx_diffgemma.editing.frames import labels_for, lines
from mlx_diffgemma.editing.questions import listing, read_questions
from mlx_diffgemma.editing.vocabulary import Vocabulary

pytestmark = pytest.mark.reference

QUESTIONS = {
    "spam": {"type": "noul", "instructions": "It is spam."},
    "tone": {"type": "choice", "criteria": {"angry": "It is hostile.", "calm": None, "sad": None}},
    "urgency": {"type": "score", "criteria": ["low", "mid", "high"]},
}


@pytest.mark.parametrize("seed", range(3))
def test_probabilities_are_the_softmax_of_the_references_logits(seed):
    raw = make_config(seed, vocab_size=416) | {"canvas_length": 48}
    config = ModelConfig.from_dict(raw)
    weights = make_weights(config, seed)
    ours, theirs, tokenizer = make_model(config, weights), build_reference(raw, weights), build()
    found = decide(ours, tokenizer, "a b", QUESTIONS, draws=3, seed=seed, raw=True)
    vocabulary, asked = Vocabulary(tokenizer, 416, (1, 5)), read_questions(QUESTIONS)
    labels = labels_for(tokenizer, vocabulary, asked)
    (frame,) = lines(vocabulary, asked, labels, 48)
    assert found.canvases == (16,)
    prompt = np.array([tokenizer.encode(f"a b\n\n{listing(asked, labels)}")])
    prefix = Prefix(theirs, np.ones_like(prompt))
    prefix.encode(prompt)
    chances = {name: [] for name in QUESTIONS}
    for draw in range(3):
        canvas = np.array([[*frame.tokens, *[5] * (16 - len(frame.tokens))]])
        noise = np.array(SeededNoise(seed).initial(draw, 16, 416))
        canvas[0] = np.where(canvas[0] == FREE, noise, canvas[0])
        logits = prefix.logits(canvas)[0].astype(np.float64)
        for (_, place, tokens), name in zip(frame.slots, QUESTIONS, strict=True):
            p = np.exp(logits[place, list(tokens)])
            chances[name].append(p / p.sum())
    for name, each in chances.items():
        answer = found.answers[name]
        assert answer.probabilities == pytest.approx(np.mean(each, axis=0).tolist(), abs=1e-5)
        assert answer.spread == pytest.approx(np.std(each, axis=0).tolist(), abs=1e-5)
