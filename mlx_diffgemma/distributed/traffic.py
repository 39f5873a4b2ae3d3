"""How much the ranks say to each other in a step, from the sizes of the model alone."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_diffgemma.distributed.shares import Share
from mlx_diffgemma.kernels.vocabulary_chunk import Running

_NUMBER = 4  # bytes of an id, or of a number in float32


@dataclass(frozen=True)
class Traffic:
    """Collectives, and bytes of their results."""

    messages: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.messages + other.messages, self.bytes + other.bytes)

    def times(self, count: int) -> Traffic:
        return Traffic(self.messages * count, self.bytes * count)


def step_traffic(share: Share, positions: int, itemsize: int, *, is_first: bool = False) -> Traffic:
    """What a step over one canvas takes.

    Args:
        positions: those of the canvas; each is drawn and needs soft embeddings, and none is bound
            to a token or may take only some.
        itemsize: bytes of an activation.
        is_first: whether the canvas has no soft embeddings yet.
    """
    text = share.config.text
    ids = Traffic(1, _NUMBER * positions)
    states = Traffic(1, itemsize * positions * text.hidden_size)
    step = ids if is_first else ids + states
    if share.split.kind == "pipeline":
        ranks = share.split.ranks
        tick = Traffic(1, itemsize * ranks * positions * text.hidden_size)
        step += tick.times(ranks)
    elif share.split.kind == "tensor":
        # Attention; the dense MLP and the experts in one message; self-conditioning once.
        layer = states + Traffic(1, 2 * states.bytes)
        step += layer.times(text.num_hidden_layers) + states
    else:
        step += states.times(text.num_hidden_layers)
    if share.cuts_words:
        running = Running.start(1)
        found = running.numbers.size + running.tokens.size
        step += states  # embeddings
        step += Traffic(1, _NUMBER * (2 + positions))  # keys, and what stands there
        step += Traffic(1, _NUMBER * found * positions * share.split.ranks)
        step += Traffic(1, _NUMBER * positions * text.hidden_size)  # soft embeddings
    return step
