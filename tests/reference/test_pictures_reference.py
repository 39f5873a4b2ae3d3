"""Pixels and the vision tower against transformers.

Run with `-m reference -s` to see the figures.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from PIL import Image
from reference_model import padded_pictures, patch_positions
from tiny_pictures import CLIPPED, PLAIN, drawn, make_vision, make_vision_weights, vision_config
from transformers import DiffusionGemmaTextConfig
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaMultimodalEmbedder,
)
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

from mlx_diffgemma.errors import DiffGemmaError
from mlx_diffgemma.text.pictures import Picture, read_picture

pytestmark = pytest.mark.reference

SIZES = [  # height, width
    (1, 1), (1, 5000), (5000, 1), (1, 2), (2, 1), (3, 700), (700, 3), (16, 16), (47, 48), (48, 48),
    (49, 47), (100, 100), (48, 480), (480, 48), (224, 224), (336, 336), (512, 512), (527, 528),
    (640, 480), (480, 640), (720, 1280), (768, 768), (800, 801), (1024, 1024), (1000, 37),
    (37, 1000), (2000, 1500), (1080, 1920), (3000, 4000), (48 * 20, 48 * 14),
]  # fmt: skip
TEXT = 24


@pytest.mark.parametrize("soft_tokens", [280, 70])
def test_pixels_and_positions(soft_tokens):
    assert len(SIZES) == len(set(SIZES)) == 30
    processor, config = Gemma4ImageProcessorPil(), vision_config(PLAIN)
    sizes = SIZES if soft_tokens == 280 else SIZES[::4]
    largest = 0.0
    for height, width in sizes:
        array = drawn(height, width)
        theirs = processor(Image.fromarray(array), max_soft_tokens=soft_tokens, return_tensors="np")
        ours = read_picture(array, config, soft_tokens)
        count = len(ours.patches)
        assert theirs["num_soft_tokens_per_image"] == [ours.soft_tokens], (height, width)
        positions = theirs["image_position_ids"][0]
        assert np.array_equal(positions[:count], patch_positions(ours)), (height, width)
        assert (positions[count:] == -1).all() and len(positions) == 9 * soft_tokens
        apart = np.abs(theirs["pixel_values"][0, :count] - ours.patches / 255)
        largest = max(largest, float(apart.max()))
    print(f"\n{len(sizes)} sizes, {soft_tokens} tokens: pixels at most {largest:.1e} apart")
    assert largest <= 1 / 255


@pytest.mark.parametrize(
    ("array", "settings"),
    [
        (drawn(32, 32), {"max_soft_tokens": 100}),
        (np.zeros((8, 8, 5), np.uint8), {}),
        (np.zeros((0, 8, 3), np.uint8), {}),
    ],
    ids=["tokens", "colours", "no rows"],
)
def test_what_the_reference_refuses_is_refused(array, settings):
    with pytest.raises(Exception):  # noqa: B017 - of whatever kind theirs is
        Gemma4ImageProcessorPil()(array, return_tensors="np", **settings)
    with pytest.raises(DiffGemmaError):
        read_picture(array, vision_config(PLAIN), settings.get("max_soft_tokens"))


class Pair:
    """The same random tower and projection in both implementations."""

    def __init__(self, raw, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.config = vision_config(raw)
        self.weights = make_vision_weights(self.config, TEXT, seed)
        self.ours = make_vision(self.config, TEXT, self.weights)
        theirs = Gemma4VisionConfig(**raw)
        self.tower = Gemma4VisionModel(theirs).eval()
        text = DiffusionGemmaTextConfig(hidden_size=TEXT)
        self.projection = DiffusionGemmaMultimodalEmbedder(theirs, text).eval()
        for module, prefix in ((self.tower, "vision_tower."), (self.projection, "embed_vision.")):
            whole = f"model.encoder.{prefix}"
            state = {
                name[len(whole) :]: torch.from_numpy(value.copy())
                for name, value in self.weights.items()
                if name.startswith(whole)
            }
            module.load_state_dict(state, strict=True)
            module.to(dtype)

    @torch.no_grad()
    def expected(self, pictures: list[Picture], most: int = 280) -> list[np.ndarray]:
        """What the reference sees in pictures that are padded to one size."""
        values, positions = padded_pictures(pictures, 9 * most)
        seen = self.projection(self.tower(values, positions).last_hidden_state).float().numpy()
        return np.split(seen, np.cumsum([picture.soft_tokens for picture in pictures])[:-1])

    def seen(self, picture: Picture) -> np.ndarray:
        values = mx.array(picture.patches)[None].astype(mx.float32) / 255
        tower, projection = self.ours.vision_tower, self.ours.embed_vision
        return np.array(projection(tower(values, picture.columns))[0].astype(mx.float32))


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, of the largest value."""
    assert ours.shape == theirs.shape  # as many soft tokens
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def pictures(config, most: int = 70) -> list[Picture]:
    sizes = ((90, 200), (300, 300), (1, 5000), (64, 64))
    return [read_picture(drawn(*size), config, most) for size in sizes]


@pytest.mark.parametrize("raw", [PLAIN, CLIPPED], ids=["plain", "clipped and standardized"])
@pytest.mark.parametrize("seed", range(2))
def test_tower_and_projection(raw, seed):
    pair = Pair(raw, seed)
    several = pictures(pair.config)
    worst = max(map(apart, map(pair.seen, several), pair.expected(several, 70)))
    print(f"\ntower, seed {seed}: at most {worst:.1e} of the largest value apart")
    assert worst <= 1e-4


@pytest.mark.parametrize("raw", [PLAIN, CLIPPED], ids=["plain", "clipped and standardized"])
def test_tower_in_bfloat16_within_its_own_rounding(raw):
    """Ours in bf16 is as near to the reference in float32 as the reference in bf16 is."""
    exact, rounded = Pair(raw, 0), Pair(raw, 0, torch.bfloat16)
    several = pictures(exact.config)
    expected = exact.expected(several, 70)
    own = max(map(apart, rounded.expected(several, 70), expected))
    exact.ours.set_dtype(mx.bfloat16)
    worst = max(map(apart, map(exact.seen, several), expected))
    print(f"\ntower in bf16: {worst:.1e} apart, the reference in bf16 {own:.1e}")
    assert worst <= 1.5 * own


def test_quantized_tower_is_that_of_its_dequantized_weights():
    raw = {**PLAIN, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    pair = Pair(raw, 3)
    quantized = pair.ours
    nn.quantize(quantized, 32, 8, class_predicate=lambda path, _: path.endswith("_proj.linear"))
    values = pair.seen(pictures(pair.config)[0])
    layers = dict(quantized.named_modules())
    for name, value in pair.weights.items():
        path = name.removeprefix("model.encoder.").removesuffix(".weight")
        layer = layers.get(path)
        if isinstance(layer, nn.QuantizedLinear):
            packed = (layer.weight, layer.scales, layer.biases)
            value[...] = np.array(mx.dequantize(*packed, group_size=32, bits=8))
    pair.ours = make_vision(pair.config, TEXT, pair.weights)
    assert sum(isinstance(layer, nn.QuantizedLinear) for layer in layers.values()) == 21
    assert apart(values, pair.seen(pictures(pair.config)[0])) <= 1e-5
