"""Record what the reference implementation computes, for tests that run without torch.

    python scripts/export_reference_trace.py            # writes tests/traces/*.npz

Needs torch and transformers (`pip install -e '.[reference]'`), and the demo checkpoint. The traces:

- `model.npz`: a random tiny model (its config, weights in float32), prompts, canvases, and the
  reference's encoder states and logits, without and with self-conditioning;
- `demo.npz`: runs of the reference's `generate` on the demo model with default settings: prompts,
  every random draw, the draft of every step, and the final tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "reference")]

from demo_checkpoint import demo_config, demo_weights, two_puzzles  # noqa: E402
from recording import record  # noqa: E402
from reference_model import Prefix, RouterGaps, build_reference  # noqa: E402
from tiny_models import make_config, make_weights  # noqa: E402

from mlx_diffgemma.config import FULL, SLIDING, ModelConfig  # noqa: E402

MODEL_SEED, DEMO_SEEDS = 1, range(6)
CLEAR = 2e-5  # a router's choice by less than this could turn on another machine


def model_trace() -> dict[str, np.ndarray]:
    """Two left-padded sequences: a prompt longer than the window, then a committed canvas."""
    raw = make_config(
        MODEL_SEED, hidden_size=24, intermediate_size=20, moe_intermediate_size=8, num_experts=5,
        vocab_size=96, sliding_window=9, layer_types=[SLIDING, FULL, SLIDING, FULL],
        num_hidden_layers=4,
    )  # fmt: skip
    config = ModelConfig.from_dict(raw)
    weights = make_weights(config, MODEL_SEED)
    reference = build_reference(raw, weights)
    rng = np.random.default_rng(MODEL_SEED)
    length, pads = 23, np.array([0, 11])
    mask = np.arange(length) >= pads[:, None]
    prompt = np.where(mask, rng.integers(7, 96, (2, length)), 0)
    committed, canvas = rng.integers(7, 96, (2, 2, config.canvas_length))
    prefix, gaps = Prefix(reference, mask), RouterGaps(reference, 2)
    states = prefix.encode(prompt)
    first = prefix.logits(canvas)
    committed_states = prefix.encode(committed)
    second = prefix.logits(canvas)
    processed = (second / 0.6).astype(np.float32)
    conditioned = prefix.logits(canvas, processed)
    least = gaps.take().min()
    assert least > CLEAR, f"a router is undecided by {least:.1e}: take another MODEL_SEED"
    return {
        "config": np.array(json.dumps(raw)),
        "pads": pads,
        "prompt": prompt,
        "committed": committed,
        "canvas": canvas,
        "encoder_states": states,
        "committed_states": committed_states,
        "logits_behind_prompt": first,
        "logits_behind_canvas": second,
        "logits_conditioned": conditioned,
        "processed": processed,
        **{f"weights.{name}": value for name, value in weights.items()},
    }


def demo_trace() -> dict[str, np.ndarray]:
    """One run a seed; arrays of run r are named `r.…`, of its canvas c `r.c.…`."""
    config = demo_config()
    reference = build_reference(config, demo_weights())
    arrays: dict[str, np.ndarray] = {}
    for run in DEMO_SEEDS:
        prompt = two_puzzles(run)
        gaps = RouterGaps(reference, 1)
        recording = record(
            reference, [prompt], seed=run, max_new_tokens=2 * config["canvas_length"],
            eos_token_id=[1, 5], router_gaps=gaps,
        )  # fmt: skip
        gaps.close()
        arrays[f"{run}.prompt"] = np.array(prompt, np.uint8)
        arrays[f"{run}.tokens"] = recording.sequences.astype(np.uint8)
        for number, canvas in enumerate(recording.canvases):
            name = f"{run}.{number}"
            arrays[f"{name}.initial"] = canvas.initial.astype(np.uint8)
            for field in ("draw", "noise", "draft", "canvas"):
                steps = [getattr(step, field) for step in canvas.steps]
                arrays[f"{name}.{field}"] = np.stack(steps).astype(np.uint8)
            accepted = np.stack([step.accepted for step in canvas.steps])
            arrays[f"{name}.accepted"] = np.packbits(accepted, axis=-1)
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "traces")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, trace in (("model", model_trace()), ("demo", demo_trace())):
        file = out / f"{name}.npz"
        np.savez_compressed(file, **trace)
        print(f"{file}: {len(trace)} arrays, {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
