"""Whether something fits into this machine's memory, and limits of MLX that are restored after use.

Sizes are in bytes; 1 GB is 1e9 bytes. Letter: N positions of all canvases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol

import mlx.core as mx

from mlx_diffgemma.config import AttentionConfig, TextConfig, VisionConfig
from mlx_diffgemma.errors import MemoryShortageError

MACS = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)
"""Memory of the Macs that are sold, in binary gigabytes."""
_RESERVED = 3  # binary gigabytes for the system, once Metal's limit is raised

_GROWTH = 256  # positions by which the buffers of full layers grow
_SCORE_BYTES = 64 << 20  # attention scores of one block
_BLOCKS_AHEAD = 4  # blocks of scores that Metal has queued but not finished in a denoising step
_ROWS_AHEAD = 2  # sequences whose keys and values are joined with a canvas at the same time
_VOCABULARY_CHUNK = 8192  # tokens of the vocabulary in one product
_CHUNK_COPIES = 6  # arrays of [N, chunk] alive at once, in the type of the activations
_WHOLE_COPIES = 6  # float32 copies of the logits of a vocabulary that is one chunk
_LIKELY_TOKENS = 16  # kept of each position for the self-conditioning, as id and probability
_STATISTICS = 16  # float32 numbers kept of each position beside them


class Needed(Protocol):
    """A count of memory that `require` can judge."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""

    @property
    def parts(self) -> Mapping[str, int]:
        """Bytes by what they are for."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a generation takes beside what is loaded already.

    Attributes:
        weights: of a model that is still to be loaded; 0 where it is loaded.
        prefix: keys and values of all sequences, answers included.
        prefill: most that one chunk of a prompt takes while it is encoded.
        step: most that one denoising step over all canvases takes.
        sequences: how many sequences were counted.
    """

    weights: int
    prefix: int
    prefill: int
    step: int
    sequences: int = 0

    @property
    def total(self) -> int:
        """Bytes at the peak: a chunk of a prompt and a denoising step are never held together."""
        return self.weights + self.prefix + max(self.prefill, self.step)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name, without what is zero."""
        named = {
            "weights": self.weights,
            "prefix": self.prefix,
            "prefill": self.prefill,
            "denoising step": self.step,
        }
        return {name: size for name, size in named.items() if size}


def estimate(
    config: TextConfig,
    weights: int,
    *,
    canvas_length: int,
    sequences: Sequence[tuple[int, int]] = (),
    activation_bytes: int = 2,
    step_size: int = 512,
    vision: VisionConfig | None = None,
    patches: int = 0,
) -> MemoryEstimate:
    """Memory of a generation, counted from the shapes.

    Prompts are encoded one at a time, `step_size` positions a chunk; a denoising step computes the
    canvases of all sequences together.

    Args:
        weights: bytes of weights that are not loaded yet.
        canvas_length: positions of a canvas.
        sequences: of each sequence the positions of its prompt, and those of its answer, which are
            rounded up to whole canvases. Without sequences, one canvas behind no prompt is counted.
        activation_bytes: bytes of one number between layers.
        step_size: positions of a prompt that are encoded at a time.
        vision, patches: the tower, and the patches of the largest picture; pictures are read one at
            a time.
    """
    answers = [_whole(answer, canvas_length) for _, answer in sequences]
    held = [prompt + answer for (prompt, _), answer in zip(sequences, answers, strict=True)]
    prefix = sum(
        _prefix(config, layer, positions, activation_bytes)
        for layer in config.attention
        for positions in held
    )
    prefill = 0
    for (prompt, _), answer, positions in zip(sequences, answers, held, strict=True):
        committed = canvas_length if answer > canvas_length else 0
        new = min(step_size, max(prompt, committed))
        prefill = max(prefill, _prefill(config, new, positions, activation_bytes))
    if vision is not None:
        prefill = max(prefill, _picture(vision, patches, activation_bytes))
    step = _step(config, held or [canvas_length], canvas_length, activation_bytes)
    return MemoryEstimate(weights, prefix, prefill, step, len(sequences))


def layer_numbers(config: TextConfig, attention: AttentionConfig) -> int:
    """Numbers that one layer computes for one token: the inputs of its norms, projections and
    products, without attention scores."""
    dim, queries = config.hidden_size, attention.num_heads * attention.head_dim
    attended = 3 * queries + 4 * attention.num_kv_heads * attention.head_dim
    dense = 4 * config.intermediate_size
    sparse = config.top_k_experts * (3 * config.moe_intermediate_size + dim)
    return 8 * dim + attended + dense + sparse


def _whole(count: int, of: int) -> int:
    return -(-count // of) * of


def _entry(layer: AttentionConfig, item: int) -> int:
    """Bytes of the key and value of one position in one layer."""
    return 2 * layer.num_kv_heads * layer.head_dim * item


def _kept(config: TextConfig, layer: AttentionConfig, positions: int) -> int:
    """Positions of a sequence that a layer remembers."""
    return min(positions, config.sliding_window - 1) if layer.is_sliding else positions


def _prefix(config: TextConfig, layer: AttentionConfig, positions: int, item: int) -> int:
    """Bytes that a layer remembers of one sequence."""
    kept = _kept(config, layer, positions)
    return (kept if layer.is_sliding else _whole(kept, _GROWTH)) * _entry(layer, item)


def _prefill(config: TextConfig, new: int, positions: int, item: int) -> int:
    """Bytes for `new` positions at the end of a sequence, in the layer that takes the most."""
    most = 0
    for layer in config.attention:
        keys = _kept(config, layer, positions) + new
        # Scores and probabilities of one block, and a copy of the layer's keys and values: sliding
        # layers always make one, full layers where a fork holds the shorter prefix.
        scores = 2 * min(_SCORE_BYTES, 4 * layer.num_heads * new * keys)
        activations = new * layer_numbers(config, layer) * item
        most = max(most, activations + scores + keys * _entry(layer, item))
    return most + 2 * new * config.hidden_size * item


def _picture(vision: VisionConfig, patches: int, item: int) -> int:
    """Bytes that the tower takes for a picture: its values in float32, and the widest layer twice,
    for one is queued while another is computed."""
    heads = (vision.num_attention_heads + 2 * vision.num_key_value_heads) * vision.head_dim
    layer = 4 * vision.hidden_size + 2 * heads + 3 * vision.intermediate_size
    values = 2 * 3 * vision.patch_size**2 * 4
    return patches * (values + 2 * layer * item) + 2 * _SCORE_BYTES


def _step(config: TextConfig, held: Sequence[int], canvas_length: int, item: int) -> int:
    """Bytes for a denoising step over one canvas behind each sequence of `held` positions."""
    count = len(held) * canvas_length
    layers = 0
    for layer in config.attention:
        keys = sorted((_kept(config, layer, positions) for positions in held), reverse=True)
        joined = sum(keys[:_ROWS_AHEAD]) + _ROWS_AHEAD * canvas_length
        scored = sum(canvas_length * (kept + canvas_length) for kept in keys)
        scores = min(_BLOCKS_AHEAD * _SCORE_BYTES, 4 * layer.num_heads * scored)
        activations = count * layer_numbers(config, layer) * item
        layers = max(layers, activations + scores + joined * _entry(layer, item))
    # Embeddings, hidden states, and the soft embeddings of this step and of the last one.
    canvases = 4 * count * config.hidden_size * item
    return canvases + max(layers, _vocabulary(config, count, item))


def _vocabulary(config: TextConfig, count: int, item: int) -> int:
    """Bytes for the pass over the vocabulary for `count` positions."""
    if config.vocab_size <= _VOCABULARY_CHUNK:
        return count * config.vocab_size * 4 * _WHOLE_COPIES
    chunks = count * _VOCABULARY_CHUNK * item * _CHUNK_COPIES
    # Soft embeddings are summed in float32: the sum so far and that of one chunk.
    sums = 2 * count * config.hidden_size * 4
    return chunks + sums + count * (8 * _LIKELY_TOKENS + 4 * _STATISTICS)


@dataclass(frozen=True)
class Machine:
    """What this machine says of its memory, in bytes.

    Attributes:
        working_set: what a Mac's GPU may hold in all; None without Metal.
        free: what the system has left, with everything that is loaded already taken off; None
            where it does not say.
        active: held by MLX in arrays.
        cached: held by MLX for arrays to come; it gives this back when it is needed.
    """

    working_set: int | None
    free: int | None
    active: int
    cached: int

    @property
    def available(self) -> int | None:
        """Bytes that MLX may still take; None where the system does not say."""
        if self.working_set is not None:
            return max(0, self.working_set - self.active)
        return None if self.free is None else self.free + self.cached


def machine() -> Machine:
    """What this machine says of its memory now."""
    working_set = free = None
    if mx.metal.is_available():
        # Memory is unified: what the GPU may hold also bounds a run on the CPU.
        working_set = int(mx.device_info(mx.gpu).get("max_recommended_working_set_size", 0)) or None
    else:
        free = int(mx.device_info().get("free_memory", 0)) or _free_memory()
    return Machine(working_set, free, mx.get_active_memory(), mx.get_cache_memory())


def available_memory() -> int | None:
    """Bytes that may still be taken on this machine, beside what is loaded already. None where the
    system does not say."""
    return machine().available


def _free_memory() -> int | None:
    """Bytes that Linux can give to a program."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def require(needed: Needed, what: str, *, mend: str | None = None) -> None:
    """Stop before something that takes more memory than this machine offers. Where the system does
    not say what it offers, nothing is stopped.

    Args:
        needed: the count of the memory.
        what: names what is asked for, such as "a prompt of 13 tokens".
        mend: what to do about it; None says it from what was counted.

    Raises:
        MemoryShortageError: more is needed than there is; the error names the parts.
    """
    available = available_memory()
    if available is None or needed.total <= available:
        return
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in needed.parts.items())
    beside = "" if needed.parts.get("weights") else " beside what is loaded"
    raise MemoryShortageError(
        f"{what} needs about {size_text(needed.total)} ({parts}) and this machine offers "
        f"{size_text(available)}{beside}; {mend or _mend(needed)}."
    )


