"""How much work a grammar is beside the model, counted in masks over 262,144 words."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest
from big_vocabulary import EOS, SIZE, big
from daily_schemas import SCHEMAS

from mlx_diffgemma.diffusion.constraints import token_mask
from mlx_diffgemma.diffusion.lookahead import look_ahead, tokens_in
from mlx_diffgemma.editing.grammar import json_schema_matcher
from mlx_diffgemma.editing.vocabulary import Vocabulary


@pytest.mark.slow
def test_a_pass_takes_few_masks():
    """As a pass does: what is forced is taken in, what is known ahead is asked for, a token is
    chosen, and a way out is kept. In the end everything validates."""
    words, ends = Vocabulary(big(), SIZE, EOS), token_mask(EOS, SIZE)
    rng, masks, passes = np.random.default_rng(6), 0, 0
    for schema in SCHEMAS.values():
        matcher = json_schema_matcher(words, schema)
        assert matcher.way_out(256, thorough=True) is not None
        written: list[int] = []
        for _ in range(6):
            forced = matcher.forced()
            matcher.advance(forced)
            written += forced
            if matcher.must_end:
                break
            before = matcher.masks.computed
            allowed = look_ahead(matcher, 64, ends)[0]
            passes += 1
            masks += matcher.masks.computed - before
            assert matcher.masks.computed - before <= 40
            choice = [token for token in tokens_in(allowed & ~ends) if words.pieces[token]]
            if not choice:
                break
            token = int(rng.choice(choice))
            after = matcher.copy()
            after.advance([token])
            if after.way_out(256) is None:
                break
            matcher, written = after, [*written, token]
        ending = matcher.way_out(256)
        assert ending is not None
        jsonschema.validate(json.loads(words.decode([*written, *ending])), schema)
    assert masks <= 20 * passes
    print(f"\n{masks / passes:.1f} masks a pass")


def test_masks_are_remembered_by_what_was_written():
    words = Vocabulary(big(), SIZE, EOS)
    matcher = json_schema_matcher(words, {"type": "string"})
    quote = words.encode('"')
    first = matcher.allowed()
    matcher.copy().advance(quote)
    assert matcher.allowed() is first
    inner = [matcher.copy() for _ in range(2)]
    for each in inner:
        each.advance(quote)
    assert inner[0].allowed() is inner[1].allowed() is not first
    assert matcher.masks.computed == 2
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0
