"""How many examples a second does the training of the demo's model take here?

    OPENBLAS_CORETYPE=SKYLAKEX python scripts/bench_train.py --openblas PATH/libopenblas.so.0
    python scripts/bench_train.py --plain --batch 32 --accumulate 2 --compile

Random examples (48 tokens of prompt, 42 of response), the demo's shapes, AdamW, self-conditioning
in half of the examples. CPU seconds are those of all threads: on a machine with other work they say
more than the wall clock. `--plain` takes the forms that the model has elsewhere.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from mlx_diffgemma.bench.openblas import load_openblas

CONFIG = Path(__file__).parent.parent / "mlx_diffgemma" / "demo" / "checkpoint" / "config.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--openblas", help="libopenblas.so.0, to put under MLX")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--accumulate", type=int, default=1, help="batches a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--encoder-weight", type=float, default=0.0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--plain", action="store_true", help="without the forms for a CPU")
    options = parser.parse_args()
    if options.openblas:
        print(load_openblas(options.openblas))

    import mlx.core as mx

    from mlx_diffgemma import cpu
    from mlx_diffgemma.config import ModelConfig
    from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
    from mlx_diffgemma.train.batches import Batches
    from mlx_diffgemma.train.config import TrainConfig
    from mlx_diffgemma.train.examples import Example
    from mlx_diffgemma.train.gradients import Stepper
    from mlx_diffgemma.train.loop import sizes_of

    mx.random.seed(0)
    model = DiffusionGemma(ModelConfig.from_dict(json.loads(CONFIG.read_text())))
    if not options.plain:
        cpu.use(model)
    model.train()
    rng = np.random.default_rng(0)
    examples = [Example((*rng.integers(7, 128, 89).tolist(), 5), 48) for _ in range(512)]
    config = TrainConfig(
        batch_size=options.batch,
        grad_accumulation_steps=options.accumulate,
        compile=options.compile,
        encoder_loss_weight=options.encoder_weight,
        fine_tune_type="full",
    )
    batches, stepper = Batches(examples, config, sizes_of(model)), Stepper(model, config)
    parameters = model.trainable_parameters()
    state = stepper.fresh_state(parameters)
    walls, cores = [], []
    for number in range(options.steps + 2):  # the first two warm up
        begun, busy = time.perf_counter(), time.process_time()
        first = number * options.accumulate
        part = [batches[first + place] for place in range(options.accumulate)]
        result = stepper.step(number + 1, parameters, state, part)
        mx.eval(result.parameters, result.optimizer_state, result.losses)
        parameters, state = result.parameters, result.optimizer_state
        walls.append(time.perf_counter() - begun)
        cores.append(time.process_time() - busy)
    count = options.batch * options.accumulate
    wall, core = np.median(walls[2:]), np.median(cores[2:])
    print(
        f"a step of {count}: {core:.2f} CPU s, {wall:.2f} s; {count / core:.1f} examples a CPU s, "
        f"{count / wall:.1f} a second; peak {mx.get_peak_memory() / 1e9:.2f} GB; first step "
        f"{walls[0]:.1f} s; loss {result.losses[0].item():.4f}"
    )


if __name__ == "__main__":
    main()
