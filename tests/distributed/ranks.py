"""One model over several processes beside the same model in one; all of a run are called like this:

    python ranks.py CASE...

Rank 0 runs every check of each case (see `parity_checks.py`) with both models, and prints what came
of it as a line of JSON; the others follow, and print what they still hold in the end.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from tiny_models import make_config, make_model, make_weights

from mlx_diffgemma import cpu
from mlx_diffgemma.checkpoint.names import expected_shapes, module_path
from mlx_diffgemma.checkpoint.quantization import Format
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.cpu.vocabulary import tiled_pass
from mlx_diffgemma.distributed.exchange import Exchange
from mlx_diffgemma.distributed.following import Following
from mlx_diffgemma.distributed.group import Ranks, join
from mlx_diffgemma.distributed.leading import lead
from mlx_diffgemma.distributed.loading import local_model, share_of_weights
from mlx_diffgemma.distributed.shares import Share, Split, shares_of
from mlx_diffgemma.kernels.vocabulary import CHUNK, vocabulary_pass
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

PIECE = 128  # words of a piece of the vocabulary, of which there are then several
FEEDBACK = 0.05  # rounding dies out from step to step
SMALL = {
    "vocab_size": 416, "head_dim": 8, "hidden_size": 36, "intermediate_size": 40, "num_experts": 7,
    "num_key_value_heads": 2, "num_global_key_value_heads": 1,
}  # fmt: skip
PACKED = {
    "vocab_size": 416, "head_dim": 32, "global_head_dim": 32, "hidden_size": 64,
    "intermediate_size": 256, "moe_intermediate_size": 64, "num_experts": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "num_global_key_value_heads": 2,
}  # fmt: skip
NEXT = {"do": "next"}  # the order behind the last one of a case


class Pair:
    """A model in one process and the same over several, on rank 0."""

    def __init__(
        self, whole: DiffusionGemma, ours: DiffusionGemma, share: Share, exchange: Exchange
    ) -> None:
        self.whole, self.ours, self.share, self.exchange = whole, ours, share, exchange

    def both(self, use: Callable[[DiffusionGemma], Any]) -> tuple[Any, Any]:
        return use(self.whole), use(self.ours)


@dataclass(frozen=True)
class Case:
    """A model and how it is split; `chunk` is None where its words are not."""

    split: Split
    checks: tuple[str, ...]
    text: Mapping[str, Any] = field(default_factory=lambda: SMALL)
    packed: bool = False
    on_a_cpu: bool = False
    chunk: int | None = PIECE

    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(make_config(11, **self.text) | {"canvas_length": 24})

    def whole(self, config: ModelConfig) -> DiffusionGemma:
        model = make_model(config, make_weights(config, 11, feedback=FEEDBACK))
        return self.finished(packed(model) if self.packed else model)

    def part(self, share: Share, whole: DiffusionGemma) -> DiffusionGemma:
        model = local_model(share)
        if self.packed:
            packed(model)
        own = share_of_weights(share, dict(tree_flatten(whole.parameters())))
        model.load_weights(list(own.items()))
        return self.finished(model)

    def finished(self, model: DiffusionGemma) -> DiffusionGemma:
        if self.on_a_cpu:
            cpu.use(model)
        if self.chunk is not None:
            form = tiled_pass if self.on_a_cpu else vocabulary_pass
            model.vocabulary_pass = partial(form, chunk=self.chunk)
        mx.eval(model.parameters())
        return model

    def choose_pass(self, model: DiffusionGemma, share: Share) -> None:
        """Have the words go by in small pieces, where they are dealt out."""
        if share.cuts_words:
            model.vocabulary_pass = partial(vocabulary_pass, chunk=PIECE)


def packed(model: DiffusionGemma) -> DiffusionGemma:
    def wanted(path: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and "router" not in path

    nn.quantize(model, 64, 4, class_predicate=wanted)
    return model


ALL = (
    "logits", "predictions", "trajectories", "generations", "prefixes", "pictures", "editing",
    "structured", "decisions", "counted", "refusals",
)  # fmt: skip


def cases(ranks: int) -> dict[str, Case]:
    even, few = Split.even("tensor", ranks), ("logits", "trajectories", "counted")
    more = (*few, "prefixes")
    return {
        "tensor": Case(even, ALL if ranks == 2 else few),
        "packed": Case(even, more, PACKED, packed=True, on_a_cpu=True),
        "uneven": Case(Split("tensor", (2.0, *[1.0] * (ranks - 1))), few, on_a_cpu=True),
        "experts": Case(Split.even("experts", ranks), few),
        "pipeline": Case(
            Split.even("pipeline", ranks), (*more, "pictures", "decisions"), on_a_cpu=True
        ),
        "one-chunk": Case(even, ("logits", "counted"), chunk=None),
    }


def run(
    ranks: Ranks, exchange: Exchange, case: Case, orders: Iterator[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """What this rank has to say of a case; a follower takes `orders` up to the next case."""
    config = case.config()
    formats = {
        module_path(name): Format("affine", 4, 64)
        for name, shape in expected_shapes(config).items()
        if case.packed and len(shape) > 1 and "router" not in name
    }
    share = shares_of(config, case.split, formats, chunk=case.chunk or CHUNK)[ranks.rank]
    whole = case.whole(config)
    part = case.part(share, whole)
    if ranks.leader is not None:
        pair = Pair(whole, lead(part, share, exchange, ranks.leader), share, exchange)
        case.choose_pass(part, share)
        yield from results(pair, case)
        ranks.leader.send(NEXT)
        return
    follower = Following(part, share, exchange)
    case.choose_pass(part, share)
    for order in takewhile(lambda order: order != NEXT, orders):
        follower.run(order)
    yield {"held": len(follower.prefixes) + len(follower.layers)}


def results(pair: Pair, case: Case) -> Iterator[dict[str, Any]]:
    import parity_checks  # what the followers need not wait for

    for name in case.checks:
        error, begun = None, time.perf_counter()
        try:
            getattr(parity_checks, name)(pair)
        except Exception:
            error = traceback.format_exc()
        seconds = round(time.perf_counter() - begun, 2)
        apart = max(parity_checks.APART, default=0.0)
        parity_checks.APART.clear()
        yield {"check": name, "error": error, "seconds": seconds, "apart": apart}


def main(names: list[str]) -> None:
    ranks = join(lambda ending: os._exit(9))
    exchange = Exchange(ranks.group)
    orders = iter(()) if ranks.follower is None else ranks.follower.orders()
    for name in names:
        for found in run(ranks, exchange, cases(ranks.size)[name], orders):
            print(json.dumps({"case": name, **found}), flush=True)
    for _ in orders:  # a follower that leaves before rank 0 says so counts as lost
        pass
    ranks.end()


if __name__ == "__main__":
    main(sys.argv[1:])
