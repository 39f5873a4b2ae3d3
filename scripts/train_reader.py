"""Train the demo's reading model from nothing, on endless fresh pictures of drawn sudokus.

    python scripts/train_reader.py RUN --hours 1 --openblas /usr/lib/.../libopenblas.so.0
    python scripts/train_reader.py RUN --finish          # writes RUN/model, examined

RUN holds `start/` (the random checkpoint that it began with), the state of the training, and
`log.jsonl`. A sitting may be killed at any moment, and the next one goes on from the last save.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from train_demo import steps_done, write_card, write_model

from mlx_diffgemma.bench.openblas import load_openblas

SCRIPTS = Path(__file__).parent
SHIPPED = SCRIPTS.parent / "mlx_diffgemma" / "demo" / "checkpoint"
EXAM_SEED = 2026
MARKS = {104: "<|image>", 105: "<image|>"}  # ids of the tokenizer that the other demo leaves unused
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}<|turn>\
{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% endif %}"""
CARD = """---
library_name: mlx
pipeline_tag: image-text-to-text
license: apache-2.0
tags:
- text-diffusion
- diffusion-gemma
- mlx
---

# A small DiffusionGemma that reads drawn sudokus

{parameters:.2f}M parameters, the text model's in bf16 and the vision tower's in float32, trained
from nothing by `scripts/train_reader.py` of mlx-diffgemma on {seen:,} fresh pictures of
`mlx_diffgemma/demo/drawing.py`. It proves the machinery for pictures (tower, encoder, training,
conversion) from end to end, and says nothing about the quality of the released 26B model, with
which it shares the architecture and no weight.

Asked to `read` the picture of a 6×6 sudoku, it answers the 36 cells row by row, with `.` for
blanks. Exact on {count} pictures of fresh puzzles (seed {seed}) with the default settings:
{exact:.3f} ± {error:.3f}.
"""
SOFT_TOKENS = 36
TEXT = {
    "hidden_size": 96, "intermediate_size": 192, "moe_intermediate_size": 48, "num_experts": 4,
    "top_k_experts": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
    "global_head_dim": 48, "num_global_key_value_heads": 1, "sliding_window": 64,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}  # fmt: skip
VISION = {
    "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 24, "patch_size": 24, "pooling_kernel_size": 1,
    "position_embedding_size": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
    "model_type": "gemma4_vision", "hidden_activation": "gelu_pytorch_tanh", "dtype": "bfloat16",
    "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02,
    "standardize": False, "use_clipped_linears": False,
}  # fmt: skip


def make_config() -> dict[str, Any]:
    """The shipped demo's `config.json` with other sizes and a vision tower."""
    config = json.loads((SHIPPED / "config.json").read_text())
    text = {**config["text_config"], **TEXT}
    del text["per_layer_config"]
    begin, end = MARKS
    return {
        **config,
        "boi_token_id": begin,
        "eoi_token_id": end,
        "canvas_length": 40,
        "text_config": text,
        "vision_config": VISION,
        "vision_soft_tokens_per_image": SOFT_TOKENS,
    }


