"""DiffusionGemma: one set of weights, run as an encoder of the prefix and a denoiser of a canvas.

Follows `transformers.models.diffusion_gemma` (5.23). Attributes bear the names of the checkpoint's
tensors. Sequences of any length go through together, one behind the other, and attend each to its
own prefix, so there is no padding. Letters: R sequences, C canvas, N positions of all of them
together, H KV heads, Dh head size, D hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_diffgemma.config import ModelConfig, TextConfig
from mlx_diffgemma.errors import PromptError, UsageError
from mlx_diffgemma.kernels.activation import softcap
from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
from mlx_diffgemma.kernels.few_tokens import few_tokens_pass
from mlx_diffgemma.kernels.materialized import whole_pass
from mlx_diffgemma.kernels.vocabulary import (
    Row,
    VocabularyPass,
    VocabularyResult,
    vocabulary_pass,
)
from mlx_diffgemma.model.attention import Attention, attend
from mlx_diffgemma.model.cache import KeysValues, LayerPrefix, Prefix, PrefixCache
from mlx_diffgemma.model.layers import Attend, DecoderLayer, SelfConditioning
from mlx_diffgemma.model.vision import Vision
from mlx_diffgemma.pictured import PictureSpan

_VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_PREFILL_STEP_SIZE = 2048  # as mlx-lm: many tokens a product, for a GPU
_SMALL_VOCABULARY = 8192  # words up to which the logits of a canvas may be held


class _EncoderLayer(nn.Module):
    """The only weight that an encoder layer does not share with its decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_scalar = mx.ones((1,))


class _EncoderText(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = [_EncoderLayer() for _ in config.attention]


class _Encoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.language_model = _EncoderText(config)
        # The vision tower is attached when it is needed: `vision_tower` and `embed_vision`.


class _Decoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, sizes) for sizes in config.attention]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config)


