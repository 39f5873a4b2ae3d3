"""How the parts of a model are cut for the ranks that share it: by weight, between what can only be
held together. A rank is one of the processes that compute one model together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import gcd, inf, lcm

from mlx_diffgemma.checkpoint.quantization import KEEP, Format, parameter_bytes
from mlx_diffgemma.config import ModelConfig, TextConfig
from mlx_diffgemma.errors import UsageError

KINDS = ("tensor", "experts", "pipeline")
"""Ways to divide a model, from the one with the fastest steps on."""

LAYER = re.compile(r"(?P<before>model\.(?:decoder|encoder\.language_model)\.layers\.)(?P<at>\d+)")
"""The beginning of a parameter's name that says of which layer it is."""

_PLAIN = Format(KEEP)


@dataclass(frozen=True)
class Heads:
    """Heads of one attention: query heads, and the KV heads that they look at. Every KV head of a
    rank has as many of its query heads as any other."""

    queries: range
    keys: range


def scaled(span: range, unit: int) -> range:
    """A range of things of which each is `unit` smaller ones, as one of these."""
    return range(span.start * unit, span.stop * unit)


def _group(formats: Mapping[str, Format], path: str) -> int:
    """Columns that can only be cut together of a matrix."""
    fmt = formats.get(path, _PLAIN)
    return fmt.group_size if fmt.quantized else 1


def _too_few(what: str, ranks: int) -> UsageError:
    return UsageError(
        f"{ranks} ranks cannot share {what}; take fewer ranks, or split by another of "
        f"{', '.join(KINDS)}."
    )


def portions(count: int, weights: Sequence[float], what: str) -> list[range]:
    """`count` things in order, dealt out by weight; every rank gets one at least. `what` names them
    in an error."""
    if count < len(weights):
        raise _too_few(what, len(weights))
    ideal = [count * weight / sum(weights) for weight in weights]
    given = [max(1, int(each)) for each in ideal]
    while (left := count - sum(given)) != 0:
        step = 1 if left > 0 else -1
        rank = max(
            (r for r in range(len(given)) if given[r] + step >= 1),
            key=lambda r: (step * (ideal[r] - given[r]), -r),
        )
        given[rank] += step
    ends = [sum(given[:rank]) for rank in range(len(given) + 1)]
    return [range(start, stop) for start, stop in pairwise(ends)]


def widths_of(
    text: TextConfig, formats: Mapping[str, Format], weights: Sequence[float]
) -> list[range]:
    """The columns of each rank in the dense MLPs and the self-conditioning, cut between
    quantization groups."""
    downs = [f"model.decoder.layers.{i}.mlp.down_proj" for i in range(text.num_hidden_layers)]
    downs.append("model.decoder.self_conditioning.down_proj")
    unit = lcm(*(_group(formats, path) for path in downs))
    count = text.intermediate_size // unit
    what = f"the {text.intermediate_size} columns of the dense MLP"
    if unit > 1:
        what += f", which are {count} quantization groups of {unit}"
    return [scaled(span, unit) for span in portions(count, weights, what)]


def heads_of(
    text: TextConfig, formats: Mapping[str, Format], index: int, weights: tuple[float, ...]
) -> tuple[Heads, ...]:
    """The heads of each rank in the attention of one layer. Where there are KV heads for all ranks,
    each gets whole ones with their query heads; else several ranks hold the same KV head, and share
    its query heads. The output's projection is cut between quantization groups."""
    sizes = text.attention[index]
    group = _group(formats, f"model.decoder.layers.{index}.self_attn.o_proj")
    unit = group // gcd(group, sizes.head_dim)  # query heads that can only be cut together
    return _heads_in_units(sizes.num_heads, sizes.num_kv_heads, unit, weights)


@cache
def _heads_in_units(
    queries: int, keys: int, unit: int, weights: tuple[float, ...]
) -> tuple[Heads, ...]:
    each, ranks = queries // keys, len(weights)
    what = f"{queries} query heads with {keys} KV heads"
    if unit > 1:
        what += f", cut in {unit} at a time for the quantization groups of the output"
    block = lcm(each, unit) // each  # KV heads that can only be cut together
    if keys >= ranks:
        spans = portions(keys // block if keys % block == 0 else 0, weights, what)
        whole = [scaled(span, block) for span in spans]
        return tuple(Heads(scaled(span, each), span) for span in whole)
    heads: list[Heads] = []
    units = each // unit if each % unit == 0 else 0
    for key, own in enumerate(_ranks_of_keys(keys, weights, units, what)):
        for span in portions(units, own, what):
            first, last = (key * each + at * unit for at in (span.start, span.stop))
            heads.append(Heads(range(first, last), range(key, key + 1)))
    assert len(heads) == ranks
    return tuple(heads)


def _ranks_of_keys(
    keys: int, weights: Sequence[float], most: int, what: str
) -> list[Sequence[float]]:
    """The weights of the ranks that share each KV head, `most` of them at most, so that those of
    the KV head whose ranks weigh least weigh as much as can be."""

    @cache
    def best(key: int, start: int) -> tuple[float, tuple[int, ...]]:
        """What the lightest of the KV heads from `key` on has, whose ranks are those from `start`
        on, and where the ranks of each of them end."""
        found: tuple[float, tuple[int, ...]] = (-inf, ())
        if key == keys:
            return (inf, ()) if start == len(weights) else found
        for stop in range(start + 1, min(start + most, len(weights)) + 1):
            rest, ends = best(key + 1, stop)
            found = max(found, (min(rest, sum(weights[start:stop])), (stop, *ends)))
        return found

    least, ends = best(0, 0)
    if least == -inf:
        raise _too_few(what, len(weights))
    return [weights[start:stop] for start, stop in pairwise((0, *ends))]


def layers_of(
    config: ModelConfig, formats: Mapping[str, Format], weights: Sequence[float]
) -> list[range]:
    """The layers of each rank, so that the fullest one, by its weight, has as little as can be.
    Rank 0 has the embedding besides, and the first sliding layer, for it decides how far a prefix
    can go back, and full layers alone would let it go anywhere."""
    count, ranks = config.text.num_hidden_layers, len(weights)
    least = next((at + 1 for at, layer in enumerate(config.text.attention) if layer.is_sliding), 1)
    if count - (least - 1) < ranks:
        raise _too_few(f"{count} layers", ranks)
    sizes, head = [0.0] * count, 0.0
    for name, size in parameter_bytes(config, formats).items():
        layer = LAYER.match(name)
        if layer is None:
            head += size
        else:
            sizes[int(layer["at"])] += size

    @cache
    def best(rank: int, start: int) -> tuple[float, tuple[int, ...]]:
        """The load of the fullest of the ranks from `rank` on, which run the layers from `start`
        on, and where each of their spans ends."""
        beside = head if rank == 0 else 0.0
        if rank == ranks - 1:
            return (sum(sizes[start:]) + beside) / weights[rank], (count,)
        found: tuple[float, tuple[int, ...]] = (inf, ())
        first = least if rank == 0 else start + 1
        for stop in range(first, count - (ranks - 1 - rank) + 1):
            own = (sum(sizes[start:stop]) + beside) / weights[rank]
            rest, ends = best(rank + 1, stop)
            found = min(found, (max(own, rest), (stop, *ends)))
        return found

    return [range(start, stop) for start, stop in pairwise((0, *best(0, 0)[1]))]
