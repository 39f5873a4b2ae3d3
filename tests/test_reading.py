"""Whatever stands in a file of a checkpoint, or in the place of one, is a line that names it."""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from diffusion.mock_model import MockModel
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_config

from mlx_diffgemma.checkpoint.loading import read_config
from mlx_diffgemma.checkpoint.shards import INDEX, stored_tensors
from mlx_diffgemma.config import ModelConfig, check_generation_ids
from mlx_diffgemma.diffusion.config import DiffusionConfig
from mlx_diffgemma.editing.calibration import Calibration, Fit, Marks
from mlx_diffgemma.errors import CheckpointError, ConfigError, DiffGemmaError, UsageError
from mlx_diffgemma.model.cache import PrefixCache
from mlx_diffgemma.reading import read_object, read_text
from mlx_diffgemma.train import state
from mlx_diffgemma.train.config import TrainConfig

EXAMPLES = int(os.environ.get("MLX_DIFFGEMMA_EXAMPLES", "300"))
NUMBERS = st.one_of(
    st.integers(-3, 70), st.sampled_from([10**30, -(10**30), 10**400, 0.5, 1e300]),
    st.floats(allow_nan=True, allow_infinity=True),
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=4), inside),
    max_leaves=6,
)


def places(content, path=()):
    """The path of every value inside a parsed JSON."""
    yield path
    for key in content if isinstance(content, dict) else range(len(content or ())):
        if isinstance(content[key], (dict, list)):
            yield from places(content[key], (*path, key))
        else:
            yield (*path, key)


def changed(content, path, value):
    """A copy with another value in one place."""
    if not path:
        return value
    whole = copy.deepcopy(content)
    place = whole
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return whole


CONFIG = make_config(1) | {"quantization": {"bits": 4, "group_size": 32, "model.a": {"bits": 8}}}
PER_LAYER = make_config(1, "per_layer")
GENERATION = {
    "eos_token_id": [1, 5], "pad_token_id": 0, "max_new_tokens": 32, "max_denoising_steps": 8,
    "t_min": 0.4, "t_max": 0.8, "stability_threshold": 1, "confidence_threshold": 0.005,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
}  # fmt: skip
MAP = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}


def refused_or_sound(read) -> None:
    """`read` works, or its error is ours and a line."""
    try:
        read()
    except DiffGemmaError as error:
        assert isinstance(error, (ConfigError, CheckpointError))
        assert str(error).isprintable() and len(str(error)) < 500, str(error)


def anywhere(content):
    """Random JSON in the place of the whole or of a part."""
    return st.tuples(st.sampled_from(list(places(content))), VALUES).map(
        lambda both: changed(content, *both)
    )


@settings(max_examples=EXAMPLES, deadline=None)
@given(anywhere(CONFIG) | anywhere(PER_LAYER))
def test_any_config_is_read_or_refused(content):
    def read():
        config = ModelConfig.from_dict(content)
        config.end_token_ids()
        text = config.text
        assert text.num_hidden_layers == len(content["text_config"]["layer_types"])
        assert 0 < text.rms_norm_eps <= 1 and text.pad_token_id < text.vocab_size

    refused_or_sound(read)


@settings(max_examples=EXAMPLES, deadline=None)
@given(anywhere(GENERATION))
def test_any_generation_config_is_read_or_refused(content):
    def read():
        check_generation_ids(content, 64)
        config = DiffusionConfig.from_dict(content)
        assert all(0 <= token < 64 for token in (*config.eos_token_ids, config.pad_token_id))

    refused_or_sound(read)


