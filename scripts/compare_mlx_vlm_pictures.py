"""Does mlx-vlm see in a picture what we see, from the same files, and who is faster?

    pip install mlx-vlm==0.7.10        # in an environment that also has this package
    python scripts/compare_mlx_vlm_pictures.py

Writes a random checkpoint with a vision tower, reads a picture with both (features equal to 1e-4 of
the largest), has mlx-vlm save its model, plain and quantized, and loads that here. Then times the
tower in the release's width (`--layers` of its 27) on pictures of 280 soft tokens, in turns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_vlm.models.gemma4.config import VisionConfig as TheirConfig
from mlx_vlm.models.gemma4.vision import VisionModel
from mlx_vlm.utils import load_model as load_theirs
from mlx_vlm.utils import save_config, save_weights

from make_tiny_checkpoint import REAL_VISION, SMALL, SMALL_VISION, make_config, write_checkpoint
from mlx_diffgemma import load_model
from mlx_diffgemma.config import VisionConfig
from mlx_diffgemma.model.vision import VisionTower
from mlx_diffgemma.pictured import PictureSpan
from mlx_diffgemma.reading import Section
from mlx_diffgemma.text.pictures import Picture, read_picture

WIDE = {**SMALL_VISION, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "head_dim": 32, "position_embedding_size": 256}  # fmt: skip


def picture_for(vision: VisionConfig, soft_tokens: int) -> Picture:
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype(np.uint8)
    return read_picture(image, vision, soft_tokens)


def values(picture: Picture) -> mx.array:
    """[1, 3, height, width] from 0 to 1, as mlx-vlm takes it."""
    return mx.array(picture.pixels.transpose(2, 0, 1)[None]).astype(mx.float32) / 255


def ours(folder: Path) -> np.ndarray:
    model, _ = load_model(folder, dtype=mx.float32)
    picture = picture_for(model.config.vision, 70)
    span = PictureSpan(0, picture.soft_tokens, "", picture.patches, picture.columns)
    return np.array(model.embed_picture(span))


def theirs(model: nn.Module, vision: VisionConfig) -> np.ndarray:
    seen = model.model.encoder.get_image_features(values(picture_for(vision, 70)))
    return np.array(seen.astype(mx.float32))[0]


def compare(name: str, a: np.ndarray, b: np.ndarray) -> bool:
    apart = np.abs(a - b).max() / np.abs(b).max()
    print(f"| {name} | {a.shape[0]} | {apart:.1e} |", flush=True)
    return a.shape == b.shape and bool(apart <= 1e-4)


def interoperate() -> bool:
    print("| what | soft tokens | largest difference / largest feature |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        source, saved = Path(folder) / "ours", Path(folder) / "theirs"
        raw = make_config(SMALL, WIDE, 2)
        write_checkpoint(source, raw)
        vision = load_model(source, lazy=True)[0].config.vision
        model = load_theirs(source)
        model.set_dtype(mx.float32)
        good = compare("a checkpoint as we write it", ours(source), theirs(model, vision))
        for name in ("plain", "quantized"):
            if name == "quantized":
                nn.quantize(
                    model, 32, 8, class_predicate=lambda path, _: path.endswith("_proj.linear")
                )
                entry = {"group_size": 32, "bits": 8, "mode": "affine"}
                raw["quantization"] = dict(entry)
            save_weights(saved, model)
            save_config(dict(raw), saved / "config.json")
            shutil.copy(source / "generation_config.json", saved)
            good &= compare(f"what they save, {name}", ours(saved), theirs(model, vision))
            shutil.rmtree(saved)
    return good


def time_towers(layers: int, rounds: int) -> float:
    """Seconds of ours over seconds of theirs, the median of rounds taken in turns."""
    raw = {**make_config(SMALL, REAL_VISION, 1)["vision_config"], "num_hidden_layers": layers}
    config = VisionConfig.read(Section(raw), 280)
    tower, other = (
        VisionTower(config),
        VisionModel(TheirConfig.from_dict(json.loads(json.dumps(raw)))),
    )
    tower.eval()
    other.eval()
    picture = picture_for(config, 280)
    patches = mx.array(picture.patches)[None].astype(mx.float32) / 255
    pixels = values(picture)
    mx.eval(tower.parameters(), other.parameters(), patches, pixels)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(rounds + 1):
        for name, run in (
            ("ours", lambda: tower(patches, picture.columns)),
            ("theirs", lambda: other(pixels)),
        ):
            mx.reset_peak_memory()
            begun = time.perf_counter()
            mx.eval(run())
            if turn:
                seconds[name].append(time.perf_counter() - begun)
                print(
                    f"{name}: {seconds[name][-1]:.2f} s, {mx.get_peak_memory() / 1e9:.2f} GB",
                    flush=True,
                )
            mx.clear_cache()
    share = float(np.median(seconds["ours"]) / np.median(seconds["theirs"]))
    print(f"{layers} layers, {len(patches[0])} patches: ours takes {share:.2f} of their time")
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=1, help="of the tower that is timed")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    good = interoperate()
    good &= time_towers(args.layers, args.rounds) <= 1.0
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
