"""Settings of the denoising loop: read, overridden, validated."""

from __future__ import annotations

import json

import numpy as np
import pytest
from demo_checkpoint import CHECKPOINT

from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.errors import ConfigError, UsageError

INF, NAN = float("inf"), float("nan")


def test_reads_the_file_of_the_demo_model():
    data = json.loads((CHECKPOINT / "generation_config.json").read_text())
    assert DiffusionConfig.from_dict(data) == DiffusionConfig(
        max_tokens=256,
        max_denoising_steps=48,
        t_min=0.4,
        t_max=0.8,
        entropy_bound=0.1,
        stability_threshold=1,
        confidence_threshold=0.005,
        eos_token_ids=(1, 5),
        pad_token_id=0,
    )


def test_reads_every_setting():
    config = DiffusionConfig.from_dict(
        {
            "max_new_tokens": 7,
            "max_denoising_steps": 9,
            "t_min": 0.1,
            "t_max": 0.9,
            "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.3},
            "stability_threshold": 2,
            "confidence_threshold": 0.5,
            "eos_token_id": 3,
            "pad_token_id": 4,
        }
    )
    assert config == DiffusionConfig(7, 9, 0.1, 0.9, 0.3, 2, 0.5, None, (3,), 4)


def test_an_empty_file_gives_the_reference_defaults():
    assert DiffusionConfig.from_dict({}) == DiffusionConfig()


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("max_tokens", 0, "max_tokens must be an integer of at least 1, not 0."),
        ("max_tokens", 1.5, "max_tokens must be an integer of at least 1, not 1.5."),
        ("max_tokens", True, "max_tokens must be an integer of at least 1, not True."),
        ("max_denoising_steps", 0, "max_denoising_steps must be an integer of at least 1, not 0."),
        (
            "stability_threshold",
            -1,
            "stability_threshold must be an integer of at least 0, not -1.",
        ),
        ("canvas_length", 0, "canvas_length must be an integer of at least 1, not 0."),
        ("t_min", -0.1, "t_min must be a number at least 0, not -0.1."),
        ("t_max", 0, "t_max must be a number above 0, not 0."),
        ("t_max", INF, "t_max must be a number above 0, not inf."),
        ("t_max", NAN, "t_max must be a number above 0, not nan."),
        ("t_max", 0.3, "t_max (0.3) must not be below t_min (0.4)."),
        ("entropy_bound", 0, "entropy_bound must be a number above 0, not 0."),
        ("entropy_bound", "x", "entropy_bound must be a number above 0, not 'x'."),
        ("confidence_threshold", -1, "confidence_threshold must be a number above 0, not -1."),
        ("eos_certainty", 0, "eos_certainty must be a number above 0, not 0."),
        ("eos_certainty", NAN, "eos_certainty must be a number above 0, not nan."),
    ],
)
def test_out_of_range(setting, value, message):
    with pytest.raises(UsageError) as error:
        DiffusionConfig().override(**{setting: value})
    assert str(error.value) == message


def test_override_leaves_what_is_none():
    config = DiffusionConfig(t_min=0.2)
    assert config.override(t_min=None, max_tokens=9) == DiffusionConfig(max_tokens=9, t_min=0.2)


def test_unknown_setting():
    with pytest.raises(UsageError, match=r"^unknown setting 'steps'; known are accept_threshold, "):
        DiffusionConfig().override(steps=3)


def test_unknown_sampler():
    with pytest.raises(ConfigError) as error:
        DiffusionConfig.from_dict({"sampler_config": {"_cls_name": "TopKSamplerConfig"}})
    assert str(error.value) == (
        "generation_config.json: sampler 'TopKSamplerConfig' is unknown; "
        "known is 'EntropyBoundSamplerConfig'."
    )


def test_a_bad_file_names_the_file():
    with pytest.raises(ConfigError) as error:
        DiffusionConfig.from_dict({"t_max": -1})
    assert str(error.value) == ("generation_config.json: t_max must be a number above 0, not -1.")


@pytest.mark.parametrize(
    "data, message",
    [
        ({"sampler_config": "entropy"}, "'sampler_config' must be an object"),
        ({"eos_token_id": "1"}, "a token id must be an integer of at least 0, not '1'"),
        ({"eos_token_id": [1, -1]}, "a token id must be an integer of at least 0, not -1"),
        ({"pad_token_id": 1.5}, "a token id must be an integer of at least 0, not 1.5"),
    ],
)
def test_values_of_another_kind(data, message):
    with pytest.raises(ConfigError, match=message):
        DiffusionConfig.from_dict(data)


@pytest.mark.parametrize("vast", [10**40, 1e300])
def test_a_number_is_a_float_that_float32_holds(vast):
    names = (
        "run_entropy", "entropy_bound", "accept_threshold", "soft_cutoff", "late_bound",
        "eos_certainty", "check_below", "confidence_threshold", "t_max",
    )  # fmt: skip
    config = DiffusionConfig().override(t_min=1, **dict.fromkeys(names, vast))
    for name in ("t_min", *names):
        value = getattr(config, name)
        assert isinstance(value, float) and np.isfinite(np.float32(value)), name


@pytest.mark.parametrize("name", ["bound_share", "encoder_check"])
@pytest.mark.parametrize("value", [-0.1, 1.5, 10**40, NAN])
def test_a_share_is_of_one(name, value):
    with pytest.raises(UsageError, match=name):
        DiffusionConfig(**{name: value})
    for share in (0.0, 1.0):
        assert getattr(DiffusionConfig(**{name: share}), name) == share