@settings(max_examples=EXAMPLES, deadline=None)
@given(content=anywhere(MAP))
def test_any_index_is_refused_in_a_line(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "index"
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:  # there are no shards
        stored_tensors(folder)
    assert (str(caught.value).isprintable() and INDEX in str(caught.value)) or "shard" in str(
        caught.value
    )


RUN = {"step": 3, "tokens": 40, "config": asdict(TrainConfig())}


@settings(max_examples=EXAMPLES, deadline=None)
@given(content=anywhere(RUN))
def test_any_state_of_a_run_is_read_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "run"
    folder.mkdir(exist_ok=True)
    arrays = {"parameters.a": mx.zeros(2)}
    mx.save_safetensors(str(folder / state.STATE), arrays, {"run": json.dumps(content)})

    def read():
        found = state.load(folder, {"a": mx.zeros(2)}, TrainConfig())
        assert found.step >= 0 and found.tokens >= 0

    try:
        read()
    except UsageError as error:  # a run of other settings
        assert "was begun with" in str(error) and str(error).isprintable()
    except DiffGemmaError:
        refused_or_sound(read)


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_any_saved_prefix_is_read_or_refused(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "prefix.safetensors"
    prefix = {"format": "mlx-diffgemma prefix 2", "model": "mock", "ids": [3, 4]}
    content = data.draw(anywhere(prefix))
    states = mx.zeros((1, 1, 2, 1))
    arrays = {"0.keys": states, "0.values": states}
    mx.save_safetensors(str(file), arrays, {"prefix": json.dumps(content)})
    refused_or_sound(lambda: PrefixCache.load(file, MockModel()))


MARKS = Marks.of([np.log([0.25, 0.75])] * 4, [0, 1, 0, 1])
CALIBRATION = {
    "format": "mlx-diffgemma calibration 1", "model": "mock", "settings": {"steps": 1},
    "types": {"choice": json.loads(json.dumps(asdict(Fit(1.5, {"a": 0.5}, MARKS, MARKS))))},
}  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None)
@given(content=anywhere(CALIBRATION))
def test_any_calibration_is_refused_in_a_line(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "calibration.json"
    file.write_text(json.dumps(content))

    def read():
        for fit in Calibration.load(file, MockModel()).fits.values():
            assert 0 < fit.temperature < np.inf and np.isfinite(list(fit.bias.values())).all()

    refused_or_sound(read)


def as_a_folder(path: Path) -> None:
    path.mkdir()


def as_a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def as_a_link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def as_latin(path: Path) -> None:
    path.write_bytes('{"a": "ß"}'.encode("latin-1"))


def as_a_well(path: Path) -> None:
    path.write_text("[" * 100_000 + "]" * 100_000)


def as_a_well_of_objects(path: Path) -> None:
    path.write_text('{"a":' * 500 + "0" + "}" * 500)


def as_half(path: Path) -> None:
    path.write_text('{"a": ')


def as_many_digits(path: Path) -> None:
    path.write_text('{"a": ' + "1" * 5000 + "}")


WRONG = {
    as_a_folder: "is a folder, where a file is needed",
    as_a_loop: "cannot be read (its symbolic links lead round in a circle)",
    as_a_link_to_nothing: "has no ",
    as_latin: "is damaged (it is not UTF-8 text)",
    as_a_well: "is damaged (it is nested too deep)",
    as_a_well_of_objects: "is damaged (it is nested too deep)",
    as_half: "is damaged (Expecting value",
    as_many_digits: "is damaged (Exceeds the limit",
}


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_what_stands_in_the_place_of_a_file_is_said(tmp_path, name, make):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(CheckpointError) as caught:
        stored_tensors(tmp_path) if name == INDEX else read_config(tmp_path)
    message = str(caught.value)
    assert WRONG[make] in message and name in message and "\n" not in message
    assert str(tmp_path) in message


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "I/O")])
def test_what_the_file_system_says_is_passed_on(tmp_path, monkeypatch, error):
    def refuse(self):
        raise error

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(
        CheckpointError, match=rf"^/\S+/some cannot be read \({error.strerror}\); check "
    ):
        read_text(tmp_path / "some")


def test_a_file_is_read_as_it_is(tmp_path):
    (tmp_path / "some").write_text('{"a": [1, {"b": "ß"}]}', encoding="utf-8")
    assert read_object(tmp_path / "some") == {"a": [1, {"b": "ß"}]}
    shutil.rmtree(tmp_path)
