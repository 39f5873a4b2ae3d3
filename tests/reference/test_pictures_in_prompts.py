"""Encoder and decoder with pictures in the prompt against transformers, in float32.

The reference gets the masks that its `generate` makes: its `forward` builds those of pictures and
drops them. Run with `-m reference -s` to see the figures.
"""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
import torch
from reference_model import Closeness, RouterGaps, build_reference, padded_pictures
from test_trajectories import compared, report
from tiny_models import make_config, make_model, make_weights
from tiny_pictures import CLIPPED, PLAIN, drawn, make_vision, make_vision_weights

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.encode import encode
from mlx_diffgemma.model.diffusion_gemma import CanvasView
from mlx_diffgemma.pictured import PicturedIds, PictureSpan
from mlx_diffgemma.text.pictures import read_picture

pytestmark = pytest.mark.reference

IMAGE = 6
SHAPES = [(3, 2), (1, 1), (5, 3), (2, 4), (1, 7)]  # soft tokens down and across


class Pair:
    """The same weights in both implementations, the vision tower among them."""

    def __init__(self, seed: int, gain: float = 1.0, feedback: float = 1.0) -> None:
        raw = make_config(seed)
        raw["vision_config"] = CLIPPED if seed % 2 else PLAIN
        self.config = ModelConfig.from_dict(raw)
        assert self.config.vision is not None
        size = self.config.text.hidden_size
        tower = make_vision_weights(self.config.vision, size, seed)
        weights = make_weights(self.config, seed, gain, feedback)
        self.ours = make_model(self.config, weights)
        self.ours.load_vision = lambda: make_vision(self.config.vision, size, tower)
        self.theirs = build_reference(raw, {**weights, **tower})
        self.rng = np.random.default_rng([seed, 4])
        self.gaps = RouterGaps(self.theirs, 1)
        self.hidden, self.logits = Closeness(), Closeness()

    def prompt(self, count: int, length: int) -> PicturedIds:
        """Random ids with `count` pictures among them, about `length` of them beside those."""
        vision, ids, spans = self.config.vision, [], []
        for number in range(count + 1):
            words = max(1, length // (count + 1))
            ids += self.rng.integers(7, self.config.text.vocab_size, words).tolist()
            if number < count:
                down, across = SHAPES[number]
                picture = read_picture(drawn(48 * down, 48 * across, number), vision)
                # A picture of just so many soft tokens, whatever a real one would be enlarged to.
                picture = type(picture)(drawn(48 * down, 48 * across, number), 16, 3)
                start = len(ids)
                ids += [IMAGE] * (down * across)
                key = f"{number} {down} {across}"
                spans.append(PictureSpan(start, len(ids), key, picture.patches, picture.columns))
        return PicturedIds(ids, spans)

    def inputs(self, ids: PicturedIds) -> dict[str, torch.Tensor]:
        """What the reference takes of the pictures, padded to one size."""
        most = max(len(span.patches) for span in ids.pictures)
        values, positions = padded_pictures(ids.pictures, most)
        return {"pixel_values": values, "image_position_ids": positions}

    @torch.no_grad()
    def expected(self, ids: PicturedIds):
        """Hidden states [L, D] of the reference's encoder, and its cache."""
        tokens = torch.tensor([ids])
        encoder = self.theirs.model.encoder
        embeds = encoder.get_input_embeddings()(tokens)
        masks = encoder.create_masks_for_generate(
            config=self.theirs.config.get_text_config(),
            inputs_embeds=embeds,
            attention_mask=torch.ones_like(tokens),
            cache=None,
            position_ids=torch.arange(len(ids))[None],
            mm_token_type_ids=(tokens == IMAGE).long(),
        )
        output = encoder(input_ids=tokens, attention_mask=masks, **self.inputs(ids))
        return output.last_hidden_state.numpy(), output.past_key_values

    def compare(self, ids: PicturedIds, step_sizes: list[int | None]) -> None:
        hidden, cache = self.expected(ids)
        gaps = self.gaps.take()
        whole = {span: self.ours.embed_picture(span) for span in ids.pictures}
        ours = np.array(self.ours.encode([ids], [self.ours.empty_prefix()], [whole])[0])[None]
        tied = self.hidden.add_sequences(ours, hidden, gaps)[0]
        canvas = self.rng.integers(7, self.config.text.vocab_size, self.config.canvas_length)
        with torch.no_grad():
            theirs = self.theirs(
                past_key_values=cache, decoder_input_ids=torch.tensor(canvas)[None]
            ).logits.numpy()
        gaps = np.minimum(gaps, self.gaps.take())
        for step_size in step_sizes:
            held = self.ours.make_cache()
            for _ in encode(self.ours, held, ids, step_size=step_size):
                pass
            assert held.prefix.ids == tuple(ids) and held.prefix.pictures == ids.pictures
            view = CanvasView(mx.array(canvas, mx.int32), held.prefix)
            logits = np.array(self.ours.logits(self.ours.decode([view])))[None]
            if not tied:
                self.logits.add_sequences(logits, theirs, gaps)


@pytest.mark.parametrize("seed", range(4))
def test_pictures_in_prompts_of_any_length_in_any_chunks(seed):
    pair = Pair(seed)
    window = pair.config.text.sliding_window
    for count in (1, 2, 5):
        for length in (count + 1, window + 2, 3 * window):
            pair.compare(pair.prompt(count, length), [None, 1, 3, 7, window, window + 3])
    print(f"\nseed {seed}: logits {pair.logits}\n  encoder {pair.hidden}")
    assert pair.logits.ties + pair.hidden.ties <= 2
    for figures in (pair.logits, pair.hidden):
        assert figures.median <= 1e-5
        assert figures.p999 <= 1e-4
        assert figures.argmax >= 0.999


def test_trajectories_with_pictures():
    """The reference's whole `generate`, and ours given the same draws, over two canvases."""
    comparisons = []
    for seed in range(4):
        pair = Pair(seed, gain=4.0, feedback=0.05)
        ids = pair.prompt(1 + seed % 3, 5 + 4 * seed)
        comparisons.append(
            compared(
                pair.ours,
                pair.theirs,
                [ids],
                DiffusionConfig(max_tokens=2 * pair.config.canvas_length, eos_token_ids=()),
                seed,
                step_size=7,
                mm_token_type_ids=(torch.tensor([ids]) == IMAGE).long(),
                **pair.inputs(ids),
            )
        )
    report("prompts with pictures", comparisons)


def test_the_masks_of_pictures_count():
    """Without them the logits are far from the reference's: the comparison above sees them."""
    pair = Pair(0)
    ids = pair.prompt(2, 20)
    hidden, _ = pair.expected(ids)
    prefix, parts = pair.ours.empty_prefix(), []
    edges = [0, *(place for span in ids.pictures for place in (span.start, span.stop)), len(ids)]
    for first, last in pairwise(edges):
        seen = [span for span in ids.pictures if span.start == first]
        embeddings = pair.ours.embed_picture(seen[0]) if seen else None
        for place in range(first, last):  # one at a time, so that nobody looks ahead
            one = PictureSpan(place, place + 1, "")
            pictures = {} if embeddings is None else {one: embeddings[place - first][None]}
            states, (prefix,) = pair.ours.encode([[ids[place]]], [prefix], [pictures])
            parts.append(states)
    apart = np.abs(np.array(mx.concatenate(parts)) - hidden[0]).max() / np.abs(hidden).max()
    assert apart > 0.01
