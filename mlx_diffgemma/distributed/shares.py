"""Which part of a model each rank holds.

A rank is one of the processes that compute one model together, each on a Mac of its own; rank 0 is
the one that talks. Ranges here count heads, columns, experts, words and layers of the whole model.
Letters: D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite

from mlx_diffgemma.checkpoint.names import module_path
from mlx_diffgemma.checkpoint.quantization import Format
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.distributed.cutting import (
    KINDS,
    LAYER,
    Heads,
    heads_of,
    layers_of,
    portions,
    scaled,
    widths_of,
)
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.kernels.vocabulary import CHUNK
from mlx_diffgemma.reading import shown

_HEAD_ONLY = ("model.decoder.embed_tokens", "model.decoder.self_conditioning.")


@dataclass(frozen=True)
class Split:
    """How a model is divided among ranks.

    Attributes:
        kind: "tensor" cuts every layer: attention by heads, the dense MLP and self-conditioning by
            width, experts by expert, the embedding by words. "experts" cuts the experts alone.
            "pipeline" gives whole layers to each rank, and embedding and head to rank 0.
        weights: a number for each rank that says how much of the model it takes beside the others.

    Raises:
        UsageError: there is no such kind, or a weight is not above 0.
    """

    kind: str
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(
                f"a model cannot be split by {shown(self.kind)}; choose {', '.join(KINDS)}."
            )
        if not self.weights or not all(isfinite(w) and w > 0 for w in self.weights):
            raise UsageError(
                "a split needs one weight above 0 for each rank, not "
                f"({', '.join(f'{w:g}' for w in self.weights)})."
            )

    @classmethod
    def even(cls, kind: str, ranks: int) -> Split:
        """A split in which every rank takes as much as any other."""
        return cls(kind, (1.0,) * ranks)

    @property
    def ranks(self) -> int:
        return len(self.weights)


@dataclass(frozen=True)
class Part:
    """What a rank holds of one parameter.

    Attributes:
        name: what the parameter is called in the rank's own model.
        axis: the axis that is cut, 0 or -1; None where the rank holds all of it.
        span: what the rank holds along that axis of the unquantized parameter, where it is cut.
        extent: the length of that axis of the unquantized parameter, where it is cut.
    """

    name: str
    axis: int | None = None
    span: range = range(0)
    extent: int = 0

    def slices(self, shape: Sequence[int]) -> tuple[slice, ...]:
        """Where in a stored tensor of `shape` the part lies; the tensor may be the parameter, its
        packed weight, its scales or its biases."""
        whole = [slice(0, size) for size in shape]
        if self.axis is None:
            return tuple(whole)
        stored = shape[self.axis]
        start, stop = (at * stored // self.extent for at in (self.span.start, self.span.stop))
        whole[self.axis] = slice(start, stop)
        return tuple(whole)


@dataclass(frozen=True)
class Share:
    """What one rank holds of a model.

    Attributes:
        rank: which rank, from 0.
        split: how the model is divided.
        heads: those of every layer of the whole model.
        width: columns of the dense MLPs and of the self-conditioning.
        experts: those of every layer.
        words: rows of the embedding; all of them where the words are not cut.
        layers: which layers the rank runs.
        config: the whole model's config.
    """

    rank: int
    split: Split
    heads: tuple[Heads, ...]
    width: range
    experts: range
    words: range
    layers: range
    config: ModelConfig

    def held_bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes that the rank holds of parameters, or stored tensors, that take `sizes` in all, by
        name."""
        total = 0
        for name, size in sizes.items():
            part = self.part(name)
            if part is not None:
                total += size if part.axis is None else size * len(part.span) // part.extent
        return total

    @property
    def cuts_words(self) -> bool:
        """Whether each rank holds other words; else every rank that has the embedding has all."""
        return len(self.words) < self.config.text.vocab_size

    @property
    def has_embedding(self) -> bool:
        """Whether the rank holds rows of the embedding, and self-conditioning."""
        return self.split.kind != "pipeline" or self.rank == 0

    def part(self, name: str) -> Part | None:
        """What the rank holds of the parameter `name` of the whole text model (or of its scales or
        biases); None where it holds nothing of it. A name that no parameter has is held whole by
        every rank, so that loading refuses it."""
        layer = LAYER.match(name)
        if layer is None:
            if name.startswith(_HEAD_ONLY) and not self.has_embedding:
                return None
            return self._cut(name, name, None)
        index = int(layer["at"])
        if index >= self.config.text.num_hidden_layers:
            return Part(name)
        if index not in self.layers:
            return None
        local = f"{layer['before']}{index - self.layers.start}{name[layer.end() :]}"
        return self._cut(name, local, index)

    def _cut(self, name: str, local: str, layer: int | None) -> Part:
        text, path = self.config.text, module_path(name)
        if path.endswith(".embed_tokens"):
            return _part(local, 0, self.words, text.vocab_size)
        if ".experts." in path:
            return _part(local, 0, self.experts, text.num_experts)
        if not path.endswith("_proj"):
            return Part(local)
        if layer is not None and ".self_attn." in path:
            heads, sizes = self.heads[layer], text.attention[layer]
            if path.endswith(("k_proj", "v_proj")):
                own, count = heads.keys, sizes.num_kv_heads
            else:
                own, count = heads.queries, sizes.num_heads
            size, axis = sizes.head_dim, -1 if path.endswith("o_proj") else 0
            return _part(local, axis, scaled(own, size), count * size)
        return _part(
            local, -1 if path.endswith("down_proj") else 0, self.width, text.intermediate_size
        )


