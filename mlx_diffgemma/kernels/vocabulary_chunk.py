"""What follows the product of hidden states with a chunk of the vocabulary, in one kernel.

The kernel applies softcap, temperature and masks, and brings running maximum and sums, the draw and
the likeliest tokens up to date.
Letters: M positions, v tokens of the chunk, b blocks of `BLOCK` tokens, t chunks, K masks of W
words, m positions whose exponentials are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_diffgemma.kernels.activation import softcap
from mlx_diffgemma.kernels.allowed_tokens import FORBIDDEN, WORD, forbid
from mlx_diffgemma.kernels.dispatch import Implementation, Launcher, MetalKernel, launcher_for
from mlx_diffgemma.kernels.draw import BLOCK, choose_by_mass, race_of

BEST = 16  # tokens that are kept as the likeliest
SIMDGROUPS = 8  # of a threadgroup of the Metal kernel
_SUMS = 5  # numbers of a position before those of the likeliest tokens
_NUMBERS = _SUMS + BEST
_TOKENS = 1 + BEST


@dataclass(frozen=True)
class Running:
    """What the chunks so far have given; sums are relative to the largest logit, with
    e = exp(x − largest).

    Attributes:
        numbers: [M, 5 + BEST] float32: Σ e, Σ e · (x − largest), the logit of the draw, that of the
            token asked about, what the draw won its race with (see `draw.py`), and the largest
            logits, in descending order. What is not there yet is `FORBIDDEN`. Σ e is NaN once a
            product was not finite.
        tokens: [M, 1 + BEST] int32: the draw, and the tokens of the largest logits; of equals the
            first comes first.
    """

    numbers: mx.array
    tokens: mx.array

    @classmethod
    def start(cls, count: int) -> Running:
        none = mx.array([0.0, 0.0, *[FORBIDDEN] * (_NUMBERS - 2)])
        return cls(mx.broadcast_to(none, (count, _NUMBERS)), mx.zeros((count, _TOKENS), mx.int32))

    @property
    def total(self) -> mx.array:
        return self.numbers[:, 0]

    @property
    def weighted(self) -> mx.array:
        return self.numbers[:, 1]

    @property
    def draw_logit(self) -> mx.array:
        return self.numbers[:, 2]

    @property
    def standing_logit(self) -> mx.array:
        return self.numbers[:, 3]

    @property
    def race(self) -> mx.array:
        return self.numbers[:, 4]

    @property
    def best(self) -> mx.array:
        return self.numbers[:, _SUMS:]

    @property
    def draw(self) -> mx.array:
        return self.tokens[:, 0]

    @property
    def best_tokens(self) -> mx.array:
        return self.tokens[:, 1:]


@dataclass(frozen=True)
class Wanted:
    """What every chunk is asked, the same for all of them.

    Attributes:
        softcap: the cap of the logits.
        scale: [M] float32, softcap / temperature.
        chances: [2 t + 1, M] float32, see `draw.chances`; None draws nothing.
        standing: [M] int32, the token whose logit is asked about; None for none.
        which: [M] int32, which of `masks` each position has, −1 for none; None without masks.
        masks: [K, W] uint32, the tokens that are allowed; None where all are.
        slots: [M] int32, at which of the m places the exponentials of a position go, −1 for none.
        dense: m, the number of positions whose exponentials are wanted.
    """

    softcap: float
    scale: mx.array
    chances: mx.array | None = None
    standing: mx.array | None = None
    which: mx.array | None = None
    masks: mx.array | None = None
    slots: mx.array | None = None
    dense: int = 0


@dataclass(frozen=True)
class Chunk:
    """What there is after a chunk.

    Attributes:
        running: what the chunks up to this one have given.
        exponentials: [m, v] exp(x − largest so far), or None if m = 0.
        shrink: [m, 1] float32, what brings sums of earlier chunks down to the new largest, or None.
    """

    running: Running
    exponentials: mx.array | None
    shrink: mx.array | None


def vocabulary_chunk(
    raw: mx.array,
    before: Running,
    wanted: Wanted,
    *,
    start: int,
    place: int,
    dtype: mx.Dtype,
    implementation: Implementation | Launcher = "auto",
) -> Chunk:
    """The products [M, v] of chunk number `place`, whose first token is `start`, joined to what the
    chunks so far have given, `before`. `dtype` is that of the exponentials.

    The running maximum is exact where a fixed shift by the softcap is not: at a temperature of 0.4
    the exponential of the smallest possible logit is e^-150 of the largest, and a position whose
    maximum is below −5 would lose all its mass in float32.
    """
    launch = launcher_for(implementation)
    if launch is None:
        return _in_mlx(raw, before, wanted, start, place, dtype)
    count, tokens = raw.shape
    blocks = -(-tokens // BLOCK)
    nothing = mx.array([0], mx.int32)  # stands for an input that the kernel does not read
    chances, standing, slots = wanted.chances, wanted.standing, wanted.slots
    which, masks = wanted.which, wanted.masks
    dense = max(1, wanted.dense)
    numbers, kept, exponentials, shrink = launch(
        KERNEL,
        inputs=[
            raw,
            before.numbers,
            before.tokens,
            mx.array([start, place], mx.int32),
            mx.array(wanted.softcap, mx.float32),
            wanted.scale,
            mx.array([[0.0]]) if chances is None else chances,
            nothing if standing is None else standing,
            nothing if which is None else which,
            mx.array([[0]], mx.uint32) if masks is None else masks,
            nothing if slots is None else slots,
        ],
        template=[
            ("T", raw.dtype),
            ("E", dtype),
            ("HAS_DRAW", chances is not None),
            ("HAS_STANDING", standing is not None),
            ("HAS_MASKS", masks is not None),
            ("HAS_DENSE", wanted.dense > 0),
            ("BLOCKS", -(-blocks // SIMDGROUPS)),
        ],
        grid=(count * SIMDGROUPS * 32, 1, 1),
        threadgroup=(SIMDGROUPS * 32, 1, 1),
        output_shapes=[
            (count, _NUMBERS),
            (count, _TOKENS),
            (dense, tokens if wanted.dense else 1),
            (dense, 1),
        ],
        output_dtypes=[mx.float32, mx.int32, dtype, mx.float32],
    )
    running = Running(numbers, kept)
    return Chunk(running, exponentials, shrink) if wanted.dense else Chunk(running, None, None)


# A threadgroup takes one position, a simdgroup one block at a time, a lane four tokens of it. The
# chunk is read once and waits in registers until the maximum is known. Each simdgroup finds the
# likeliest tokens of its own part, and stops at what cannot be among the likeliest of all; the
# first simdgroup joins them.
KERNEL = MetalKernel(
    "vocabulary_chunk",
    inputs=(
        "raw", "numbers_before", "tokens_before", "where", "softcap", "scale", "chances",
        "standing", "which", "masks", "slots",
    ),
    outputs=("numbers", "tokens", "exponentials", "shrinks"),
    source=f"""
    constexpr uint groups = {SIMDGROUPS};
    constexpr uint block_size = {BLOCK};
    constexpr uint best_count = {BEST};
    constexpr uint sums = {_SUMS};
    constexpr float forbidden = {FORBIDDEN:g}f;
    constexpr int nowhere = 0x7fffffff;
    threadgroup float candidates[groups * best_count];
    threadgroup int candidate_tokens[groups * best_count];
    threadgroup float masses[groups * BLOCKS];
    threadgroup float group_weighted[groups];

    const uint row = threadgroup_position_in_grid.x;
    const uint own_group = simdgroup_index_in_threadgroup;
    const uint lane = thread_index_in_simdgroup;
    const uint count = raw_shape[1];
    const uint blocks = (count + block_size - 1) / block_size;
    const uint row_numbers = row * (sums + best_count);
    const uint row_tokens = row * (1 + best_count);
    const int start = where[0];
    const float largest = scale[row];
    const float top_before = numbers_before[row_numbers + sums];
    const float least = numbers_before[row_numbers + sums + best_count - 1];

    float x[4 * BLOCKS];
    float poison = 0;
    for (uint i = 0; i < BLOCKS; i++) {{
      for (uint j = 0; j < 4; j++) {{
        const uint token = (own_group + i * groups) * block_size + lane * 4 + j;
        float value = forbidden;
        if (token < count) {{
          const float product = float(raw[size_t(row) * count + token]);
          // The softcap would make an infinity finite.
          if (!metal::isfinite(product)) {{
            poison = NAN;
          }} else {{
            value = metal::precise::tanh(product / softcap) * largest;
          }}
          if (HAS_MASKS && which[row] >= 0) {{
            const uint bit = uint(start) + token;
            const uint word = masks[size_t(which[row]) * masks_shape[1] + bit / 32];
            if (((word >> (bit % 32)) & 1) == 0) value = forbidden;
          }}
          if (HAS_STANDING && standing[row] == start + int(token)) {{
            numbers[row_numbers + 3] = value;
          }}
        }}
        x[i * 4 + j] = value;
      }}
    }}

    float last = INFINITY;
    int last_token = -1;
    uint found = 0;
    while (found < best_count) {{
      float best = least;
      int best_token = nowhere;
      for (uint i = 0; i < BLOCKS; i++) {{
        for (uint j = 0; j < 4; j++) {{
          const float value = x[i * 4 + j];
          const int token = start + int((own_group + i * groups) * block_size + lane * 4 + j);
          const bool is_left = value < last || (value == last && token > last_token);
          // A lane goes up through its tokens, so the first of equals is kept.
          if (is_left && value > best) {{
            best = value;
            best_token = token;
          }}
        }}
      }}
      const float simd_best = simd_max(best);
      if (!(simd_best > least)) break;
      last_token = simd_min(best == simd_best ? best_token : nowhere);
      last = simd_best;
      if (lane == 0) {{
        candidates[own_group * best_count + found] = last;
        candidate_tokens[own_group * best_count + found] = last_token;
      }}
      found++;
    }}
    if (lane >= found && lane < best_count) candidates[own_group * best_count + lane] = forbidden;
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float top = top_before;
    for (uint i = 0; i < groups; i++) top = metal::max(top, candidates[i * best_count]);
    const float shrink = metal::precise::exp(top_before - top);

    if (own_group == 0) {{
      float values[groups * best_count / 32 + 1];
      int places[groups * best_count / 32 + 1];
      for (uint i = 0; i < groups * best_count / 32; i++) {{
        values[i] = candidates[lane + i * 32];
        places[i] = values[i] > forbidden ? candidate_tokens[lane + i * 32] : nowhere;
      }}
      values[groups * best_count / 32] = forbidden;
      places[groups * best_count / 32] = nowhere;
      if (lane < best_count) {{
        values[groups * best_count / 32] = numbers_before[row_numbers + sums + lane];
        places[groups * best_count / 32] = tokens_before[row_tokens + 1 + lane];
      }}
      float joined = INFINITY;
      int joined_token = -1;
      for (uint n = 0; n < best_count; n++) {{
        float best = forbidden;
        int best_token = nowhere;
        for (uint i = 0; i < groups * best_count / 32 + 1; i++) {{
          const bool is_left =
              values[i] < joined || (values[i] == joined && places[i] > joined_token);
          if (is_left && (values[i] > best || (values[i] == best && places[i] < best_token))) {{
            best = values[i];
            best_token = places[i];
          }}
        }}
        const float simd_best = simd_max(best);
        const int simd_token = simd_min(best == simd_best ? best_token : nowhere);
        joined = simd_best;
        joined_token = simd_token;
        if (lane == 0) {{
          const bool is_there = simd_best > forbidden;
          numbers[row_numbers + sums + n] = is_there ? simd_best : forbidden;
          tokens[row_tokens + 1 + n] = is_there ? simd_token : 0;
        }}
      }}
    }}

    float sum_weighted = 0;
    for (uint i = 0; i < BLOCKS; i++) {{
      const uint block = own_group + i * groups;
      float mass = i == 0 ? poison : 0;
      for (uint j = 0; j < 4; j++) {{
        const uint token = block * block_size + lane * 4 + j;
        const float below = x[i * 4 + j] - top;
        const float e = x[i * 4 + j] > forbidden ? metal::precise::exp(below) : 0;
        if (token < count) {{
          mass += e;
          sum_weighted += e * below;
          if (HAS_DENSE && slots[row] >= 0) {{
            exponentials[size_t(slots[row]) * count + token] = static_cast<E>(e);
          }}
        }}
      }}
      mass = simd_sum(mass);
      if (lane == 0) masses[block] = mass;
    }}
    sum_weighted = simd_sum(sum_weighted);
    if (lane == 0) group_weighted[own_group] = sum_weighted;
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float chunk_mass = 0;
    for (uint i = 0; i < blocks; i++) chunk_mass += masses[i];
    const float total_before = numbers_before[row_numbers];
    const float total = total_before * shrink + chunk_mass;
    bool taken = false;
    if (HAS_DRAW) {{
      const uint positions = chances_shape[1];
      const uint chunks = (chances_shape[0] - 1) / 2;
      const uint place = uint(where[1]);
      const float race =
          chunk_mass > 0
              ? metal::precise::log(chunk_mass) + top + chances[place * positions + row]
              : forbidden;
      taken = race > numbers_before[row_numbers + 4];
      if (taken) {{
        if (thread_index_in_threadgroup == 0) numbers[row_numbers + 4] = race;
        const float block_target = chances[(chunks + place) * positions + row] * chunk_mass;
        float cumulative = 0;
        uint block = 0;
        for (uint i = 0; i < blocks; i++) {{
          if (masses[i] > 0) {{
            const bool was_reached = cumulative > block_target;
            cumulative += masses[i];
            if (!was_reached) block = i;
          }}
        }}
        if (block % groups == own_group) {{
          float chosen[4];
          float e[4];
          float mass = 0;
          for (uint i = 0; i < BLOCKS; i++) {{
            for (uint j = 0; j < 4; j++) {{
              if (i == block / groups) chosen[j] = x[i * 4 + j];
            }}
          }}
          for (uint j = 0; j < 4; j++) {{
            e[j] = chosen[j] > forbidden ? metal::precise::exp(chosen[j] - top) : 0;
            mass += e[j];
          }}
          float reached = simd_prefix_exclusive_sum(mass);
          const float target =
              chances[2 * chunks * positions + row] * simd_broadcast(reached + mass, 31);
          int first = nowhere;
          int negative_last = nowhere;
          for (uint j = 0; j < 4; j++) {{
            const int token = int(block * block_size + lane * 4 + j);
            reached += e[j];
            if (e[j] > 0) {{
              if (reached > target && first == nowhere) first = token;
              negative_last = -token;
            }}
          }}
          first = simd_min(first);
          // Sums of floats in another order may leave the target a hair beyond the last token.
          negative_last = simd_min(negative_last);
          const int token = first == nowhere ? -negative_last : first;
          for (uint j = 0; j < 4; j++) {{
            if (int(block * block_size + lane * 4 + j) == token) {{
              tokens[row_tokens] = start + token;
              numbers[row_numbers + 2] = chosen[j];
            }}
          }}
        }}
      }}
    }}
    if (thread_index_in_threadgroup == 0) {{
      float sum = 0;
      for (uint i = 0; i < groups; i++) sum += group_weighted[i];
      const float weighted_before = numbers_before[row_numbers + 1];
      numbers[row_numbers] = total;
      numbers[row_numbers + 1] =
          (weighted_before + total_before * (top_before - top)) * shrink + sum;
      if (!taken) {{
        tokens[row_tokens] = tokens_before[row_tokens];
        numbers[row_numbers + 2] = numbers_before[row_numbers + 2];
        numbers[row_numbers + 4] = numbers_before[row_numbers + 4];
      }}
      const bool stands_here =
          HAS_STANDING && standing[row] >= start && standing[row] < start + int(count);
      if (!stands_here) numbers[row_numbers + 3] = numbers_before[row_numbers + 3];
      if (HAS_DENSE && slots[row] >= 0) shrinks[slots[row]] = shrink;
    }}
    """,
)  # fmt: skip


def _in_mlx(
    raw: mx.array, before: Running, wanted: Wanted, start: int, place: int, dtype: mx.Dtype
) -> Chunk:
    count, size = raw.shape
    x = softcap(raw, wanted.softcap, wanted.scale[:, None])
    finite = mx.isfinite(raw)
    x = mx.where(finite, x, FORBIDDEN)
    if wanted.masks is not None and wanted.which is not None:
        words = wanted.masks[:, start // WORD : -(-(start + size) // WORD)]
        free = mx.full((1, words.shape[1]), 0xFFFFFFFF, mx.uint32)
        words = mx.concatenate([words, free])[wanted.which]  # −1 takes the last row: all free
        x = forbid(x, words)

    tokens = mx.broadcast_to(mx.arange(start, start + size, dtype=mx.int32), x.shape)
    few, of_few = x, tokens
    for length in (BLOCK, BEST):
        few, of_few = _of_best_blocks(few, of_few, length)
    # A stable sort, so that of equals the first comes first.
    both = mx.concatenate([before.best, few], axis=1)
    order = mx.argsort(-both, axis=-1)[:, :BEST]
    best = mx.take_along_axis(both, order, axis=-1)
    together = mx.concatenate([before.best_tokens, of_few], axis=1)
    best_tokens = mx.take_along_axis(together, order, axis=-1)
    best_tokens = mx.where(best > FORBIDDEN, best_tokens, 0)

    top, top_before = best[:, :1], before.best[:, :1]
    shift = (top_before - top)[:, 0]
    shrink = mx.exp(shift)
    below = x - top
    e = mx.where(x > FORBIDDEN, mx.exp(below), 0.0)
    masses = mx.pad(e, [(0, 0), (0, -size % BLOCK)]).reshape(count, -1, BLOCK).sum(axis=-1)
    chunk_mass = mx.where(finite.all(axis=-1), masses.sum(axis=-1), mx.nan)
    total = before.total * shrink + chunk_mass
    weighted = (before.weighted + before.total * shift) * shrink + (e * below).sum(axis=-1)

    draw, draw_logit, race = before.draw, before.draw_logit, before.race
    if wanted.chances is not None:
        chunks = wanted.chances.shape[0] // 2
        run = race_of(chunk_mass, top[:, 0], wanted.chances[place])
        taken = run > race
        race = mx.where(taken, run, race)
        block = choose_by_mass(masses, wanted.chances[chunks + place])
        inside = block[:, None] * BLOCK + mx.arange(BLOCK)
        of_block = mx.take_along_axis(e, mx.minimum(inside, size - 1), axis=-1)
        of_block = mx.where(inside < size, of_block, 0.0)
        token = block * BLOCK + choose_by_mass(of_block, wanted.chances[2 * chunks])
        draw = mx.where(taken, start + token, draw)
        logit = mx.take_along_axis(x, mx.minimum(token, size - 1)[:, None], axis=-1)[:, 0]
        draw_logit = mx.where(taken, logit, draw_logit)
    standing_logit = before.standing_logit
    if wanted.standing is not None:
        inside = wanted.standing - start
        here = (inside >= 0) & (inside < size)
        logit = mx.take_along_axis(x, mx.clip(inside, 0, size - 1)[:, None], axis=-1)[:, 0]
        standing_logit = mx.where(here, logit, standing_logit)

    sums = mx.stack([total, weighted, draw_logit, standing_logit, race], axis=1)
    running = Running(
        mx.concatenate([sums, best], axis=1),
        mx.concatenate([draw[:, None], best_tokens], axis=1).astype(mx.int32),
    )
    if wanted.slots is None or not wanted.dense:
        return Chunk(running, None, None)
    # Which position has each slot: those without one sort to the front.
    dense = mx.argsort(wanted.slots)[count - wanted.dense :]
    return Chunk(running, e[dense].astype(dtype), shrink[dense][:, None])


def _of_best_blocks(x: mx.array, tokens: mx.array, length: int) -> tuple[mx.array, mx.array]:
    """Logits [M, v] and tokens [M, v] of those blocks of a `length` in which the BEST largest
    logits are, in the order in which they stand: sorting all of a chunk takes long."""
    padding = [(0, 0), (0, -x.shape[1] % length)]
    x, tokens = mx.pad(x, padding, constant_values=FORBIDDEN), mx.pad(tokens, padding)
    blocks = x.reshape(x.shape[0], -1, length)
    if blocks.shape[1] <= BEST:
        return x, tokens
    which = mx.sort(mx.argsort(-blocks.max(axis=-1), axis=-1)[:, :BEST], axis=-1)[..., None]
    return (
        mx.take_along_axis(blocks, which, axis=1).reshape(x.shape[0], -1),
        mx.take_along_axis(tokens.reshape(blocks.shape), which, axis=1).reshape(x.shape[0], -1),
    )
