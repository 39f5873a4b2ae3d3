"""A model whose layers are dealt out to the ranks, for Macs whose memory is the limit.

What goes through the layers is handed from rank to rank. While one rank computes its layers of one
canvas, the others compute theirs of others, so several canvases fill the pipe. Embedding, head and
self-conditioning are on rank 0 alone. Letters: R ranks, N positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_diffgemma.distributed.exchange import Exchange
from mlx_diffgemma.distributed.shares import Share
from mlx_diffgemma.model.cache import LayerPrefix, Prefix
from mlx_diffgemma.model.diffusion_gemma import CanvasView, DiffusionGemma, Pass


class PipelineModel(DiffusionGemma):
    """A model that has the layers of its rank alone."""

    exchange: Exchange
    share: Share

    def empty_prefix(self) -> Prefix:
        own = super().empty_prefix().layers[self.share.layers.start : self.share.layers.stop]
        return Prefix((), tuple(LayerPrefix(layer.window) for layer in own))

    def embed(self, ids: mx.array) -> mx.array:
        """The embeddings on rank 0, and zeros of their shape on the others."""
        if self.share.has_embedding:
            return super().embed(ids)
        return mx.zeros((*ids.shape, self.config.text.hidden_size), self.dtype)

    def conditioned(self, x: mx.array, soft_embeddings: mx.array) -> mx.array:
        return super().conditioned(x, soft_embeddings) if self.share.has_embedding else x

    def dealt(self, canvases: Sequence[CanvasView]) -> Sequence[Sequence[CanvasView]]:
        """As many parts as there are ranks, where there are so many canvases."""
        parts = min(self.exchange.size, len(canvases))
        ends = [len(canvases) * part // parts for part in range(parts + 1)]
        return [canvases[ends[part] : ends[part + 1]] for part in range(parts)]

    def through_layers(self, passes: Sequence[Pass]) -> list[mx.array]:
        """What comes out of the last layer of the last rank, on all ranks. In each of the ticks
        every rank computes its layers for one of the passes, or nothing, and hands on what comes
        out."""
        rank, ranks = self.exchange.rank, self.exchange.size
        longest = max(one.x.shape[1] for one in passes)
        idle = mx.zeros((1, longest, passes[0].x.shape[2]), passes[0].x.dtype)
        outputs: list[mx.array] = []
        before = idle  # what the rank before has handed on
        for tick in range(len(passes) + ranks - 1):
            x, own = idle, tick - rank
            if 0 <= own < len(passes):
                one = passes[own]
                if rank:
                    one = replace(one, x=before[:, : one.x.shape[1]])
                (x,) = super().through_layers([one])
                x = mx.pad(x, [(0, 0), (0, longest - x.shape[1]), (0, 0)])
            handed = self.exchange.gather(x)
            before = handed[rank - 1]
            if tick >= ranks - 1:
                done = passes[tick - ranks + 1]
                outputs.append(handed[-1][:, : done.x.shape[1]])
        return outputs