class _Backbone(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.decoder = _Decoder(config)
        self.encoder = _Encoder(config)


@dataclass(frozen=True)
class CanvasView:
    """What a pass over one canvas starts from.

    Attributes:
        tokens: [C] int32.
        prefix: the sequence that the canvas continues.
        soft_embeddings: [C, D], what the pass before expected; None before the first one.
        places: [A] the positions to compute, where the others are to be seen as they were; None for
            all of them.
        layers: the canvas's keys and values, [1, H, C, Dh] twice, in every layer of an earlier
            pass; needed with `places`.
    """

    tokens: mx.array
    prefix: Prefix
    soft_embeddings: mx.array | None = None
    places: np.ndarray | None = None
    layers: tuple[KeysValues, ...] = ()


@dataclass(frozen=True)
class Pass:
    """Positions on their way through the layers.

    Attributes:
        x: [1, N, D].
        look: gives, for the index of a layer, how its attention looks at what is in sight.
        scalars: by what the output of each layer is multiplied.
    """

    x: mx.array
    look: Callable[[int], Attend]
    scalars: tuple[mx.array, ...]


class DiffusionGemma(nn.Module):
    """The model of token ids, to which the vision tower is attached when the first picture comes.
    It draws nothing at random but by the keys that it is given, and knows no strings.

    Attributes:
        vocabulary_pass: how hidden states become predictions; loading puts a CPU's form in.
        prefill_step_size: tokens of a prompt to encode at a time.
        adapted: whether an adapter is part of the weights.
        adaptations: how many times adapters were loaded; a prefix that was encoded before the last
            time is no longer of this model.
        load_vision: gives the vision tower when the first picture comes.
        reads_pictures: whether there is a vision tower to be loaded.
        never_drawn: ids that stand for pictures, in a checkpoint with a vision tower: no canvas may
            hold them in the end.
        read_weights: reads what is still on disk of the weights of a model that was loaded lazily,
            before they are first used; None where no weights are left on disk.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.read_weights: Callable[[], None] | None = None
        self.model = _Backbone(config.text)
        self.prefill_step_size = _PREFILL_STEP_SIZE
        self.adapted = False
        self.adaptations = 0
        self.load_vision: Callable[[], Vision] = _no_tower
        self.never_drawn: tuple[int, ...] = ()
        self.reads_pictures = False
        small = config.text.vocab_size <= _SMALL_VOCABULARY
        self.vocabulary_pass: VocabularyPass = whole_pass if small else vocabulary_pass

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.decoder.layers

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the activations, and of weights that are not quantized."""
        return self.model.decoder.norm.weight.dtype

    @property
    def table(self) -> EmbeddingTable:
        """The embedding as rows, which are the head too."""
        return EmbeddingTable.of(self.model.decoder.embed_tokens, self.dtype)

    def compile(self) -> None:
        """Run what follows the attention of each layer as one compiled function, for a GPU."""
        for layer in self.layers:
            layer.compile()

    def empty_prefix(self) -> Prefix:
        """The prefix of a sequence of which nothing is encoded yet."""
        return Prefix.empty(self.config.text)

    def make_cache(self) -> PrefixCache:
        """A place for a prefix from one call to the next."""
        cache = PrefixCache(self.empty_prefix(), self.identity)
        cache.require_model(self)
        return cache

    def identity(self) -> str:
        """A fingerprint of the text model's weights: equal for equal weights, and hardly ever for
        others. The vision tower is left out, for it may not be loaded yet."""
        every: list[tuple[str, mx.array]] = tree_flatten(self.parameters())
        parameters = [each for each in every if not each[0].startswith(_VISION)]
        firsts = [array.reshape(-1)[:8] for _, array in parameters]
        mx.eval(firsts)
        digest = hashlib.sha256()
        for (name, array), first in zip(parameters, firsts, strict=True):
            digest.update(f"{name} {array.dtype} {array.shape} {first.tolist()}".encode())
        return digest.hexdigest()

    def require_vision(self) -> None:
        """Load the vision tower, unless it is there.

        Raises:
            PromptError: the model has no vision tower.
            CheckpointError: the tower is incomplete or damaged.
            MemoryShortageError: the tower does not fit.
        """
        encoder = self.model.encoder
        if "vision_tower" not in encoder:
            vision = self.load_vision()
            encoder.vision_tower, encoder.embed_vision = vision.vision_tower, vision.embed_vision

    def see(self, values: mx.array, columns: int) -> mx.array:
        """What takes the places of the image tokens of pictures of one size, [B, S, D], not scaled
        by √D.

        Args:
            values: [B, P, 3 · side²], from 0 to 1, of the P patches of each picture.
            columns: patches in a row.

        Raises:
            PromptError, CheckpointError, MemoryShortageError: as for `require_vision`.
        """
        self.require_vision()
        encoder = self.model.encoder
        seen: mx.array = encoder.embed_vision(encoder.vision_tower(values, columns))
        return seen

    def embed_picture(self, picture: PictureSpan) -> mx.array:
        """The embeddings [S, D] that stand in the place of a picture's image tokens, not scaled by
        √D.

        Raises:
            PromptError, CheckpointError, MemoryShortageError: as for `require_vision`.
        """
        assert picture.patches is not None, "a picture that was read before is not read again"
        values = mx.array(picture.patches)[None].astype(mx.float32) / 255
        return self.see(values, picture.columns)[0].astype(self.dtype)

    def encode(
        self,
        ids: Sequence[Sequence[int]],
        prefixes: Sequence[Prefix],
        pictures: Sequence[Mapping[PictureSpan, mx.array]] = (),
    ) -> tuple[mx.array, tuple[Prefix, ...]]:
        """Append token ids, one sequence of them for each of R prefixes; returns the hidden states
        [N, D] of all of them, one sequence behind the other, and the longer prefixes.

        `pictures` are, for each sequence, the whole pictures among its new tokens with their
        embeddings [S, D]; their spans count the positions of the longer prefix.

        A caller that only wants the prefixes evaluates their arrays: the last layer's MLP and the
        final norm are then never computed.

        Raises:
            UsageError: a row of token ids is empty, or a picture is cut or does not fit its span.
        """
        require_encodable(ids, prefixes, pictures)
        lengths = [len(row) for row in ids]
        if self.read_weights is not None and not self.training:
            self.read_weights()
        x = self.embed(mx.array([token for row in ids for token in row], mx.int32)[None])
        own_pictures = [dict(row) for row in pictures] or [{} for _ in ids]
        x = _with_pictures(x, lengths, prefixes, own_pictures)
        spans = [
            tuple((span.start - len(prefix), span.stop - len(prefix)) for span in row)
            for prefix, row in zip(prefixes, own_pictures, strict=True)
        ]
        layers: list[list[LayerPrefix]] = [[] for _ in prefixes]

        def look(index: int, attention: Attention, x: mx.array) -> mx.array:
            outputs = []
            for row, heads in enumerate(_rows(lengths, *attention.project(x))):
                prefix, (queries, keys, values) = prefixes[row], heads
                queries, keys = attention.rotate(queries, keys, len(prefix))
                longer, keys, values = prefix.layers[index].extended(keys, values, prefix.room)
                layers[row].append(longer)
                # A gradient is traced, and nothing can be evaluated inside it.
                bounded = not attention.training
                sight = replace(attention.causal, pictures=spans[row])
                outputs.append(attend(queries, keys, values, sight, bounded=bounded))
            return attention.output(_joined(outputs))

        encoders = self.model.encoder.language_model.layers
        scalars = tuple(layer.layer_scalar for layer in encoders)
        (x,) = self.through_layers([Pass(x, lambda index: partial(look, index), scalars)])
        longer = tuple(
            replace(
                prefix,
                ids=(*prefix.ids, *map(int, row)),
                layers=tuple(made),
                pictures=(*prefix.pictures, *(span.known() for span in seen)),
            )
            for prefix, row, made, seen in zip(prefixes, ids, layers, own_pictures, strict=True)
        )
        return self.model.decoder.norm(x)[0], longer

    def decode(self, canvases: Sequence[CanvasView]) -> mx.array:
        """Hidden states [N, D] of R canvases, each behind its own prefix, which is only read."""
        return self.decode_keeping(canvases)[0]

    def decode_keeping(
        self, canvases: Sequence[CanvasView]
    ) -> tuple[mx.array, tuple[tuple[KeysValues, ...], ...]]:
        """As `decode`, with the keys and values of each canvas in every layer, which a later pass
        over a part of it needs. Where a canvas names `places` [A], only those positions are
        computed and counted in N."""
        passes, kept = [], []
        for some in self.dealt(canvases):
            one, own = self._canvas_pass(some)
            passes.append(one)
            kept += own
        outputs = self.through_layers(passes)
        x = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)
        return self.model.decoder.norm(x)[0], tuple(map(tuple, kept))

    def dealt(self, canvases: Sequence[CanvasView]) -> Sequence[Sequence[CanvasView]]:
        """Which canvases, in order, go through the layers together."""
        return [canvases]

    def through_layers(self, passes: Sequence[Pass]) -> list[mx.array]:
        """What comes out of the last layer, [1, N, D] for each pass."""
        outputs = []
        for one in passes:
            x = one.x
            for index, (layer, scalar) in enumerate(zip(self.layers, one.scalars, strict=True)):
                x = layer(x, one.look(index), scalar)
            outputs.append(x)
        return outputs

    def _canvas_pass(self, canvases: Sequence[CanvasView]) -> tuple[Pass, list[list[KeysValues]]]:
        """A pass over canvases, and for each of them a list to which every layer adds its keys and
        values."""
        places = [None if c.places is None else mx.array(c.places) for c in canvases]
        parts = [
            canvas.tokens if place is None else canvas.tokens[place]
            for canvas, place in zip(canvases, places, strict=True)
        ]
        lengths = [part.shape[0] for part in parts]
        x = self.embed(mx.concatenate(parts)[None])
        x = self.conditioned(x, self._soft(canvases, places, x))
        kept: list[list[KeysValues]] = [[] for _ in canvases]

        def look(index: int, attention: Attention, x: mx.array) -> mx.array:
            outputs = []
            for row, heads in enumerate(_rows(lengths, *attention.project(x))):
                canvas, (queries, keys, values) = canvases[row], heads
                queries, keys = attention.rotate(queries, keys, len(canvas.prefix), places[row])
                if canvas.places is not None:
                    stale = canvas.layers[index]
                    keys = _replaced(stale[0], keys, canvas.places)
                    values = _replaced(stale[1], values, canvas.places)
                kept[row].append((keys, values))
                keys, values = canvas.prefix.layers[index].followed_by(keys, values)
                outputs.append(attend(queries, keys, values, None))
            return attention.output(_joined(outputs))

        scalars = tuple(layer.layer_scalar for layer in self.layers)
        return Pass(x, lambda index: partial(look, index), scalars), kept

    def predict(
        self, hidden: mx.array, rows: Sequence[Row], standing: mx.array | None = None
    ) -> VocabularyResult:
        """What hidden states [N, D] say of the vocabulary; `rows` say what is asked of them, and
        `standing` [N] of which tokens the probability is wanted. Where every row names its
        candidates, no other word is looked at."""
        cap = self.config.text.final_logit_softcapping
        few = all(row.candidates is not None for row in rows)
        run: VocabularyPass = few_tokens_pass if few else self.vocabulary_pass
        return run(hidden, self.table, rows, softcap=cap, standing=standing)

    def logits_of(self, hidden: mx.array, ids: mx.array) -> mx.array:
        """Hidden states [P, D] and token ids [U] -> the soft-capped logits of these tokens alone,
        [P, U] in float32."""
        raw = self.table.scores(hidden, ids)
        # The softcap makes an infinity finite; a sum of products does not.
        poison = raw.sum(axis=-1, keepdims=True) * 0.0
        return softcap(raw, self.config.text.final_logit_softcapping) + poison

    def logits(self, hidden: mx.array) -> mx.array:
        """[..., D] -> [..., V] in float32, soft-capped."""
        raw = self.table.product(hidden).astype(mx.float32)
        # The softcap makes an infinity finite; a sum of products does not.
        poison = raw.sum(axis=-1, keepdims=True) * 0.0
        return softcap(raw, self.config.text.final_logit_softcapping) + poison

    def soft_embeddings(self, processed_logits: mx.array) -> mx.array:
        """The embedding that the model expects at each position, scaled by √D: [..., V] ->
        [..., D].

        `processed_logits` are the logits after the temperature.
        """
        weights = mx.softmax(processed_logits.astype(mx.float32), axis=-1).astype(self.dtype)
        return self.table.expected(weights) * self._embed_scale

    def embed(self, ids: mx.array) -> mx.array:
        """Token ids [...] -> [..., D], scaled by √D."""
        return self.model.decoder.embed_tokens(ids).astype(self.dtype) * self._embed_scale

    def conditioned(self, x: mx.array, soft_embeddings: mx.array) -> mx.array:
        """The embeddings of canvases with what was expected of them: [1, N, D] twice ->
        [1, N, D]."""
        conditioned: mx.array = self.model.decoder.self_conditioning(x, soft_embeddings)
        return conditioned

    @property
    def _embed_scale(self) -> mx.array:
        # The reference rounds √hidden to the type of the embedding.
        return mx.array(self.config.text.hidden_size**0.5, self.dtype)

    def _soft(
        self, canvases: Sequence[CanvasView], places: Sequence[mx.array | None], x: mx.array
    ) -> mx.array:
        """The soft embeddings [1, N, D] of all canvases; zeros before a first pass."""
        if all(canvas.soft_embeddings is None for canvas in canvases):
            return mx.zeros_like(x)
        parts = []
        for canvas, place in zip(canvases, places, strict=True):
            soft = canvas.soft_embeddings
            if soft is None:
                soft = mx.zeros((canvas.tokens.shape[0], x.shape[-1]), x.dtype)
            parts.append((soft if place is None else soft[place]).astype(x.dtype))
        return mx.concatenate(parts)[None]