def begin(folder: Path, seed: int) -> None:
    """Write the random checkpoint that a run starts from."""
    from make_tiny_checkpoint import write_checkpoint

    partial = folder / "start.part"
    shutil.rmtree(partial, ignore_errors=True)
    write_checkpoint(partial, make_config(), seed=seed)
    shutil.copy(SHIPPED / "generation_config.json", partial)
    (partial / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = json.loads((SHIPPED / "tokenizer.json").read_text())
    added = dict(tokenizer["added_tokens"][0])
    for token, name in MARKS.items():
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary.pop(next(old for old, number in vocabulary.items() if number == token))
        vocabulary[name] = token
        tokenizer["added_tokens"].append({**added, "id": token, "content": name})
    (partial / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((SHIPPED / "tokenizer_config.json").read_text())
    settings["extra_special_tokens"] += MARKS.values()
    (partial / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    partial.rename(folder / "start")


def any_givens(rng: np.random.Generator) -> str:
    """Six rows of digits and blanks by chance, which nothing but the picture tells."""
    from mlx_diffgemma.demo.sudoku import BLANK, LEAST_BLANK, MOST_BLANK, SIDE

    cells = rng.integers(1, SIDE + 1, (SIDE, SIDE))
    blank = rng.random((SIDE, SIDE)) < rng.uniform(LEAST_BLANK, MOST_BLANK)
    rows = np.where(blank, 0, cells).tolist()
    return "\n".join("".join(str(digit or BLANK) for digit in row) for row in rows)


def stream_of(model: Any, tokenizer: Any, seed: int) -> Any:
    """The examples of a run, by number."""
    from mlx_diffgemma.demo import drawing
    from mlx_diffgemma.pictured import pictures_of
    from mlx_diffgemma.text.control_tokens import control_tokens_of
    from mlx_diffgemma.text.prompt import encode_prompt
    from mlx_diffgemma.text.response import encode_response, end_of_turn
    from mlx_diffgemma.text.tokenizer import hf_tokenizer
    from mlx_diffgemma.train.examples import Example

    controls, end = control_tokens_of(hf_tokenizer(tokenizer)), end_of_turn(tokenizer)

    def stream(first: int, count: int) -> list[Example]:
        examples = []
        for number in range(first, first + count):
            rng = np.random.default_rng([seed, number])
            givens = any_givens(rng)
            prompt = encode_prompt(
                tokenizer, drawing.PROMPT, images=[drawing.draw(givens, rng)], config=model.config
            )
            response = encode_response(controls, drawing.answer(givens), end)
            tokens = (*prompt, *response)
            examples.append(Example(tokens, len(prompt), pictures_of(prompt)))
        return examples

    return stream


def exact_rate(model: Any, tokenizer: Any, count: int, seed: int) -> float:
    """The share of pictures of fresh puzzles that the model reads without a mistake, by the way
    that users go."""
    from mlx_diffgemma import generate
    from mlx_diffgemma.demo import drawing
    from mlx_diffgemma.demo.sudoku import make_puzzle

    right = 0
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        givens = make_puzzle(rng).givens
        image = drawing.draw(givens, rng)
        read = generate(model, tokenizer, drawing.PROMPT, 40, images=[image], seed=number)
        right += read == drawing.answer(givens)
    return right / count


def sit(folder: Path, args: argparse.Namespace, say: Any) -> None:
    """Train until the examples or the hours are over."""
    from mlx_diffgemma import load
    from mlx_diffgemma.train.config import TrainConfig
    from mlx_diffgemma.train.events import Evaluation, Report, Saved
    from mlx_diffgemma.train.loop import train

    model, tokenizer = load(folder / "start", vision=True)
    model.unfreeze()
    steps = args.examples // args.batch
    config = TrainConfig(
        batch_size=args.batch,
        compile=shutil.which("g++") is not None or None,
        iters=steps,
        optimizer="muon",
        optimizer_config={"weight_decay": 0.02},
        learning_rate=args.rate,
        lr_schedule="linear",
        decay=0.4,
        warmup=min(100, steps),
        fine_tune_type="full",
        encoder_loss_weight=0.0,
        min_noise=0.01,
        seed=args.seed,
        steps_per_report=100,
        steps_per_eval=1000,
        save_every=250,
    )
    stream, ends = stream_of(model, tokenizer, args.seed), time.monotonic() + 3600 * args.hours
    held_out = stream(1 << 40, 64)

    def exact(model: Any) -> float:
        if not (folder / "state.safetensors").exists():
            return 0.0  # a random model takes all the steps that there are
        return exact_rate(model, tokenizer, 50, EXAM_SEED + 1)

    for event in train(model, config, stream, held_out, folder, resume=True, generate_exact=exact):
        match event:
            case Report():
                say("report", step=event.step, loss=round(event.loss, 4),
                    per_second=round(event.examples_per_second, 1))  # fmt: skip
            case Evaluation():
                losses = {str(noise): round(loss, 4) for noise, loss in event.by_noise.items()}
                say("evaluation", step=event.step, exact=event.exact, loss=losses)
            case Saved() if time.monotonic() > ends:
                say("stopped", step=event.step)
                return


def finish(folder: Path, count: int, batch: int, say: Any) -> None:
    """Write the model, examine it, and write its card."""
    from mlx.utils import tree_flatten

    from mlx_diffgemma import load

    target = write_model(folder, "train_reader")
    model, tokenizer = load(target)
    exact = exact_rate(model, tokenizer, count, EXAM_SEED)
    say("exam", count=count, exact=exact)
    size = sum(array.size for _, array in tree_flatten(model.parameters()))
    error = (exact * (1 - exact) / count) ** 0.5
    write_card(
        target,
        CARD.format(
            parameters=size / 1e6, seen=steps_done(folder) * batch, exact=exact, error=error,
            count=count, seed=EXAM_SEED,
        ),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run; made if it is not there")
    parser.add_argument("--hours", type=float, default=1.0, help="most hours of this sitting")
    parser.add_argument("--examples", type=int, default=160_000, help="of the whole run")
    parser.add_argument("--batch", type=int, default=16, help="examples of an optimizer step")
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate of the matrices")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--openblas", help="path of libopenblas.so.0, on a CPU")
    parser.add_argument("--finish", action="store_true", help="train no more; write the model")
    parser.add_argument("--count", type=int, default=200, help="pictures of the final exam")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    if args.openblas:
        load_openblas(args.openblas)

    def say(kind: str, **what: Any) -> None:
        line = json.dumps({"at": time.strftime("%H:%M:%S"), "kind": kind, **what})
        with (args.run / "log.jsonl").open("a") as log:
            print(line, file=log)
        print(line, flush=True)

    if not (args.run / "start").exists():
        begin(args.run, args.seed)
    if not args.finish:
        sit(args.run, args, say)
    else:
        finish(args.run, args.count, args.batch, say)


if __name__ == "__main__":
    main()
