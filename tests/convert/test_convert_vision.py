"""What becomes of the vision tower in a conversion: kept, packed by name, or left out."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from checkpoints import convert_to, plan_of, read_weights, tiny

from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.checkpoint.quantization import RECIPES, Rule
from mlx_diffgemma.errors import CheckpointError, PromptError, UsageError
from mlx_diffgemma_convert.source import FolderSource
from mlx_diffgemma_convert.verify import compare_with_source, verify

PIXELS = "model.encoder.vision_tower.patch_embedder.input_proj.weight"
WIDE = {**tiny.SMALL_VISION, "hidden_size": 64, "intermediate_size": 80, "head_dim": 64}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision") / "source"
    tiny.write_checkpoint(folder, tiny.make_config(tiny.SMALL, WIDE, 2))
    return folder


def test_recipes_pack_the_tower_by_name_and_never_its_pixels(source, tmp_path):
    recipe, _ = RECIPES["4bit"].with_rules(
        [Rule.parse("vision=8bit/64")], [PIXELS.removesuffix(".weight")], 2
    )
    plan = plan_of(source, recipe)
    convert_to(tmp_path / "out", plan)
    found, before = read_weights(tmp_path / "out"), read_weights(source)
    packed = {name for name in found if "vision" in name and name.endswith(".scales")}
    # 4 of attention, gate and up; the group does not divide the 80 columns of the down projection.
    assert len(packed) == 7 and not any("down_proj" in name for name in packed)
    assert mx.array_equal(found[PIXELS], before[PIXELS])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    named = {path for path in config["quantization"] if "vision" in path}
    assert named <= {name.removesuffix(".scales") for name in packed}
    sizes = {target.name: sum(s.nbytes for s in target.stored()) for target in plan.targets}
    assert sum(array.nbytes for name, array in found.items() if "vision" in name) == sum(
        size for name, size in sizes.items() if "vision" in name
    )
    verify(tmp_path / "out")
    compare_with_source(tmp_path / "out", FolderSource(source))
    load_model(tmp_path / "out", vision=True)


def test_without_the_tower(source, tmp_path):
    plan = plan_of(source, vision=False)
    convert_to(tmp_path / "out", plan)
    assert not any("vision" in name for name in read_weights(tmp_path / "out"))
    assert plan.stored_bytes() < plan_of(source).stored_bytes()
    verify(tmp_path / "out")
    compare_with_source(tmp_path / "out", FolderSource(source))
    model, config = load_model(tmp_path / "out")
    assert "vision_config" not in config
    with pytest.raises(PromptError, match="has no vision tower"):
        model.require_vision()
    with pytest.raises(UsageError, match="keep it"):
        plan_of(source, vision=False, hugging_face=True)


def test_a_tower_that_is_not_whole_is_found(source, tmp_path, monkeypatch):
    from mlx_diffgemma_convert import verify as room

    convert_to(tmp_path / "out", plan_of(source))
    lost = room._check_shard
    monkeypatch.setattr(
        room, "_check_shard", lambda *a: {n: t for n, t in lost(*a).items() if n != PIXELS}
    )
    with pytest.raises(CheckpointError, match=r"input_proj\.weight is missing"):
        verify(tmp_path / "out")
