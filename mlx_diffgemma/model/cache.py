"""What every layer remembers of a sequence: a value that grows by making a longer one.

Letters: H KV heads, L positions of the prefix, M positions of a buffer, S new positions, Dh head
size.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlx_diffgemma.config import TextConfig
from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma.pictured import PictureSpan, in_common, pictures_of
from mlx_diffgemma.reading import Section, parse_object, shown

KeysValues = tuple[mx.array, mx.array]

MARK_BYTES = 1 << 30  # most bytes of the marks of one prefix
_GROWTH = 256  # positions by which a buffer grows, so that few sizes occur
_FORMAT = "mlx-diffgemma prefix 3"
_READABLE = (_FORMAT, "mlx-diffgemma prefix 2")  # the older one knows no pictures
_ANEW = "encode the prompt again"


@dataclass(frozen=True)
class LayerPrefix:
    """Keys and values of one layer, [1, H, M, Dh] each, of which the first `length` count.

    A sliding layer holds the last `window - 1` positions: what the next token, and every canvas
    token, may still see. A full layer (`window` is None) holds all of them, in a buffer with room
    behind them. Nothing is written in place here: `mx.slice_update` copies a buffer that a shorter
    prefix still holds, and writes into it where nobody else does.
    """

    window: int | None = None
    length: int = 0
    keys: mx.array | None = None
    values: mx.array | None = None

    def extended(
        self, keys: mx.array, values: mx.array, room: int = 0
    ) -> tuple[LayerPrefix, mx.array, mx.array]:
        """The layer with [1, H, S, Dh] appended, and all that the new positions may see. A new
        buffer is made for `room` positions at least.

        What is seen is a copy for one use, as in `followed_by`: a block of attention may be
        evaluated while the caller still has the shorter layer, and a buffer that is first written
        when nobody has it any more is written in place.
        """
        seen = self.followed_by(keys, values)
        if self.window is None:
            end = self.length + keys.shape[2]
            longer = replace(
                self,
                length=end,
                keys=self._written(self.keys, keys, room),
                values=self._written(self.values, values, room),
            )
            return longer, *seen
        length = min(self.window - 1, seen[0].shape[2])
        # A copy: a slice would hold the whole of what it was cut from.
        kept = (mx.contiguous(part[..., part.shape[2] - length :, :]) for part in seen)
        return LayerPrefix(self.window, length, *kept), *seen

    def held(self) -> KeysValues:
        """The positions that count, [1, H, length, Dh] each."""
        assert self.keys is not None and self.values is not None
        return self.keys[..., : self.length, :], self.values[..., : self.length, :]

    def followed_by(self, keys: mx.array, values: mx.array) -> KeysValues:
        """What is held with [1, H, S, Dh] behind it, joined for one use."""
        if self.keys is None or self.values is None or not self.length:
            return keys, values
        before = self.held()
        return (
            mx.concatenate([before[0], keys], axis=2),
            mx.concatenate([before[1], values], axis=2),
        )

    def trimmed(self, length: int) -> LayerPrefix:
        """The first `length` positions of a layer that has dropped none."""
        return replace(self, length=length)

    def arrays(self) -> list[mx.array]:
        return [array for array in (self.keys, self.values) if array is not None]

    def _written(self, buffer: mx.array | None, new: mx.array, room: int) -> mx.array:
        end = self.length + new.shape[2]
        if buffer is None or buffer.shape[2] < end:
            batch, heads, _, size = new.shape
            capacity = -(-max(end, room) // _GROWTH) * _GROWTH
            longer = mx.zeros((batch, heads, capacity, size), new.dtype)
            if buffer is not None and self.length:
                longer = _update(longer, buffer[..., : self.length, :], 0)
            buffer = longer
        return _update(buffer, new, self.length)


def _update(buffer: mx.array, new: mx.array, at: int) -> mx.array:
    return mx.slice_update(buffer, new, mx.array([at]), axes=(2,))


@dataclass(frozen=True)
class Mark:
    """A place that a prefix can go back to: what its sliding layers held after `length` positions.
    Full layers need no copy, for they drop nothing."""

    length: int
    windows: tuple[LayerPrefix, ...]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for layer in self.windows for array in layer.arrays())


class Origin:
    """What tells which pass of several Macs a prefix comes from.

    Attributes:
        number: the pass, from which every rank has kept its part.
    """

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass(frozen=True)
class Prefix:
    """One sequence as every layer remembers it, with the token ids that are in it.

    Attributes:
        ids: the tokens encoded, L of them.
        layers: what each layer holds of them.
        room: positions for which buffers are made when they have to grow.
        marks: places to go back to, the least recently used first.
        pictures: those among the tokens, in order.
        origin: the pass of several Macs that made this prefix, or one that it is the beginning of;
            None in one process.
    """

    ids: tuple[int, ...]
    layers: tuple[LayerPrefix, ...]
    room: int = 0
    marks: tuple[Mark, ...] = ()
    pictures: tuple[PictureSpan, ...] = ()
    origin: Origin | None = field(default=None, repr=False, compare=False)

    @classmethod
    def empty(cls, config: TextConfig) -> Prefix:
        """A prefix of no tokens."""
        windows = (config.sliding_window if a.is_sliding else None for a in config.attention)
        return cls((), tuple(LayerPrefix(window) for window in windows))

    def __len__(self) -> int:
        return len(self.ids)

    def arrays(self) -> list[mx.array]:
        """Every array that later tokens see, for `mx.eval`."""
        return [array for layer in self.layers for array in layer.arrays()]

    @cached_property
    def nbytes(self) -> int:
        """Bytes held, marks included."""
        arrays = self.arrays() + [
            array for mark in self.marks for layer in mark.windows for array in layer.arrays()
        ]
        return sum({id(array): array.nbytes for array in arrays}.values())

    def with_room(self, positions: int) -> Prefix:
        """The same prefix, whose buffers will be made for `positions` more when they grow: what is
        encoded piece by piece is then never copied from one buffer to a longer one."""
        return replace(self, room=len(self) + positions)

    def marked(self, most_bytes: int = MARK_BYTES) -> Prefix:
        """The same prefix with a mark at its end. The least recently used marks are dropped where
        all of them take more than `most_bytes`."""
        windows = tuple(layer for layer in self.layers if layer.window is not None)
        others = [mark for mark in self.marks if mark.length != len(self)]
        marks = [*others, Mark(len(self), windows)]
        while marks and sum(mark.nbytes for mark in marks) > most_bytes:
            del marks[0]
        return replace(self, marks=tuple(marks))

    def back_to(self, ids: Sequence[int]) -> Prefix:
        """The longest beginning of `ids`, and of the pictures among them, that this prefix can
        become without encoding anything: itself, itself cut short where no sliding layer has
        dropped a position yet, one of its marks, or a prefix of no tokens. It ends inside no
        picture."""
        common = self._in_common(ids)
        if self.can_be_cut(common):
            return self.cut(common)
        fitting = [mark.length for mark in self.marks if mark.length <= common]
        return self.cut(max(fitting)) if fitting else self.emptied()

    def can_be_cut(self, length: int) -> bool:
        """Whether the first `length` tokens are there without encoding anything: all of them, some
        of which no sliding layer has dropped a position yet, or those before a mark."""
        marks = (mark.length for mark in self.marks)
        return length == len(self) or self._is_whole or length in marks

    def cut(self, length: int) -> Prefix:
        """The first `length` tokens, of which `can_be_cut` holds."""
        if length == len(self):
            return self
        if self._is_whole:
            return self._cut(length, tuple(layer.trimmed(length) for layer in self.layers))
        mark = next(mark for mark in self.marks if mark.length == length)
        windows = iter(mark.windows)
        layers = tuple(
            layer.trimmed(length) if layer.window is None else next(windows)
            for layer in self.layers
        )
        used = (*(other for other in self.marks if other is not mark), mark)
        return replace(self, marks=used)._cut(length, layers)

    def continues(self, other: Prefix) -> bool:
        """Whether this prefix begins with all that another holds, pictures too."""
        begun = tuple(span for span in self.pictures if span.stop <= len(other))
        return self.ids[: len(other)] == other.ids and begun == other.pictures

    def _in_common(self, ids: Sequence[int]) -> int:
        """How many tokens this prefix and `ids` have in common at their beginnings, up to where a
        picture differs."""
        common, pictures = in_common(self.ids, ids), pictures_of(ids)
        if not self.pictures and not pictures:
            return common
        # The tokens of a picture see each other both ways, so each depends on all of it.
        apart = set(self.pictures) ^ set(pictures)
        both = set(self.pictures) & set(pictures)
        cut = (span.start for span in both if span.start < common < span.stop)
        return min([common, *(span.start for span in apart), *cut])

    @property
    def _is_whole(self) -> bool:
        """Whether no sliding layer has dropped a position yet."""
        return all(layer.length == len(self) for layer in self.layers)

    def emptied(self) -> Prefix:
        """A prefix of no tokens, which holds no arrays."""
        return Prefix((), tuple(LayerPrefix(layer.window) for layer in self.layers))

    def _cut(self, length: int, layers: tuple[LayerPrefix, ...]) -> Prefix:
        marks = tuple(mark for mark in self.marks if mark.length <= length)
        pictures = tuple(span for span in self.pictures if span.stop <= length)
        return Prefix(self.ids[:length], layers, marks=marks, pictures=pictures, origin=self.origin)


class PrefixCache:
    """A place for a prefix from one call to the next, for one call at a time.

    What a call encodes is put here chunk by chunk, so a call that is broken off leaves a shorter
    prefix, and never a wrong one.

    Attributes:
        prefix: what is held now.
        mark_bytes: most bytes of its marks.
    """

    def __init__(self, prefix: Prefix, identity: Callable[[], str]) -> None:
        self.prefix, self.mark_bytes = prefix, MARK_BYTES
        self._identity = identity
        self._weights = 0
        self._lock = threading.Lock()

    @property
    def offset(self) -> int:
        """Positions held."""
        return len(self.prefix)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.prefix.nbytes

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, this call alone uses the cache.

        Raises:
            UsageError: another call is using it.
        """
        if not self._lock.acquire(blocking=False):
            raise UsageError(
                "this prefix_cache is in use by another call; give each call at a time its own "
                "(prefix_cache.snapshot() makes one that holds the same)."
            )
        try:
            yield
        finally:
            self._lock.release()

    def require_model(self, model: MakesCaches) -> None:
        """Raise UsageError unless the cache is of this model with the weights that it has now, or
        of one with the same weights."""
        # Methods are equal where they are of the same model, and that takes no time to see.
        if self._identity != model.identity and self._identity() != model.identity():
            raise UsageError(
                "this prefix_cache belongs to another model; take one from model.make_cache()."
            )
        if self._weights != model.adaptations and len(self.prefix):
            raise UsageError(
                "adapters were loaded since this prefix_cache was filled; clear() it, or take "
                "another from model.make_cache()."
            )
        self._weights = model.adaptations

    def begin(self, ids: Sequence[int]) -> None:
        """Go back to the longest beginning of `ids` that is known."""
        self.prefix = self.prefix.back_to(ids)

    def rest(self) -> None:
        """Encoding calls this after each chunk of a prompt, so that a cache which shares the model
        with others can let them run. This class does nothing in it."""

    def snapshot(self) -> PrefixCache:
        """Another cache that holds the same prefix. Nothing is copied until one of them grows."""
        other = PrefixCache(self.prefix, self._identity)
        other._weights = self._weights
        return other

    def clear(self) -> None:
        """Forget the prefix."""
        self.prefix = self.prefix.emptied()

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file that `load` reads; the marks are left out.

        Raises:
            CheckpointError: the file cannot be written.
            UsageError: several Macs hold the prefix, each a part of it.
        """
        file = _safetensors(path)
        if self.prefix.origin is not None:
            raise UsageError(
                f"{file} cannot be written: several Macs hold this prefix cache, each a part of "
                "it; save one from a process that runs alone."
            )
        arrays = {}
        for index, layer in enumerate(self.prefix.layers):
            if layer.keys is not None:
                arrays[f"{index}.keys"], arrays[f"{index}.values"] = layer.held()
        pictures = [[span.start, span.stop, span.key] for span in self.prefix.pictures]
        state = {
            "format": _FORMAT,
            "model": self._identity(),
            "ids": list(self.prefix.ids),
            "pictures": pictures,
        }
        if not file.parent.is_dir():
            raise CheckpointError(
                f"{file} cannot be written: there is no folder {file.parent}; make it first."
            )
        try:
            mx.save_safetensors(str(file), arrays, metadata={"prefix": json.dumps(state)})
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{file} cannot be written ({error}); give another path."
            ) from None

    @classmethod
    def load(cls, path: str | Path, model: MakesCaches) -> PrefixCache:
        """Read what `save` wrote with the same model.

        Raises:
            CheckpointError, ConfigError: the file is missing or damaged, holds no prefix, or one of
                another model.
        """
        file, cache = _safetensors(path), model.make_cache()
        try:
            arrays, metadata = _load_safetensors(str(file))
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file} is not a saved prefix cache ({error}).") from None
        if "prefix" not in metadata:
            raise CheckpointError(f"{file} is not a saved prefix cache (it holds no prefix).")
        content = parse_object(metadata["prefix"], file, mend=_ANEW)
        state = Section(content, "prefix", str(file), _ANEW)
        if state.get("format") not in _READABLE:
            raise CheckpointError(
                f"{file} is not a saved prefix cache (its format is {shown(state.get('format'))})."
            )
        ids = state.ids("ids")
        if state.text("model") != cache._identity():
            raise CheckpointError(
                f"{file} was saved with other weights; encode the prompt again with this model."
            )
        if ids:
            pictures = _loaded_pictures(state)
            layers = _loaded_layers(file, arrays, cache.prefix, len(ids))
            cache.prefix = Prefix(ids, layers, pictures=pictures)
        return cache


class MakesCaches(Protocol):
    """A model, as far as a cache needs it."""

    adaptations: int

    def make_cache(self) -> PrefixCache: ...

    def identity(self) -> str: ...


def _loaded_pictures(state: Section) -> tuple[PictureSpan, ...]:
    """The pictures of a saved prefix.

    Raises:
        ConfigError: they are damaged.
    """
    try:
        return tuple(
            PictureSpan(int(start), int(stop), str(key))
            for start, stop, key in state.get("pictures", ())
        )
    except (TypeError, ValueError):
        raise state.fail("pictures", f"is damaged; {_ANEW}") from None


def _loaded_layers(
    file: Path, arrays: dict[str, mx.array], empty: Prefix, length: int
) -> tuple[LayerPrefix, ...]:
    layers = []
    for index, layer in enumerate(empty.layers):
        held = length if layer.window is None else min(length, layer.window - 1)
        keys, values = arrays.get(f"{index}.keys"), arrays.get(f"{index}.values")
        parts = [part for part in (keys, values) if part is not None and part.ndim == 4]
        if len(parts) < 2 or any(part.shape[2] != held for part in parts):
            raise CheckpointError(
                f"{file} does not hold {held} positions of layer {index}; encode the prompt again."
            )
        layers.append(LayerPrefix(layer.window, held, keys, values))
    return tuple(layers)


def _safetensors(path: str | Path) -> Path:
    """The file that MLX writes for a path: it adds the suffix where that is missing."""
    if not isinstance(path, (str, Path)) or not str(path).isprintable():
        raise CheckpointError(f"{shown(path)} is no name of a file; give another.")
    file = Path(path)
    return file if file.suffix == ".safetensors" else file.with_name(f"{file.name}.safetensors")


def _load_safetensors(path: str) -> tuple[dict[str, mx.array], dict[str, str]]:
    # MLX's own signature is a union over every file format and every flag.
    loaded: Any = mx.load(path, format="safetensors", return_metadata=True)
    mx.eval(loaded[0])  # what another thread finds unevaluated belongs to a stream that it lacks
    return loaded
