"""What does a denoising step ask of a GPU: waits, nodes of its graph, kernels, memory?

    python scripts/count_step.py                    # the release's shapes, two layers, 4 bits
    python scripts/count_step.py --layers 30 --profile fast --batch 4
    python scripts/count_step.py --form cpu --like small-262k --recipe none

Nothing is timed, and no weight is loaded or takes memory: what a GPU has kernels for
hands out ones of the right shape, so any machine can count. With `--form cpu` the layers take the
forms of a CPU, and compute what they do.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from mlx_diffgemma.bench.presets import RELEASE, config_like
from mlx_diffgemma.diffusion.profiles import PROFILES, profile_settings


def main() -> None:
    from mlx_diffgemma.bench.random_model import chosen_dtype, chosen_recipe
    from mlx_diffgemma.bench.step_counts import CONSTRAINTS, StepCount, count_step
    from mlx_diffgemma.config import ModelConfig
    from mlx_diffgemma.diffusion.config import DiffusionConfig

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--like", default=RELEASE, help="a folder with a config.json, or a preset")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--recipe", default="4bit", help="how the weights are quantized, or none")
    parser.add_argument("--dtype", help="type of the activations")
    parser.add_argument("--form", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--profile", choices=list(PROFILES), action="append")
    parser.add_argument("--constraint", choices=CONSTRAINTS, action="append")
    parser.add_argument("--batch", type=int, default=1, help="sequences; one under a grammar")
    parser.add_argument("--prefix", type=int, default=512, help="tokens before each canvas")
    parser.add_argument("--json", action="store_true", help="one object a line instead of a table")
    args = parser.parse_args()
    config = ModelConfig.from_dict(config_like(args.like, args.layers))
    recipe = chosen_recipe(None, None if args.recipe == "none" else args.recipe)
    dtype = None if args.dtype is None else chosen_dtype(args.dtype)
    text = config.text
    if not args.json:
        print(
            f"{args.like}, {args.layers} layers of {text.hidden_size}, {text.vocab_size:,} words, "
            f"{recipe.name}, canvas {config.canvas_length}, batch {args.batch}, form {args.form}\n"
        )
        print(
            "| profile | constraint | waits and reads | queued | nodes: layers | vocabulary | rest "
            "| kernels | products | MB beside weights and prefix |\n|---|---|" + "---:|" * 8
        )
    for profile in args.profile or PROFILES:
        for constraint in args.constraint or CONSTRAINTS:
            counts: StepCount = count_step(
                config,
                recipe,
                DiffusionConfig().override(**profile_settings(profile)),
                form=args.form,
                dtype=dtype,
                prefix=args.prefix,
                batch=args.batch,
                constraint=constraint,
            )
            if args.json:
                print(json.dumps({"profile": profile, "constraint": constraint, **asdict(counts)}))
                continue
            numbers = (
                counts.layers,
                counts.vocabulary,
                counts.rest,
                counts.kernels,
                counts.products,
            )
            shown = " | ".join("–" if number is None else str(number) for number in numbers)
            print(
                f"| {profile} | {constraint} | {counts.waits:g} | {counts.async_evals:g} | {shown} "
                f"| {counts.beside / 1e6:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
