"""Hugging Face → MLX → Hugging Face, judged by the reference implementation."""

from __future__ import annotations

import subprocess
import sys

import mlx.core as mx
import pytest
import torch
from transformers import DiffusionGemmaForBlockDiffusion

from mlx_diffgemma.checkpoint.quantization import RECIPES
from mlx_diffgemma_convert.job import convert
from mlx_diffgemma_convert.journal import Journal
from mlx_diffgemma_convert.plan import make_plan
from mlx_diffgemma_convert.source import FolderSource

pytestmark = pytest.mark.reference


def convert_to(target, source, recipe="bf16", **options):
    plan = make_plan(FolderSource(source), RECIPES[recipe], **options)
    with Journal(target) as journal:
        convert(plan, journal)
    return target


def load_reference(folder):
    model, info = DiffusionGemmaForBlockDiffusion.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def reference_logits(folder):
    model = load_reference(folder)
    draw = torch.Generator().manual_seed(0)
    vocab = model.config.text_config.vocab_size
    ids = torch.randint(7, vocab, (1, 20), generator=draw)
    canvas = torch.randint(7, vocab, (1, model.config.canvas_length), generator=draw)
    with torch.no_grad():
        return model(input_ids=ids, decoder_input_ids=canvas).logits


@pytest.fixture
def tiny(tmp_path):
    folder = tmp_path / "tiny"
    script = [sys.executable, "scripts/make_tiny_checkpoint.py", str(folder), "--layers", "3"]
    subprocess.run(script, check=True, capture_output=True)
    return folder


def test_there_and_back_gives_equal_logits(tiny, tmp_path):
    mlx = convert_to(tmp_path / "mlx", tiny)
    back = convert_to(tmp_path / "back", mlx, hugging_face=True)
    assert torch.equal(reference_logits(back), reference_logits(tiny))


def test_dequantized_weights_load_in_the_reference(tiny, tmp_path):
    packed = convert_to(tmp_path / "packed", tiny, "8bit")
    plain = convert_to(tmp_path / "plain", packed, dequantize=True, hugging_face=True)
    found, expected = reference_logits(plain), reference_logits(tiny)
    assert not torch.equal(found, expected)
    assert (found - expected).abs().median() < 0.05 * expected.abs().max()


def test_what_the_reference_saves_converts_to_the_same_bytes(tiny, tmp_path):
    """Its own spelling of the config, its own choice among tied weights."""
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(tiny, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    first = convert_to(tmp_path / "first", tiny, "4bit")
    second = convert_to(tmp_path / "second", tmp_path / "saved", "4bit")
    one = mx.load(str(first / "model.safetensors"))
    two = mx.load(str(second / "model.safetensors"))
    assert one.keys() == two.keys()
    for name in one:
        assert mx.array_equal(one[name], two[name]), name
