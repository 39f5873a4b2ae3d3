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
from mlx_diffgemma.checkpoint.locate import locate
from mlx_diffgemma.checkpoint.sparse import SparseCopy, locate_sparse
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.distributed.loading import LoadedShare, load_share
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


class Asked(list[tuple[str, int, int]]):
    """The ranges that the hub gave; after `most` of them the cable is pulled."""

    most = 1 << 30

    @property
    def bytes(self) -> int:
        return sum(stop - start for _, start, stop in self)


@pytest.fixture
def asked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    asked, given = Asked(), sparse._range_of

    def read(repository: str, revision: str, shard: str, start: int, stop: int) -> bytes:
        if len(asked) >= asked.most:
            raise OSError("the cable was pulled")
        asked.append((shard, start, stop))
        return given(repository, revision, shard, start, stop)

    with FakeHub(folder, REPOSITORY) as hub:
        here = hub.environment(tmp_path)["HF_ENDPOINT"]
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, here)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", here)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(sparse, "_FIRST", 64)
        monkeypatch.setattr(sparse, "_range_of", read)
        yield asked


def headers(folder: Path) -> int:
    """Bytes of the headers of all shards."""
    starts = (shard.read_bytes()[:8] for shard in folder.glob("*.safetensors"))
    return sum(8 + int.from_bytes(start, "little") for start in starts)


def is_the_same(loaded: LoadedShare, folder: Path) -> None:
    wanted = load_share(folder, loaded.share.split, loaded.share.rank).model.parameters()
    expected: dict[str, mx.array] = dict(tree_flatten(wanted))
    for name, array in tree_flatten(loaded.model.parameters()):
        np.testing.assert_array_equal(array, expected[name], name)


def test_ranks_fetch_their_shares_once(asked: Asked, folder: Path) -> None:
    for rank in range(2):
        is_the_same(load_share(REPOSITORY, HALVES, rank), folder)
    assert asked.bytes <= sum(each.stat().st_size for each in folder.glob("*.safetensors"))
    asked.clear()
    load_share(REPOSITORY, HALVES, 1)
    assert not asked


def test_a_rank_fetches_no_more_than_its_part(asked: Asked, folder: Path) -> None:
    loaded = load_share(REPOSITORY, Split("experts", (1, 5)), 0)
    assert asked.bytes == loaded.bytes_read + headers(folder)
    copy = SparseCopy.of(locate_sparse(REPOSITORY))
    assert copy is not None and len(copy.sizes) == 2
    for shard, size in copy.sizes.items():
        assert (copy.folder / shard).stat().st_size == size == (folder / shard).stat().st_size


def test_a_copy_goes_on_where_it_was_broken_off(
    asked: Asked, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "_PIECE", 4096)
    asked.most = 30
    with pytest.raises(CheckpointError, match=r"someone/tiny-it .*the cable was pulled"):
        load_share(REPOSITORY, HALVES, 0)
    before, asked.most = asked.bytes, 1 << 30
    assert before > headers(folder) + 4 * 4096
    loaded = load_share(REPOSITORY, HALVES, 0)
    is_the_same(loaded, folder)
    # What came beside the piece that did not is asked for again.
    assert asked.bytes <= headers(folder) + loaded.bytes_read + 4 * 4096


def test_where_no_hub_can_be_reached_its_cache_will_do(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = "http://127.0.0.1:9"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, closed)
    with monkeypatch.context() as unplugged:
        unplugged.setattr(constants, "ENDPOINT", closed)
        unplugged.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        with pytest.raises(CheckpointError, match=r"someone/tiny-it cannot be fetched"):
            locate_sparse(REPOSITORY)
    whole = locate(REPOSITORY)
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert locate_sparse(REPOSITORY) == whole


def test_a_missing_repository_is_one_line(asked: Asked) -> None:
    with pytest.raises(CheckpointError, match="does not exist, or is private"):
        load_share("no/one", HALVES, 0)


def test_ranges_are_joined_and_taken_off() -> None:
    merged = sparse._merged([(5, 9), (0, 3), (3, 4), (7, 12), (20, 20)])
    assert merged == [(0, 4), (5, 12)]
    assert sparse._without([(0, 30)], merged) == [(4, 5), (12, 30)]
    assert sparse._without([(1, 3), (6, 40)], [(0, 4), (10, 12), (39, 50)]) == [(6, 10), (12, 39)]
