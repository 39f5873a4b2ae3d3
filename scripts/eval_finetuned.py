"""How many answers of a test split are exact, without adapters and with them.

    python scripts/eval_finetuned.py DATA --model demo --adapter-path adapters --steps 4 8 16

`--steps` also tries fewer denoising steps a canvas.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from mlx_diffgemma import load
from mlx_diffgemma.fitting import diffusion_config
from mlx_diffgemma.train.data import Limits, load_data
from mlx_diffgemma.train.evaluate import exact_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--adapter-path")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, nargs="*", default=[])
    arguments = parser.parse_args()
    for adapters in dict.fromkeys((None, arguments.adapter_path)):
        model, tokenizer = load(arguments.model, adapter_path=adapters)
        context = model.config.text.max_position_embeddings
        limits = Limits(context, context, model.config.canvas_length)
        examples = load_data(arguments.data, tokenizer, limits, ["test"]).test[: arguments.count]
        longest = max(len(example.response) for example in examples)
        config = diffusion_config(model, max_tokens=longest)
        for steps in (config.max_denoising_steps, *(arguments.steps if adapters else ())):
            limited = replace(config, max_denoising_steps=steps)
            rate = exact_rate(model, examples, limited, batch_size=arguments.batch)
            name = f"{arguments.model} with {adapters}" if adapters else arguments.model
            print(f"{name}, {steps} steps at most: {rate:.1%} of {len(examples)} exact", flush=True)


if __name__ == "__main__":
    main()
