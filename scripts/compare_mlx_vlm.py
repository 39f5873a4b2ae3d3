"""Does mlx-vlm read what our converter writes, and do we read what mlx-vlm saves?

    pip install mlx-vlm==0.7.10        # in an environment that also has this package
    python scripts/compare_mlx_vlm.py ../shared/demo-hf

Converts a checkpoint with several recipes in float32, loads each in both, compares the logits of
one denoising pass, has mlx-vlm save its model, and loads that here. Fails where the largest
difference exceeds 1e-2 of the largest logit.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_vlm.utils import load_model as load_theirs
from mlx_vlm.utils import save_config, save_weights

from mlx_diffgemma import load_model
from mlx_diffgemma.model.diffusion_gemma import CanvasView

RECIPES = ("fp32", "8bit", "4bit", "mxfp4", "mxfp8", "nvfp4")


def ours(folder: Path, prompt: mx.array, canvas: mx.array) -> np.ndarray:
    model, _ = load_model(folder)
    _, (prefix,) = model.encode(prompt.tolist(), [model.empty_prefix()])
    hidden = model.decode([CanvasView(canvas[0], prefix)])
    return np.array(model.logits(hidden))[None]


def theirs(folder: Path, prompt: mx.array, canvas: mx.array, save_to: Path) -> np.ndarray:
    model = load_theirs(folder)
    logits = model(input_ids=prompt, canvas_ids=canvas).logits
    mx.eval(logits)
    save_weights(save_to, model)
    config = dict(load_model(folder, lazy=True)[1])
    save_config(config, save_to / "config.json")
    return np.array(logits.astype(mx.float32))


def compare(name: str, a: np.ndarray, b: np.ndarray) -> bool:
    largest = np.abs(a - b).max() / np.abs(a).max()
    equal = (a.argmax(-1) == b.argmax(-1)).mean()
    print(f"| {name} | {largest:.1e} | {equal:.4f} |", flush=True)
    return bool(largest <= 1e-2)


def main() -> None:
    source = Path(sys.argv[1])
    rng = np.random.default_rng(0)
    good = True
    print("| what | largest difference / largest logit | argmax equal |\n|---|---|---|")
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            target, saved = Path(folder) / "ours", Path(folder) / "theirs"
            command = ["mlx-diffgemma-convert", "--model", source, "--mlx-path", target, "--quiet"]
            recipe_flags = ["--dtype", "float32"] + (
                ["--recipe", recipe] if recipe != "fp32" else []
            )
            subprocess.run([*map(str, command), *recipe_flags], check=True)
            config = load_model(target, lazy=True)[0].config
            prompt, canvas = (
                mx.array(rng.integers(7, config.text.vocab_size, (1, length)))
                for length in (90, config.canvas_length)
            )
            mine = ours(target, prompt, canvas)
            good &= compare(f"{recipe}: in mlx-vlm", mine, theirs(target, prompt, canvas, saved))
            good &= compare(f"{recipe}: saved by mlx-vlm", mine, ours(saved, prompt, canvas))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
