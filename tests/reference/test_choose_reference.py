"""Choosing beside the reference: the same canvas, the softmax of its logits."""

from __future__ import annotations

import numpy as np
import pytest
from reference_model import Prefix, build_reference
from text.gemma_like import build
from tiny_models import make_config, make_model, make_weights

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.diffusion.noise import SeededNoise
from mlx_diffgemma.editing.choose import choose

pytestmark = pytest.mark.reference


@pytest.mark.parametrize("seed", range(3))
def test_probabilities_are_the_softmax_of_the_references_logits(seed):
    raw = make_config(seed, vocab_size=416)
    config = ModelConfig.from_dict(raw)
    weights = make_weights(config, seed)
    ours, theirs, tokenizer = make_model(config, weights), build_reference(raw, weights), build()
    question, words, draws = "a b", ["a", "b", "1", "<"], 3
    (found,) = choose(
        ours, tokenizer, question, words, frame="x{}!", draws=draws, seed=seed, raw=True, bare=True
    )
    prompt = np.array([tokenizer.encode(question)])
    ids = [tokenizer.encode(word, add_special_tokens=False)[0] for word in words]
    prefix = Prefix(theirs, np.ones_like(prompt))
    prefix.encode(prompt)
    chances = []
    for draw in range(draws):
        noise = SeededNoise(seed).initial(draw, config.canvas_length, 416)
        canvas = np.full((1, config.canvas_length), 5)
        canvas[0, :3] = tokenizer.encode("xa!", add_special_tokens=False)
        canvas[0, 1] = np.array(noise)[1]
        logits = prefix.logits(canvas)[0, 1, ids].astype(np.float64)
        chances.append(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
    expected = np.mean(chances, axis=0)
    assert list(found.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-4)
    assert list(found.spread.values()) == pytest.approx(np.std(chances, axis=0).tolist(), abs=1e-4)
