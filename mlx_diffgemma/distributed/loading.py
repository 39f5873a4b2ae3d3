"""The model of one rank: as large as its share, with the names of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_diffgemma.checkpoint.loading import open_checkpoint
from mlx_diffgemma.checkpoint.names import module_path
from mlx_diffgemma.checkpoint.quantization import Format
from mlx_diffgemma.checkpoint.ranges import RangeReader
from mlx_diffgemma.checkpoint.shards import StoredTensor
from mlx_diffgemma.checkpoint.sparse import SparseCopy, locate_sparse
from mlx_diffgemma.distributed.shares import Share, Split, local_config, shares_of
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.experts import Router


@dataclass(frozen=True)
class LoadedShare:
    """What `load_share` gives.

    Attributes:
        model: the rank's model; see `local_model`.
        share: what it holds of the whole.
        config: the checkpoint's `config.json`, as `load_model` returns it.
        bytes_read: bytes of the text model's weights that were read from disk.
    """

    model: DiffusionGemma
    share: Share
    config: dict[str, Any]
    bytes_read: int


def load_share(
    path_or_repo: str | Path,
    split: Split,
    rank: int,
    *,
    check: bool = False,
    name: str | None = None,
    vision: bool | None = None,
) -> LoadedShare:
    """Load what one rank holds of a model. Of each shard the rank's own bytes alone are read, and
    fetched where they are on the hub.

    Only rank 0 has a vision tower. What forms a rank's modules take so that they compute with those
    of others is not decided here, and nothing of the model is compiled.

    Args:
        split: how the model is divided.
        rank: which of the ranks this is.

    The other arguments are those of `load_model`.

    Raises:
        UsageError: an argument is of another type, or the model cannot be cut in so many parts.
        CheckpointError, ConfigError: the checkpoint cannot be found, or is incomplete, damaged or
            of another kind.
        MemoryShortageError: the share does not fit into this rank's memory.
    """
    folder = locate_sparse(path_or_repo)
    opened = open_checkpoint(folder, check=check, name=name or str(path_or_repo), vision=vision)
    if rank:
        opened = replace(opened, vision=False)
    opened.compare_shapes()
    formats = opened.formats()
    share = shares_of(opened.config, split, formats)[rank]
    wanted = _stored_parts(share, opened.stored)
    own = {name: tensor for name, (tensor, _) in wanted.items()}
    opened.require_memory(local_config(share).text, own)
    model = local_model(share)
    opened.prepare(model, own, _formats_of(share, formats))
    weights = {}
    with RangeReader() as reader:
        if (copy := SparseCopy.of(folder)) is not None:
            places = [reader.place(*where) for _, where in wanted.values()]
            if opened.vision is not False:
                places += [reader.place(each) for each in opened.eyes.stored.values()]
            copy.fetch(places, shows_progress=True)
        for parameter, (_, where) in wanted.items():
            array = reader.read(*where)
            if opened.dtype is not None and mx.issubdtype(array.dtype, mx.floating):
                array = array.astype(opened.dtype)
            mx.eval(array)  # what was read is let go of before the next part takes memory
            weights[parameter] = array
    opened.fill(model, weights)
    return LoadedShare(model, share, dict(opened.raw), reader.nbytes)


def local_model(share: Share) -> DiffusionGemma:
    """A model of a rank's share, not quantized and without weights of its own yet. Its `config` is
    that of the whole model, and its modules are as large as the share. Ranks of a pipeline that do
    not have the embedding have no `embed_tokens` and no `self_conditioning`."""
    model = DiffusionGemma(local_config(share))
    for layer in model.layers:
        layer.router = Router(share.config.text)
    if not share.has_embedding:
        del model.model.decoder.embed_tokens
        del model.model.decoder.self_conditioning
    model.config = share.config
    return model


def share_of_weights(share: Share, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """What a rank holds of a whole model's weights (plain, or packed with scales and biases), by
    the name in the rank's own model."""
    own = {}
    for name, array in weights.items():
        part = share.part(name)
        if part is not None:
            own[part.name] = array[part.slices(array.shape)]
    return own


_Where = tuple[StoredTensor, tuple[slice, ...]]


def _stored_parts(
    share: Share, stored: Mapping[str, StoredTensor]
) -> dict[str, tuple[StoredTensor, _Where]]:
    """What a rank holds of the stored tensors, by the name in its own model: each as if it were
    stored alone, and where it is."""
    parts = {}
    for name, tensor in stored.items():
        part = share.part(name)
        if part is not None:
            slices = part.slices(tensor.shape)
            shape = tuple(each.stop - each.start for each in slices)
            parts[part.name] = replace(tensor, shape=shape), (tensor, slices)
    return parts


def _formats_of(share: Share, formats: Mapping[str, Format]) -> dict[str, Format]:
    """The formats of a rank's modules, by the path in its own model."""
    own = {}
    for path, fmt in formats.items():
        part = share.part(f"{path}.weight")
        if part is not None:
            own[module_path(part.name)] = fmt
    return own