def _part(name: str, axis: int, span: range, extent: int) -> Part:
    return Part(name) if len(span) == extent else Part(name, axis, span, extent)


def shares_of(
    config: ModelConfig,
    split: Split,
    formats: Mapping[str, Format] | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[Share, ...]:
    """What each rank holds of a model.

    Args:
        formats: formats of its quantized modules by path; columns are cut between their groups.
        chunk: words that the vocabulary is cut in multiples of. A vocabulary with fewer chunks
            than there are ranks is not cut.

    Raises:
        UsageError: the model cannot be cut in so many parts; the line says what stands in the way.
    """
    text, formats = config.text, formats or {}
    ranks, weights = split.ranks, split.weights
    widths, experts, words, layers = (
        [range(count)] * ranks
        for count in (
            text.intermediate_size, text.num_experts, text.vocab_size, text.num_hidden_layers
        )
    )  # fmt: skip
    heads = [
        (Heads(range(sizes.num_heads), range(sizes.num_kv_heads)),) * ranks
        for sizes in text.attention
    ]
    if split.kind == "pipeline":
        layers = layers_of(config, formats, weights)
    else:
        experts = portions(text.num_experts, weights, f"{text.num_experts} experts")
    if split.kind == "tensor":
        widths = widths_of(text, formats, weights)
        heads = [heads_of(text, formats, index, weights) for index in range(text.num_hidden_layers)]
        chunks = -(-text.vocab_size // chunk)
        if chunks >= ranks > 1:
            words = [
                range(span.start * chunk, min(span.stop * chunk, text.vocab_size))
                for span in portions(chunks, weights, "")
            ]
    return tuple(
        Share(
            rank,
            split,
            tuple(layer[rank] for layer in heads),
            widths[rank],
            experts[rank],
            words[rank],
            layers[rank],
            config,
        )
        for rank in range(ranks)
    )


def local_config(share: Share) -> ModelConfig:
    """The config of a model that is as large as a share; its router alone is smaller than the
    share's, which chooses among all experts."""
    text = share.config.text
    attention = tuple(
        replace(
            text.attention[index],
            num_heads=len(share.heads[index].queries),
            num_kv_heads=len(share.heads[index].keys),
        )
        for index in share.layers
    )
    own = replace(
        text,
        vocab_size=len(share.words),
        intermediate_size=len(share.width),
        num_experts=len(share.experts),
        attention=attention,
    )
    return replace(share.config, text=own)
