"""The loop: what it learns, reports, refuses and keeps."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from training import copies, random_batch, small_model

from mlx_diffgemma.errors import NumericalError
from mlx_diffgemma.fitting import diffusion_config
from mlx_diffgemma.train.config import EVALUATED_NOISE, OPTIMIZERS, TrainConfig
from mlx_diffgemma.train.evaluate import exact_rate
from mlx_diffgemma.train.events import Evaluation, Finished, Report, Saved
from mlx_diffgemma.train.gradients import Stepper
from mlx_diffgemma.train.loop import train

CONFIG = TrainConfig(
    batch_size=32,
    iters=110,
    learning_rate=3e-3,
    warmup=20,
    fine_tune_type="full",
    optimizer_config={"betas": [0.9, 0.98]},
    span_fraction=0.25,
    min_noise=0.01,
    steps_per_report=0,
    steps_per_eval=110,
    save_every=0,
)


def run(model, config, folder, valid=(), **options) -> list:
    return list(train(model, config, copies, valid, folder, **options))


def weights(tree) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(tree)}


def test_a_task_is_learnt(tmp_path):
    """To copy four digits out of the prompt, by loss and by what is generated."""
    model = small_model()
    held_out = copies(1_000_000, 48)
    generation = diffusion_config(model, max_denoising_steps=12)

    def exact(model) -> float:
        return exact_rate(model, held_out, generation, batch_size=48)

    events = run(model, CONFIG, tmp_path, held_out, generate_exact=exact)
    before, after = (event for event in events if isinstance(event, Evaluation))
    assert before.exact == 0 and before.loss > 2 and before.encoder_loss > 2
    assert after.exact >= 0.9
    assert (
        after.loss < 0.1 and after.encoder_loss < 2
    )  # it cannot foresee the digits it begins with
    assert list(after.by_noise) == list(EVALUATED_NOISE)
    assert after.loss == pytest.approx(np.mean(list(after.by_noise.values())))


def test_events(tmp_path):
    config = CONFIG.override(
        batch_size=4, iters=5, steps_per_report=2, steps_per_eval=4, save_every=3, warmup=2
    )
    events = run(small_model(), config, tmp_path, copies(99, 4))
    assert [(type(event), event.step) for event in events] == [
        (Evaluation, 0), (Report, 2), (Saved, 3), (Report, 4), (Evaluation, 4),
        (Report, 5), (Evaluation, 5), (Saved, 5), (Finished, 5),
    ]  # fmt: skip
    first, second, last = (event for event in events if isinstance(event, Report))
    assert first.learning_rate == 3e-3 and last.learning_rate < second.learning_rate
    assert last.tokens == 5 * 4 * (11 + 8)  # prompt and response, and the canvas again
    assert first.loss == pytest.approx(first.canvas_loss + first.encoder_loss, rel=1e-5)
    assert last.seconds_left == 0 and first.grad_norm > 0 and first.examples_per_second > 0
    assert events[1].loss > last.loss or events[0].loss > events[6].loss
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapters.safetensors", "state.safetensors",
    ]  # fmt: skip


def test_only_what_is_trainable_changes_and_is_saved(tmp_path):
    model = small_model()
    model.freeze()
    model.layers[1].self_attn.q_proj.unfreeze()
    before = weights(model.parameters())
    run(model, CONFIG.override(batch_size=2, iters=2, warmup=1), tmp_path)
    after = weights(model.parameters())
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed == ["model.decoder.layers.1.self_attn.q_proj.weight"]
    saved = mx.load(str(tmp_path / "adapters.safetensors"))
    assert list(saved) == changed and np.array_equal(np.array(saved[changed[0]]), after[changed[0]])


def test_evaluations_of_the_same_model_are_equal(tmp_path):
    """Whatever the seed; so two runs can be compared."""
    losses = set()
    for seed in range(2):
        config = CONFIG.override(iters=1, warmup=0, batch_size=8, seed=seed)
        first = run(small_model(), config, tmp_path / str(seed), copies(99, 8))[0]
        losses.add((first.step, first.loss, first.encoder_loss))
    assert len(losses) == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_optimizer_lowers_the_loss(optimizer):
    settings = {"learning_rate": 0.3 if optimizer == "sgd" else 3e-3, "optimizer_config": {}}
    model = small_model()
    stepper = Stepper(model, CONFIG.override(optimizer=optimizer, warmup=0, **settings))
    parameters = model.trainable_parameters()
    state, batch, losses = stepper.fresh_state(parameters), random_batch(model, (3, 6)), []
    for number in range(1, 8):
        result = stepper.step(number, parameters, state, [batch])
        parameters, state = result.parameters, result.optimizer_state
        losses.append(result.losses[0].item())
    assert losses[-1] < losses[0] - 0.3, losses


def test_gradients_are_clipped_all_together():
    model = small_model()
    parameters = model.trainable_parameters()
    moved = {}
    for limit in (0.01, 1e9):
        settings = {"optimizer": "sgd", "optimizer_config": {}, "learning_rate": 0.5, "warmup": 0}
        stepper = Stepper(model, CONFIG.override(clip_norm=limit, **settings))
        result = stepper.step(1, parameters, stepper.fresh_state(parameters), [random_batch(model)])
        before, after = weights(parameters), weights(result.parameters)
        moved[limit] = np.sqrt(sum(((after[n] - before[n]) ** 2).sum() for n in before))
        norm = result.grad_norm.item()
    assert moved[0.01] == pytest.approx(0.5 * 0.01, rel=1e-2)
    assert moved[1e9] == pytest.approx(0.5 * norm, rel=1e-3) and norm > 0.1


def test_accumulation_averages():
    model = small_model()
    model.train()
    parameters = model.trainable_parameters()
    one, other = random_batch(model, seed=1), random_batch(model, conditioned=2, seed=2)

    def after(batches):
        config = CONFIG.override(grad_accumulation_steps=len(batches))
        stepper = Stepper(model, config.override(optimizer="sgd", optimizer_config={}, warmup=0))
        result = stepper.step(1, parameters, stepper.fresh_state(parameters), batches)
        return weights(result.parameters), [loss.item() for loss in result.losses]

    losses = after([one, other])[1]
    parts = [after([batch])[1] for batch in (one, other)]
    np.testing.assert_allclose(losses, np.mean(parts, axis=0), rtol=1e-5)
    for twice, once in zip(after([one, one])[0].values(), after([one])[0].values(), strict=True):
        np.testing.assert_allclose(twice, once, rtol=1e-6)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    model = small_model()
    table = model.model.decoder.embed_tokens
    table.weight = table.weight * float("nan")
    with pytest.raises(NumericalError, match=r"step 1:.*learning_rate"):
        run(model, CONFIG.override(batch_size=2, steps_per_eval=0), tmp_path)
    assert not list(tmp_path.iterdir())
