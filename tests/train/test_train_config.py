"""Settings out of range are refused in one line."""

from __future__ import annotations

import pytest

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.train.config import LoraParameters, TrainConfig
from mlx_diffgemma.train.gradients import learning_rate, make_optimizer


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0}, {"iters": 1.5}, {"learning_rate": 0}, {"learning_rate": float("nan")},
        {"lr_schedule": "steep"}, {"optimizer": "sam"}, {"clip_norm": 0}, {"span_fraction": 1.1},
        {"self_conditioning": -0.1}, {"min_noise": 1.0}, {"fine_tune_type": "qlora"},
        {"warmup": 11, "iters": 10}, {"num_layers": 0}, {"encoder_loss_weight": -1},
        {"seed": -1}, {"val_batches": 0}, {"batches": 3},
    ],
    ids=str,
)  # fmt: skip
def test_refused(settings):
    name = next(iter(settings))
    with pytest.raises(UsageError, match=name) as error:
        TrainConfig().override(**settings)
    assert "\n" not in str(error.value)


def test_adapters():
    for settings in ({"rank": 0}, {"scale": 0.0}, {"dropout": 1.0}):
        with pytest.raises(UsageError, match=next(iter(settings))):
            LoraParameters(**settings)


def test_schedules():
    config = TrainConfig(iters=110, warmup=10, learning_rate=2.0, final_learning_rate=0.1)
    rates = [learning_rate(config, step) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[10] == pytest.approx(2.0) and rates[60] == pytest.approx(1.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.2 < rates[-1] < 0.203
    linear = config.override(lr_schedule="linear")
    assert learning_rate(linear, 36) == pytest.approx(2.0 * (0.1 + 0.9 * 0.75))
    assert learning_rate(config.override(lr_schedule="constant"), 110) == 2.0


def test_unknown_settings_of_an_optimizer():
    with pytest.raises(UsageError, match=r"optimizer_config of sgd.*betas"):
        make_optimizer(TrainConfig(optimizer="sgd", optimizer_config={"betas": [0.9, 0.98]}))
