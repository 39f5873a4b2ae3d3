"""Other programs in turns: mlx-vlm where it is installed, mlx-lm always."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec

import mlx.core as mx
import numpy as np
import pytest
from demo_checkpoint import CHECKPOINT
from one_pass import decoded, encoded

from mlx_diffgemma import load
from mlx_diffgemma.bench.random_model import chosen_recipe, random_model
from mlx_diffgemma.bench.rival import compare_steps, rival_model, rival_version
from mlx_diffgemma.bench.speed import Answerer, compare_twin
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.diffusion.profiles import PROFILES
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.fitting import diffusion_config

INSTALLED = find_spec("mlx_vlm") is not None


def test_without_mlx_vlm_it_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("mlx_diffgemma.bench.rival.version", missing)
    with pytest.raises(CheckpointError) as error:
        rival_version()
    assert str(error.value) == (
        '--against mlx-vlm: it is not installed; pip install "mlx-vlm==0.7.10".'
    )


@pytest.mark.skipif(not INSTALLED, reason="mlx-vlm is no dependency")
@pytest.mark.parametrize("bits", [None, 4])
def test_their_model_runs_on_our_weights(tiny_config, bits):
    config = tiny_config(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=64, head_dim=16,
        global_head_dim=32,
    )  # fmt: skip
    recipe = chosen_recipe(bits, None)
    model = random_model(ModelConfig.from_dict(config), recipe, mx.float32)
    theirs = rival_model(model)
    canvas = mx.arange(model.config.canvas_length)[None]
    their_cache = theirs.make_cache()
    their_cache = theirs.diffusion_prefill_cache(
        mx.array([[9, 8, 7]]), cache=their_cache, attention_mask=None
    )
    logits = theirs.diffusion_decoder_logits(
        canvas,
        cache=their_cache,
        decoder_attention_mask=theirs.diffusion_decoder_masks(canvas, their_cache, None),
    )
    ours = model.logits(decoded(model, canvas[0], encoded(model, [9, 8, 7])[1]))
    np.testing.assert_allclose(np.array(logits)[0], np.array(ours), atol=2e-3)
    (report,) = compare_steps(model, DiffusionConfig(), prefix=5, repeats=2)
    assert report.name == f"mlx-vlm {rival_version()}, confidence-threshold"
    assert report.ratio == report.ours_seconds / report.theirs_seconds
    assert report.ours_beyond_weights > 0


@pytest.fixture
def twin(tmp_path):
    """A random autoregressive model of one layer with the demo's tokenizer."""
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs

    config = {
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16,
        "num_attention_heads": 2, "rms_norm_eps": 1e-6, "vocab_size": 128,
    }  # fmt: skip
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights, {"format": "mlx"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(CHECKPOINT / name, tmp_path / name)
    return tmp_path


def test_an_autoregressive_model_answers_in_turns_with_ours(twin):
    model, tokenizer = load(CHECKPOINT)
    ours = Answerer(model, tokenizer, "sudoku", profile="fast", max_tokens=8)
    report = compare_twin(str(twin), "sudoku", ours=ours, max_tokens=8, repeats=1)
    assert report.name == f"mlx-lm, {twin}"
    assert 1 < report.tokens <= 8
    assert report.ours_tokens_per_second == ours.responses[-1].generation_tps
    assert report.ratio == report.ours_tokens_per_second / report.tokens_per_second
    assert len(ours.responses) == 2  # one to warm up


@pytest.mark.parametrize("profile", PROFILES)
def test_an_answer_runs_under_its_profile_alone(monkeypatch, profile):
    model, tokenizer = load(CHECKPOINT)
    configs = []

    def generate(model, prompts, config, noise, **options):
        configs.append(config)
        return iter(())

    monkeypatch.setattr("mlx_diffgemma.generation.generate_canvases", generate)
    with pytest.raises(ValueError, match="unpack"):  # no response came
        Answerer(model, tokenizer, "sudoku", profile=profile)()
    assert configs == [diffusion_config(model, profile)]


def test_an_autoregressive_model_alone_has_no_ratio(twin):
    report = compare_twin(str(twin), "sudoku", max_tokens=4, repeats=1)
    assert (report.ours_tokens_per_second, report.ratio) == (None, None)


def test_a_twin_that_is_none_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"^nowhere: no such folder; "):
        compare_twin("nowhere", "x")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(CheckpointError, match=r"^--against mlx-lm: it cannot load .*; name an aut"):
        compare_twin(str(tmp_path), "x")