def _mend(needed: Needed) -> str:
    if needed.parts.get("weights"):
        return "choose weights in fewer bits"
    if isinstance(needed, MemoryEstimate) and needed.sequences > 1:
        return "give fewer prompts at once"
    return "shorten the prompt or lower max_tokens"


def smallest_mac(needed: int, macs: Sequence[int] = MACS) -> tuple[int | None, int | None]:
    """The smallest of `macs` (binary gigabytes) that holds `needed` bytes: as it comes, and with
    Metal's limit raised to leave 3 GB for the system. None where none of them holds it."""
    as_is = (gb for gb in macs if needed <= working_set(gb))
    raised = (gb for gb in macs if needed <= raised_working_set(gb))
    return next(as_is, None), next(raised, None)


def working_set(gigabytes: int) -> int:
    """Bytes that Metal recommends to hold at most on a Mac with so many binary gigabytes.

    Two thirds up to 32 GB and three quarters above are what Macs report up to macOS 15
    (17,179.89 MB of 24 GB, 28,991.03 MB of 36 GB). Later ones report more (19,069.67 MB of 24 GB),
    so this never promises too much.
    """
    whole = gigabytes * 2**30
    return whole * 2 // 3 if gigabytes <= 32 else whole * 3 // 4


def raised_working_set(gigabytes: int) -> int:
    """As `working_set`, after raising `iogpu.wired_limit_mb` to all but 3 GB."""
    return raised_limit_mb(gigabytes) << 20


