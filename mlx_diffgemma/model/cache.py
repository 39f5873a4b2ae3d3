"""The prefix cache: keys and values of the prompt and of every committed canvas.

The encoder writes it, the decoder only reads it. Letters: B batch, H KV heads, L prefix positions,
C canvas, Dh head size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_diffgemma.config import TextConfig
from mlx_diffgemma.errors import CheckpointError

_GROWTH = 256  # positions by which a buffer grows, so that few sizes occur


class LayerCache:
    """Keys and values of one layer, with room for a canvas behind the prefix.

    A sliding layer keeps the last `window - 1` positions: what the next token, and every canvas
    token, may still see. The buffers hold `length` valid positions; what lies behind is scratch
    that each denoising step overwrites with its canvas, so no step copies the prefix.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.length = 0
        self._canvas = 0
        self._reserved = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def reserve(self, positions: int) -> None:
        """Make the next buffer long enough for `positions`, where they are all kept: a prefix that
        is written piece by piece is then never copied from one buffer to a longer one."""
        if self.window is None:
            self._reserved = positions

    def extend(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append [B, H, S, Dh]; returns all that the new positions may see, themselves included."""
        if self.window is None:
            keys, values = self._write(keys, values)
            self.length = keys.shape[2]
            return keys, values
        if self.keys is not None and self.values is not None:
            keys = mx.concatenate([self.keys[..., : self.length, :], keys], axis=2)
            values = mx.concatenate([self.values[..., : self.length, :], values], axis=2)
        self.length = min(self.window - 1, keys.shape[2])
        start = keys.shape[2] - self.length
        self.keys, self.values = keys[..., start:, :], values[..., start:, :]
        return keys, values

    def with_canvas(
        self, keys: mx.array, values: mx.array, places: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """The prefix followed by a canvas [B, H, C, Dh], which is not kept; or, where `places` [A]
        is given, by the canvas of the last call with those positions replaced."""
        if places is None:
            self._canvas = keys.shape[2]
            return self._write(keys, values)
        assert self.keys is not None and self.values is not None
        slots, end = places + self.length, self.length + self._canvas
        self.keys[:, :, slots] = keys
        self.values[:, :, slots] = values
        return self.keys[..., :end, :], self.values[..., :end, :]

    def _write(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        end = self.length + keys.shape[2]
        room = max(end, self._reserved)
        self.keys = _with_room(self.keys, keys, self.length, end, room)
        self.values = _with_room(self.values, values, self.length, end, room)
        self.keys[..., self.length : end, :] = keys
        self.values[..., self.length : end, :] = values
        return self.keys[..., :end, :], self.values[..., :end, :]

    def arrays(self) -> list[mx.array]:
        return [array for array in (self.keys, self.values) if array is not None]


def _with_room(
    buffer: mx.array | None, like: mx.array, length: int, end: int, room: int
) -> mx.array:
    """`buffer` if it holds `end` positions, else one for `room` with its first `length`."""
    if buffer is not None and buffer.shape[2] >= end:
        return buffer
    batch, heads, _, size = like.shape
    capacity = -(-room // _GROWTH) * _GROWTH
    longer = mx.zeros((batch, heads, capacity, size), like.dtype)
    if buffer is not None:
        longer[..., :length, :] = buffer[..., :length, :]
    return longer


class PrefixCache:
    """What every layer remembers of the prefix of B sequences.

    Sequences of different lengths end at the same index: shorter ones are padded on the left, and
    `pads[b]` says by how much. Positions count from the first real token, so a sequence computes
    the same alone and in a batch.

    Attributes:
        layers: one `LayerCache` a layer.
        offset: positions encoded so far, padding included.
        pads: [B] left padding, or None where there is none.
        tokens: the token ids of each sequence that are in the cache, kept by the caller so that a
            later prompt can reuse a common beginning.
    """

    def __init__(self, layers: Sequence[LayerCache], pads: Sequence[int] | None = None) -> None:
        self.layers = list(layers)
        self.offset = 0
        self.pads = np.array(pads) if pads is not None and any(pads) else None
        self.tokens: list[list[int]] = []

    @classmethod
    def for_model(cls, config: TextConfig, pads: Sequence[int] | None = None) -> PrefixCache:
        windows = [config.sliding_window if a.is_sliding else None for a in config.attention]
        return cls([LayerCache(window) for window in windows], pads)

    def rope_offset(self) -> int | mx.array:
        """Position of the next token: one number, or [B] where the padding differs."""
        return self.offset if self.pads is None else mx.array(self.offset - self.pads)

    def reserve(self, positions: int) -> None:
        """Make room for `positions` more, ahead of writing them piece by piece."""
        for layer in self.layers:
            layer.reserve(self.offset + positions)

    def arrays(self) -> list[mx.array]:
        """Every array held, for `mx.eval`."""
        return [array for layer in self.layers for array in layer.arrays()]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())

    def snapshot(self) -> PrefixCache:
        """An independent cache in the same state. Cheap: arrays are shared until one is written."""
        copy = PrefixCache([LayerCache(layer.window) for layer in self.layers])
        copy.restore(self)
        return copy

    def restore(self, snapshot: PrefixCache) -> None:
        """Return to the state of `snapshot`, which stays usable."""
        for mine, theirs in zip(self.layers, snapshot.layers, strict=True):
            mine.length, mine.keys, mine.values = theirs.length, theirs.keys, theirs.values
        self.offset, self.pads = snapshot.offset, snapshot.pads
        self.tokens = [list(row) for row in snapshot.tokens]

    def trim(self, positions: int) -> bool:
        """Go back to the first `positions` of the only sequence, if no sliding layer has dropped
        any position yet; returns whether that was possible."""
        if len(self.tokens) != 1 or self.pads is not None or positions > self.offset:
            return False
        if any(layer.length != self.offset for layer in self.layers):
            return False
        for layer in self.layers:
            layer.length = positions
        self.offset = positions
        self.tokens = [self.tokens[0][:positions]]
        return True

    def clear(self) -> None:
        """Forget the prefix, as if newly made for sequences without padding."""
        self.restore(PrefixCache([LayerCache(layer.window) for layer in self.layers]))

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep only these sequences of the batch, in this order."""
        index = mx.array(list(rows))
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[index], layer.values[index]
        if self.pads is not None:
            self.pads = self.pads[list(rows)]
        self.tokens = [self.tokens[row] for row in rows]

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file that `load` reads."""
        arrays = {}
        for index, layer in enumerate(self.layers):
            if layer.keys is not None and layer.values is not None:
                arrays[f"{index}.keys"] = layer.keys[..., : layer.length, :]
                arrays[f"{index}.values"] = layer.values[..., : layer.length, :]
        state = {
            "windows": [layer.window for layer in self.layers],
            "offset": self.offset,
            "pads": None if self.pads is None else self.pads.tolist(),
            "tokens": self.tokens,
        }
        mx.save_safetensors(str(path), arrays, metadata={"prefix_cache": json.dumps(state)})

    @classmethod
    def load(cls, path: str | Path) -> PrefixCache:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or holds no prefix cache.
        """
        try:
            arrays, metadata = _load_safetensors(str(path))
            state = json.loads(metadata["prefix_cache"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is not a saved prefix cache ({error}).") from None
        cache = cls([LayerCache(window) for window in state["windows"]], state["pads"])
        cache.offset, cache.tokens = state["offset"], state["tokens"]
        for index, layer in enumerate(cache.layers):
            keys = arrays.get(f"{index}.keys")
            if keys is not None:
                layer.keys, layer.values = keys, arrays[f"{index}.values"]
                layer.length = keys.shape[2]
        return cache


def _load_safetensors(path: str) -> tuple[dict[str, mx.array], dict[str, str]]:
    # MLX's own signature is a union over every file format and every flag.
    return mx.load(path, format="safetensors", return_metadata=True)  # type: ignore[return-value]