def _no_tower() -> Vision:
    raise PromptError("this model has no vision tower, so it reads no pictures.")


def require_encodable(
    ids: Sequence[Sequence[int]],
    prefixes: Sequence[Prefix],
    pictures: Sequence[Mapping[PictureSpan, mx.array]],
) -> None:
    """Raise UsageError where `DiffusionGemma.encode` cannot take its arguments."""
    if not all(len(row) for row in ids):
        raise UsageError("there is nothing to encode in an empty row of token ids; leave it out.")
    for row, prefix, own in zip(ids, prefixes, pictures, strict=False):
        done = len(prefix)
        for span, seen in sorted(own.items(), key=lambda item: item[0].start):
            end = len(prefix) + len(row)
            if span.start < done or span.stop > end or seen.shape[0] != len(span):
                raise UsageError(
                    f"a picture of {seen.shape[0]} soft tokens has {len(span)} places, or is cut."
                )
            done = span.stop


def _with_pictures(
    x: mx.array,
    lengths: Sequence[int],
    prefixes: Sequence[Prefix],
    pictures: Sequence[Mapping[PictureSpan, mx.array]],
) -> mx.array:
    """Embeddings [1, N, D] of sequences that lie one behind the other, with those of pictures in
    their places."""
    if not any(pictures):
        return x
    parts, done, begin = [], 0, 0
    for length, prefix, row in zip(lengths, prefixes, pictures, strict=True):
        for span, seen in sorted(row.items(), key=lambda item: item[0].start):
            start, stop = (begin + place - len(prefix) for place in (span.start, span.stop))
            parts += [x[:, done:start], seen[None].astype(x.dtype)]
            done = stop
        begin += length
    return mx.concatenate([*parts, x[:, done:]], axis=1)


def _rows(lengths: Sequence[int], *heads: mx.array) -> list[tuple[mx.array, ...]]:
    """Heads [1, H, N, Dh] as those of each sequence, [1, H, S, Dh]."""
    if len(lengths) == 1:
        return [heads]
    spans = list(pairwise(accumulate(lengths, initial=0)))
    return [tuple(part[:, :, start:stop] for part in heads) for start, stop in spans]


def _joined(outputs: list[mx.array]) -> mx.array:
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _replaced(stale: mx.array, fresh: mx.array, places: np.ndarray) -> mx.array:
    """[1, H, C, Dh] with the positions `places` [A] taken from `fresh` [1, H, A, Dh]."""
    source = np.arange(stale.shape[2])
    source[places] = stale.shape[2] + np.arange(len(places))
    return mx.take(mx.concatenate([stale, fresh], axis=2), mx.array(source), axis=2)