def raised_limit_mb(gigabytes: int) -> int:
    """What to set `iogpu.wired_limit_mb` to, so that the system keeps 3 GB."""
    return (gigabytes - _RESERVED) * 1024


class _ProcessLimit:
    """A limit of the whole process, set while anybody needs it.

    Generators that hold the limit may end in any order, so the last one to leave restores what the
    first one found; the limit of the first one holds meanwhile.
    """

    def __init__(self, set_limit: Callable[[int], int]) -> None:
        self._set = set_limit
        self._lock = Lock()
        self._holders = 0
        self._before = 0

    @contextmanager
    def held(self, limit: int) -> Iterator[None]:
        with self._lock:
            if self._holders == 0:
                self._before = self._set(limit)
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    mx.synchronize()  # a limit must not change under work that is queued
                    self._set(self._before)


# The functions of MLX are looked up when they are called, so that tests can replace them.
_WIRED = _ProcessLimit(lambda limit: mx.set_wired_limit(limit))
_CACHE = _ProcessLimit(lambda limit: mx.set_cache_limit(limit))


@contextmanager
def wired() -> Iterator[None]:
    """Let Metal keep the weights resident while something is generated, as mlx-lm does. The former
    limit is restored at the end; without Metal nothing happens."""
    limit = machine().working_set
    if limit is None:
        yield
        return
    with _WIRED.held(limit):
        yield


@contextmanager
def cache_limit(limit: int) -> Iterator[None]:
    """Let MLX keep at most `limit` bytes for arrays to come. The former limit is restored at the
    end."""
    with _CACHE.held(limit):
        yield


def size_text(size: float, decimals: int = 1) -> str:
    """A size in bytes for people: "1.2 GB", "350.0 MB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit / 10:
            return f"{size / unit:.{decimals}f} {name}"
    return f"{size:.0f} B"
