"""Does encoding a long prompt stay linear in time and flat in memory?

    python scripts/bench_prefill.py --openblas /usr/lib/x86_64-linux-gnu/libopenblas.so.0

Random weights in the shapes of `small-262k` (hidden 256, window 1024), once with sliding layers
alone and once with a full layer, whose attention is quadratic by nature. (Of the last layer a
prompt needs only keys and values, so the full layer is not the last.) Beside each length: time a
token against that of the shortest prompt, and the most memory held beside weights and prefix.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import median
from time import perf_counter

from mlx_diffgemma.bench.openblas import load_openblas
from mlx_diffgemma.bench.presets import SMALL, config_like

LENGTHS = (4096, 8192, 16384, 32768)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--stack", choices=["sliding", "full"], action="append")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--openblas", help="path of libopenblas.so.0, on a CPU")
    args = parser.parse_args()
    print(load_openblas(args.openblas) if args.openblas else "MLX's own BLAS")

    import mlx.core as mx

    from mlx_diffgemma.bench.random_model import (
        chosen_dtype,
        chosen_recipe,
        random_model,
        weight_bytes,
    )
    from mlx_diffgemma.bench.steps import encoded
    from mlx_diffgemma.config import ModelConfig

    whole = ModelConfig.from_dict(config_like(SMALL))
    sliding, full = whole.text.attention
    stacks = {
        "sliding": replace(whole, text=replace(whole.text, attention=(sliding, sliding))),
        "full": replace(whole, text=replace(whole.text, attention=(full, sliding))),
    }
    names = {"sliding": "sliding, sliding", "full": "full, sliding"}
    print("\n| layers | tokens | s | time a token | prefix MB | beside weights and prefix MB |")
    print("|---|---|---|---|---|---|")
    for name in args.stack or stacks:
        config = stacks[name]
        model = random_model(config, chosen_recipe(None, None), chosen_dtype(None))
        times: dict[int, list[float]] = {length: [] for length in args.lengths}
        held = {}
        # In turns, so that a busy machine slows all lengths alike.
        for _ in range(args.repeats):
            for length in args.lengths:
                mx.clear_cache()
                mx.reset_peak_memory()
                start = perf_counter()
                (prefix,) = encoded(model, length, 1, 0)
                times[length].append(perf_counter() - start)
                beyond = mx.get_peak_memory() - weight_bytes(model) - prefix.nbytes
                held[length] = prefix.nbytes, beyond
        first = args.lengths[0]
        per_token = {length: median(taken) / length for length, taken in times.items()}
        for length in args.lengths:
            kept, beyond = held[length]
            print(
                f"| {names[name]} | {length} | {median(times[length]):.2f} "
                f"| {per_token[length] / per_token[first]:.2f} | {kept / 1e6:.1f} "
                f"| {beyond / 1e6:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
