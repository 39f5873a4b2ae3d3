"""How long does a denoising step take beside mlx-vlm's, on equal weights, in turns?

    pip install "mlx-vlm==0.7.10"
    python scripts/bench_rival.py --openblas /usr/lib/x86_64-linux-gnu/libopenblas.so.0

Random weights: the release's vocabulary (262,144) and canvas (256) under two small layers, in the
type of the machine and in 4 bits. mlx-vlm runs with its default sampler and with its version of the
checkpoint's. Memory is what a step holds beside the weights, each program measured alone.
"""

from __future__ import annotations

import argparse
import gc
import os

from mlx_diffgemma.bench.openblas import load_openblas
from mlx_diffgemma.bench.presets import SMALL, config_like


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--like", default=SMALL, help="a built-in name, or a folder")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--bits", type=int, action="append", help="0 for none (repeatable)")
    parser.add_argument("--dtype", help="float32 on a CPU, bfloat16 on a GPU if left out")
    parser.add_argument("--profile", default="balanced")
    parser.add_argument("--prefix", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--openblas", help="path of libopenblas.so.0, on a CPU")
    args = parser.parse_args()
    blas = load_openblas(args.openblas) if args.openblas else "MLX's own BLAS"

    from mlx_diffgemma.bench.random_model import chosen_dtype, chosen_recipe, random_model
    from mlx_diffgemma.bench.rival import DEFAULT_SAMPLER, OUR_SAMPLER, compare_steps
    from mlx_diffgemma.config import ModelConfig
    from mlx_diffgemma.diffusion.config import DiffusionConfig
    from mlx_diffgemma.diffusion.profiles import profile_settings

    config = ModelConfig.from_dict(config_like(args.like, args.layers))
    settings = DiffusionConfig().override(**profile_settings(args.profile))
    print(f"{args.like}, profile {args.profile}, {blas}, load {os.getloadavg()[0]:.1f}\n")
    print("| weights | beside | ours ms | theirs ms | ours/theirs | ours MB | theirs MB |")
    print("|---|---|---|---|---|---|---|")
    for bits in args.bits or [0, 4]:
        recipe = chosen_recipe(bits or None, None)
        gc.collect()  # the model before this one would count as memory of a step
        model = random_model(config, recipe, chosen_dtype(args.dtype))
        reports = compare_steps(
            model, settings, prefix=args.prefix, repeats=args.repeats,
            samplers=(DEFAULT_SAMPLER, OUR_SAMPLER),
        )  # fmt: skip
        for run in reports:
            print(
                f"| {recipe.name} | {run.name} | {run.ours_seconds * 1e3:.0f} "
                f"| {run.theirs_seconds * 1e3:.0f} | {run.ratio:.2f} "
                f"| {run.ours_beyond_weights / 1e6:.0f} | {run.theirs_beyond_weights / 1e6:.0f} |",
                flush=True,
            )
        del model


if __name__ == "__main__":
    main()
