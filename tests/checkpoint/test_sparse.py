"""Of a repository on the hub, each rank fetches its own bytes, over HTTP, from a hub here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from convert.fake_hub import FakeHub
from huggingface_hub import constants
from mlx.utils import tree_flatten
from tiny_models import make_config, make_weights

from mlx_diffgemma.checkpoint import sparse
from mlx_diffgemma.checkpoint.sparse import SparseCopy, locate_sparse
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.distributed.loading import load_share
from mlx_diffgemma.distributed.shares import Split
from mlx_diffgemma.errors import CheckpointError

REPOSITORY = "someone/tiny-it"
HALVES = Split.even("tensor", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-it")
    data = make_config(1, num_key_value_heads=2, vocab_size=300, hidden_size=56)
    (folder / "config.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text("{}")
    weights = make_weights(ModelConfig.from_dict(data), 1)
    for part in range(2):
        own = dict(list(weights.items())[part::2])
        arrays = {name: mx.array(value) for name, value in own.items()}
        mx.save_safetensors(str(folder / f"model-{part}.safetensors"), arrays)
    return folder


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub(folder, REPOSITORY) as hub:
        environment = hub.environment(tmp_path)
        monkeypatch.setattr(constants, "ENDPOINT", environment["HF_ENDPOINT"])
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(sparse, "_FIRST", 64)
        yield hub


def fetched(hub: FakeHub) -> int:
    return sum(size for name, size in hub.served if name.endswith(".safetensors"))


def test_a_rank_fetches_its_share_once(hub: FakeHub, folder: Path) -> None:
    for rank in range(2):
        wanted = dict(tree_flatten(load_share(folder, HALVES, rank).model.parameters()))
        loaded = load_share(REPOSITORY, HALVES, rank)
        for name, array in tree_flatten(loaded.model.parameters()):
            np.testing.assert_array_equal(array, wanted[name], name)
    total = sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))
    assert fetched(hub) <= total  # both ranks have one copy here
    hub.served.clear()
    load_share(REPOSITORY, HALVES, 1)
    assert fetched(hub) == 0


def test_one_rank_fetches_no_more_than_its_part(hub: FakeHub, folder: Path) -> None:
    read = load_share(REPOSITORY, Split("experts", (1, 5)), 0).bytes_read
    headers = sum(
        8 + int.from_bytes(shard.read_bytes()[:8], "little")
        for shard in folder.glob("*.safetensors")
    )
    assert fetched(hub) == read + headers
    copy = SparseCopy.of(locate_sparse(REPOSITORY))
    assert copy is not None
    for shard, size in copy.sizes.items():
        assert (copy.folder / shard).stat().st_size == size


def test_a_copy_goes_on_where_it_was_broken_off(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "_PIECE", 4096)
    whole = sparse._range_of
    asked = []

    def broken(repository: str, revision: str, shard: str, start: int, stop: int) -> bytes:
        asked.append((shard, start, stop))
        if len(asked) > 30:
            raise OSError("the cable was pulled")
        return whole(repository, revision, shard, start, stop)

    monkeypatch.setattr(sparse, "_range_of", broken)
    with pytest.raises(CheckpointError, match=r"someone/tiny-it .*the cable was pulled"):
        load_share(REPOSITORY, HALVES, 0)
    before = fetched(hub)
    assert before > 60_000
    monkeypatch.setattr(sparse, "_range_of", whole)
    loaded = load_share(REPOSITORY, HALVES, 0)
    again = fetched(hub) - before
    hub.served.clear()
    wanted = dict(tree_flatten(load_share(folder, HALVES, 0).model.parameters()))
    for name, array in tree_flatten(loaded.model.parameters()):
        np.testing.assert_array_equal(array, wanted[name], name)
    # Of what was asked for at the same time as what failed, nothing was noted.
    assert again <= loaded.bytes_read + 4096 - (before - 4 * 4096 - 8192)


def test_a_missing_repository_is_one_line(hub: FakeHub) -> None:
    with pytest.raises(CheckpointError, match="does not exist, or is private"):
        load_share("no/one", HALVES, 0)


def test_ranges_are_joined_and_taken_off() -> None:
    merged = sparse._merged([(5, 9), (0, 3), (3, 4), (7, 12), (20, 20)])
    assert merged == [(0, 4), (5, 12)]
    assert sparse._without([(0, 30)], merged) == [(4, 5), (12, 30)]
    assert sparse._without([(1, 3), (6, 40)], [(0, 4), (10, 12), (39, 50)]) == [(6, 10), (12, 39)]
