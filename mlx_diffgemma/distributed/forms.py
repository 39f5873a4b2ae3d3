"""The forms that the modules of a rank's share take, put in the place of their own.

A module of a share computes a part of what the whole one would; a form joins the parts of all ranks
where the next operation needs the whole. Each form is a subclass of the module that it takes the
place of, whatever form that has for a CPU.
Letters: B batch, S positions, N of all of them, D hidden, E experts, K experts of a token, P pairs
of token and expert whose experts are held.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_diffgemma import cpu
from mlx_diffgemma.distributed.exchange import Exchange
from mlx_diffgemma.distributed.pipeline import PipelineModel
from mlx_diffgemma.distributed.shares import Share
from mlx_diffgemma.distributed.words import SplitEmbedding, SplitTable
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.expert_combine import expert_combine
from mlx_diffgemma.kernels.vocabulary import vocabulary_pass
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.experts import Experts
from mlx_diffgemma.model.layers import Attend, DecoderLayer, SelfConditioning

_READ_FROM = 512  # pairs of token and expert from which on the host reads whose they are


def use(model: DiffusionGemma, share: Share, exchange: Exchange) -> None:
    """Give the model of a share the forms that join it with the others, weights unchanged, and
    compile it for a GPU."""
    if share.split.kind == "pipeline":
        put(model, PipelineModel, exchange=exchange, share=share)
    else:
        _use_in_layers(model, share, exchange)
    if not cpu.is_device():
        model.compile()


def _use_in_layers(model: DiffusionGemma, share: Share, exchange: Exchange) -> None:
    is_cut = share.split.kind == "tensor"
    for layer in model.layers:
        put(layer, SplitLayer, exchange=exchange, cuts_attention=is_cut, cuts_mlp=is_cut)
        put(layer.experts, SplitExperts, held=share.experts)
    if is_cut:
        put(model.model.decoder.self_conditioning, SplitSelfConditioning, exchange=exchange)
    if share.cuts_words:
        put(model.model.decoder.embed_tokens, SplitEmbedding, exchange=exchange, words=share.words)
        put(model, SplitModel, exchange=exchange, words=share.words)
        model.vocabulary_pass = vocabulary_pass


def put(module: nn.Module, form: type, **attributes: Any) -> None:
    """Make `module` one of the class `form` besides that which it is, with these attributes."""
    kind: type = type(module)
    module.__class__ = _both(form, kind)
    for name, value in attributes.items():
        setattr(module, name, value)


@cache  # so that modules of one kind are of one class
def _both(form: type, kind: type) -> type:
    return type(f"{form.__name__}Of{kind.__name__}", (form, kind), {})


class SplitLayer(DecoderLayer):
    """A layer whose parts on all ranks are summed: the attention's output, and those of the dense
    MLP and of the experts in one message, for each of these two goes through a norm of its own."""

    exchange: Exchange
    cuts_attention: bool
    cuts_mlp: bool
    _before: Any = None
    _join: Any = None

    def __call__(self, x: mx.array, attend: Attend, layer_scalar: mx.array) -> mx.array:
        attended = attend(self.self_attn, self.input_layernorm(x))
        if self.cuts_attention:
            attended = self.exchange.sum(attended)
        before = self.before_experts if self._before is None else self._before
        h, dense, *mixture = before(x, attended)
        sparse = self.experts(*mixture).reshape(h.shape)
        if self.cuts_mlp:
            dense, sparse = self.exchange.sum(mx.stack([dense, sparse]))
        else:
            sparse = self.exchange.sum(sparse)
        join = self.join if self._join is None else self._join
        result: mx.array = join(h, dense, sparse, layer_scalar)
        return result

    def compile(self) -> None:
        """Run what comes before and after the experts as compiled functions from now on. The host
        reads what the experts are to compute, and a collective is no part of a function."""
        self._before = mx.compile(self.before_experts, inputs=[self.state])
        self._join = mx.compile(self.join, inputs=[self.state])


class SplitExperts(Experts):
    """Some of the experts that the router chooses from.

    Where there are many pairs of token and expert, the host reads which of them are theirs, so that
    no product is computed for another's; a wait costs less than those. Few pairs are all computed,
    another's with the last expert and a weight of 0.
    """

    held: range

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        """[N, D], the experts [N, K] of each token and their weights [N, K] -> [N, D]."""
        if chosen.size < _READ_FROM:
            local = chosen.astype(mx.int32) - self.held.start
            is_held = (local >= 0) & (local < len(self.held))
            experts = mx.where(is_held, local, len(self.held) - 1).astype(mx.uint32)
            return super().__call__(x, experts, mx.where(is_held, weights, 0.0))
        which = np.array(chosen).astype(np.int32).reshape(-1) - self.held.start
        is_own = (which >= 0) & (which < len(self.held))
        pairs = np.flatnonzero(is_own)
        if not len(pairs):
            return mx.zeros_like(x)
        pairs = pairs[np.argsort(which[pairs], kind="stable")]
        tokens, experts = mx.array(pairs // chosen.shape[1]), mx.array(which[pairs], mx.uint32)
        outputs = self.outputs(x[tokens], experts, is_sorted=True)
        places = np.zeros(len(which), np.int32)
        places[pairs] = np.arange(len(pairs))
        own = mx.where(mx.array(is_own.reshape(chosen.shape)), weights, 0.0)
        return expert_combine(outputs, mx.array(places), own)


class SplitSelfConditioning(SelfConditioning):
    """Self-conditioning whose parts on all ranks are summed."""

    exchange: Exchange

    def signal(self, soft_embeddings: mx.array) -> mx.array:
        return self.exchange.sum(super().signal(soft_embeddings))


class SplitModel(DiffusionGemma):
    """A model that holds the rows of its own words."""

    exchange: Exchange
    words: range

    @property
    def table(self) -> EmbeddingTable:
        vocab = self.config.text.vocab_size
        return SplitTable.around(super().table, self.words, vocab, self.exchange)
