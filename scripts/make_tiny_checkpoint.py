"""Write a DiffusionGemma checkpoint of random weights, in Hugging Face form.

python scripts/make_tiny_checkpoint.py OUT                           a small one, for tests
python scripts/make_tiny_checkpoint.py OUT --real-shapes --layers 2  shapes of the 26B
python scripts/make_tiny_checkpoint.py OUT --real-shapes --sparse    all of it, for --plan:
                                                                     zeros, no room on disk
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlx_diffgemma.checkpoint.names import expected_shapes, to_hugging_face, vision_shapes
from mlx_diffgemma.config import FULL, SLIDING, ModelConfig, both_spellings
from mlx_diffgemma_convert.plan import Stored
from mlx_diffgemma_convert.shard_file import header_bytes

SMALL = {
    "vocab_size": 192, "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64,
    "num_experts": 4, "top_k_experts": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "global_head_dim": 64, "num_global_key_value_heads": 1, "sliding_window": 16,
    "max_position_embeddings": 1024,
}  # fmt: skip
REAL = {
    "vocab_size": 262144, "hidden_size": 2816, "intermediate_size": 2112,
    "moe_intermediate_size": 704, "num_experts": 128, "top_k_experts": 8,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
    "global_head_dim": 512, "num_global_key_value_heads": 2, "sliding_window": 1024,
    "max_position_embeddings": 262144,
}  # fmt: skip
SMALL_VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 16, "patch_size": 4, "position_embedding_size": 16,
}  # fmt: skip
REAL_VISION = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72, "patch_size": 16,
    "position_embedding_size": 10240,
}  # fmt: skip
_POOL = 1 << 20


def make_config(text: Mapping[str, int], vision: Mapping[str, int], layers: int) -> dict[str, Any]:
    """`config.json` in the release's spelling; the last layer of every six attends to all."""
    kinds = [FULL if index % 6 == 5 else SLIDING for index in range(layers)]
    if FULL not in kinds:
        kinds[-1] = FULL
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "canvas_length": 256 if text is REAL else 32,
        "dtype": "bfloat16",
        "image_token_id": 6,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "diffusion_gemma_text",
            **text,
            "num_hidden_layers": layers,
            "layer_types": kinds,
            "rms_norm_eps": 1e-6,
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "tie_word_embeddings": True,
            "use_bidirectional_attention": "vision",
            "final_logit_softcapping": 30.0,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "dtype": "bfloat16",
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
                FULL: {
                    "rope_type": "proportional",
                    "rope_theta": 1000000.0,
                    "partial_rotary_factor": 0.25,
                },
            },
        },
        "vision_config": {
            "model_type": "gemma4_vision",
            **vision,
            "pooling_kernel_size": 3 if vision is REAL_VISION else 2,
            "standardize": vision is REAL_VISION,
            "use_clipped_linears": False,
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
            "dtype": "bfloat16",
        },
    }


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    sparse: bool = False,
    shard_bytes: int = 5 * 10**9,
) -> int:
    """Write config and weights into `folder`; returns the bytes of the weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    parsed = ModelConfig.from_dict(config)
    shapes = {to_hugging_face(name): shape for name, shape in expected_shapes(parsed).items()}
    if parsed.vision is not None:
        shapes |= vision_shapes(parsed.vision, parsed.text.hidden_size)
    tensors = [Stored(name, "BF16", shape) for name, shape in sorted(shapes.items())]
    shards: list[list[Stored]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    weight_map = {}
    pool = _random_pool(seed)
    for index, shard in enumerate(shards, 1):
        name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor.name: name for tensor in shard}
        with (folder / name).open("wb") as file:
            file.write(header_bytes(shard, "pt"))
            if sparse:
                file.truncate(file.tell() + sum(tensor.nbytes for tensor in shard))
                continue
            for tensor in shard:
                for values in _values(tensor, pool, seed):
                    file.write(values.data)
    total = sum(tensor.nbytes for tensor in tensors)
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2))
    return total


def _random_pool(seed: int) -> np.ndarray:
    """Random bf16 numbers as a network has them, drawn once and used again from other places."""
    values = np.random.default_rng(seed).normal(0, 0.02, _POOL).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _values(tensor: Stored, pool: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """The numbers of a tensor: norms and scalars about one, all else about zero."""
    count = prod(tensor.shape)
    if len(tensor.shape) == 1:
        near_one = 1 + np.random.default_rng([seed, count]).normal(0, 0.1, count)
        yield (near_one.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return
    place = sum(tensor.name.encode()) * 7919 % _POOL
    while count:
        part = pool[place : place + count]
        yield part
        count, place = count - part.size, (place + part.size) % _POOL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--real-shapes", action="store_true", help="names and shapes of the 26B")
    parser.add_argument("--layers", type=int, help="30 with --real-shapes, else 6")
    parser.add_argument("--sparse", action="store_true", help="zeros that take no room on disk")
    parser.add_argument("--both-spellings", action="store_true", help="of the attention sizes")
    parser.add_argument("--tokenizer", type=Path, help="copy tokenizer files from this folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    text, vision = (REAL, REAL_VISION) if options.real_shapes else (SMALL, SMALL_VISION)
    config = make_config(text, vision, options.layers or (30 if options.real_shapes else 6))
    if options.both_spellings:
        config = both_spellings(config)
    size = write_checkpoint(options.out, config, seed=options.seed, sparse=options.sparse)
    if options.tokenizer is not None:
        for path in sorted(options.tokenizer.glob("*")):
            if path.name.startswith(("tokenizer", "chat_template", "special_tokens")):
                shutil.copy(path, options.out)
    print(f"{options.out}: {size / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
