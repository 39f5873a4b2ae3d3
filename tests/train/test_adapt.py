"""Adapters: where they go, that they change nothing at first, and that fusing changes nothing."""

from __future__ import annotations

import json

import adapter_models as models
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from one_pass import decoded, encoded

from mlx_diffgemma import load_model
from mlx_diffgemma.checkpoint.adapters import adapted_modules, fingerprint, load_adapters
from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma.train.adapt import DEFAULT_TARGETS, prepare, target_modules
from mlx_diffgemma.train.fuse import fuse

each_format = pytest.mark.parametrize("fmt", models.FORMATS, ids=str)
each_kind = pytest.mark.parametrize("kind", ["lora", "dora"])
DORA_KEYS = ("attn", "mlp", "self_conditioning")


def keys_for(kind: str) -> tuple[str, ...]:
    return models.EVERYWHERE if kind == "lora" else DORA_KEYS


def adapted(kind: str, fmt=models.PLAIN, keys=None):
    model = models.small_model(fmt)
    config = models.settings(kind, keys or keys_for(kind))
    named = prepare(model, config)
    return model, config, named


def near(ours: np.ndarray, expected: np.ndarray, bound: float) -> None:
    assert np.abs(ours - expected).max() <= bound * np.abs(expected).max()


@each_kind
@each_format
def test_at_first_an_adapter_changes_nothing(kind, fmt):
    expected = models.logits(models.small_model(fmt))
    model, _, _ = adapted(kind, fmt)
    model.eval()
    if kind == "lora":
        assert np.array_equal(models.logits(model), expected)
    else:
        near(models.logits(model), expected, 1e-5)


@each_kind
@each_format
def test_the_base_stays_frozen_and_every_adapter_gets_a_gradient(kind, fmt):
    model, _, _ = adapted(kind, fmt)
    models.train_somehow(model)
    ids = range(7, 27)

    def loss(model):
        hidden = decoded(model, ids, encoded(model, ids)[1], mx.ones((20, 64)))
        return mx.square(model.logits(hidden)).mean()

    gradients = tree_flatten(nn.value_and_grad(model, loss)(model)[1])
    leaves = {"lora_a", "lora_b"} | ({"m"} if kind == "dora" else set())
    assert {name.rpartition(".")[2] for name, _ in gradients} == leaves
    assert len(gradients) == len(leaves) * len(adapted_modules(model))
    for name, gradient in gradients:
        assert mx.abs(gradient).max().item() > 0, name


@each_kind
@each_format
def test_fused_weights_do_what_the_adapter_does(kind, fmt):
    model, _, _ = adapted(kind, fmt)
    before = models.logits(models.small_model(fmt))
    models.train_somehow(model)
    model.eval()
    expected = models.logits(model)
    assert np.abs(expected - before).max() > 0.1  # or the test would show nothing
    fuse(model, dequantize=True)
    assert not adapted_modules(model)
    model.eval()
    near(models.logits(model), expected, 1e-5)


def test_fusing_keeps_the_format_of_a_quantized_base():
    fmt = ("affine", 8, 32)
    model, _, _ = adapted("lora", fmt)
    names = dict(tree_flatten(models.small_model(fmt).parameters()))
    models.train_somehow(model)
    model.eval()
    expected = models.logits(model)
    fuse(model)
    model.eval()
    fused = dict(tree_flatten(model.parameters()))
    shapes = {name: (array.shape, array.dtype) for name, array in fused.items()}
    assert shapes == {name: (array.shape, array.dtype) for name, array in names.items()}
    difference = np.abs(models.logits(model) - expected)
    assert np.median(difference) < 0.05 * np.abs(expected).max()
    with pytest.raises(UsageError, match="no adapters to fuse"):
        fuse(model)


@each_kind
def test_what_is_saved_loads_in_both_programs(tmp_path, kind):
    from mlx_lm.tuner.utils import load_adapters as load_in_mlx_lm

    mark = fingerprint(models.small_model())
    model, config, named = adapted(kind)
    models.train_somehow(model)
    models.save(model, tmp_path, config, named, mark)
    model.eval()
    expected = models.logits(model)
    for load in (load_adapters, load_in_mlx_lm):
        other = models.small_model()
        load(other, str(tmp_path))
        other.eval()
        assert np.array_equal(models.logits(other), expected)


def test_dropout_is_off_once_loaded(tmp_path):
    model = models.small_model()
    lora = models.LoraParameters(rank=4, dropout=0.5)
    config = models.TrainConfig(lora_parameters=lora)
    named = prepare(model, config)
    models.train_somehow(model)
    assert not np.array_equal(models.logits(model), models.logits(model))
    models.save(model, tmp_path, config, named, fingerprint(models.small_model()))
    other = models.small_model()
    load_adapters(other, tmp_path)
    assert np.array_equal(models.logits(other), models.logits(other))


@pytest.mark.parametrize(
    ("selectors", "num_layers", "expected"),
    [
        (DEFAULT_TARGETS, -1, {"self_attn.q_proj", "mlp.down_proj"}),
        (["attn.q_proj"], -1, {"self_attn.q_proj"}),
        (["mlp"], 1, {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        (["layers[-1].experts"], -1, {"experts.gate_up_proj", "experts.down_proj"}),
        (["self_conditioning"], 1, {"gate_proj", "up_proj", "down_proj"}),
        (["*.o_proj"], -1, {"self_attn.o_proj"}),
        (["all"], -1, {"experts.down_proj", "self_attn.k_proj"}),
    ],
)
def test_targets(selectors, num_layers, expected):
    model = models.small_model()
    paths = target_modules(model, selectors, num_layers)
    last = f"model.decoder.layers.{len(model.layers) - 1}."
    assert not any("router" in path or "embed" in path for path in paths)
    inside = [path for path in paths if path.startswith(last)]
    outside = [path for path in paths if ".layers." not in path]
    if num_layers == 1 or selectors[0].startswith("layers["):
        assert len(inside) + len(outside) == len(paths)
    names = {path.removeprefix(last) for path in inside}
    names |= {path.removeprefix("model.decoder.self_conditioning.") for path in outside}
    assert names == expected if len(names) < 4 else names >= expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keys": ("attn.w_proj",)}, "target 'attn.w_proj' matches no module"),
        ({"keys": ("attn", "router")}, "target 'router' names the router, which stays frozen"),
        ({"keys": ("embedding",)}, "cannot take an adapter"),
        ({"num_layers": 99}, "num_layers is 99, and the model has"),
        ({"kind": "dora", "keys": ("experts",)}, "experts take no DoRA"),
        ({"kind": "full", "fmt": ("affine", 8, 32)}, "full fine-tuning needs unquantized weights"),
    ],
)
def test_what_cannot_be_trained_is_said_in_a_line(settings, words):
    model = models.small_model(settings.pop("fmt", models.PLAIN))
    with pytest.raises(UsageError, match=words.replace("[", r"\[")) as caught:
        prepare(model, models.settings(**settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_layers", [-1, 1])
def test_full_training_leaves_the_router_alone(num_layers):
    model = models.small_model()
    prepare(model, models.settings("full", num_layers=num_layers))
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
    everything = {name for name, _ in tree_flatten(model.parameters())}
    last = f"model.decoder.layers.{len(model.layers) - 1}."
    allowed = {name for name in everything if ".router." not in name}
    if num_layers == 1:
        allowed = {name for name in allowed if name.startswith(last)}
    assert trained == allowed


def test_full_weights_are_saved_and_loaded(tmp_path):
    model = models.small_model()
    config = models.settings("full", keys=("attn",))
    named = prepare(model, config)
    models.train_somehow(model)
    models.save(model, tmp_path, config, named, fingerprint(models.small_model()))
    other = models.small_model()
    load_adapters(other, tmp_path)
    model.eval()
    assert np.array_equal(models.logits(other), models.logits(model))


def test_adapters_fit_their_base_in_any_format_and_no_other(tmp_path):
    base = models.small_model()
    mark = fingerprint(base)
    model, config, named = adapted("lora")
    models.save(model, tmp_path, config, named, mark)
    load_adapters(models.small_model(("affine", 8, 32)), tmp_path)
    in_bf16 = models.small_model()
    in_bf16.set_dtype(mx.bfloat16)
    assert fingerprint(in_bf16) == mark
    load_adapters(in_bf16, tmp_path)
    other = models.small_model(seed=2)
    fine_tuned = models.small_model()
    first = fine_tuned.layers[0].mlp.down_proj
    first.weight = first.weight + 0.01
    for wrong in (other, fine_tuned):
        with pytest.raises(CheckpointError, match=r"are of another base model \(base\)") as caught:
            load_adapters(wrong, tmp_path)
        assert "\n" not in str(caught.value)


def test_a_fingerprint_need_not_hold_the_model_in_memory():
    model, _ = load_model("demo", lazy=True)
    mark = fingerprint(load_model("demo")[0])
    mx.clear_cache()
    before = mx.get_active_memory()
    assert fingerprint(model, release=True) == mark
    assert mx.get_active_memory() - before < 200_000  # of 9 MB


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: c.pop("num_layers"), "not as mlx-lm writes them"),
        (lambda c: c["lora_parameters"].pop("rank"), "not as mlx-lm writes them"),
        (lambda c: c["lora_parameters"].update(keys=["nothing"]), "name no module of this model"),
        (lambda c: c["lora_parameters"].update(rank=5), "do not belong together"),
        (lambda c: c["lora_parameters"].update(keys=["self_attn.q_proj"]), "has no place"),
        (lambda c: c.update(num_layers=1), "has no place"),
    ],
)
def test_damaged_adapters(tmp_path, damage, words):
    model, config, named = adapted("lora")
    models.save(model, tmp_path, config, named, fingerprint(models.small_model()))
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=words) as caught:
        load_adapters(models.small_model(), tmp_path)
    assert "\n" not in str(caught.value)


def test_truncated_adapters(tmp_path):
    model, config, named = adapted("lora")
    models.save(model, tmp_path, config, named, fingerprint(models.small_model()))
    path = tmp_path / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_adapters(models.small_model(), tmp_path)
