"""A checkpoint in a folder, some of whose parameters are replaced by those of other files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_diffgemma.checkpoint.names import canonical_name, module_path
from mlx_diffgemma_convert.source import FolderSource, SourceTensor, read_header


class OverlaidSource(FolderSource):
    """`folder`, with the modules that `files` (safetensors, MLX names) hold in place of its own.

    A module stays quantized only if its scales are in `files` too.
    """

    def __init__(self, folder: Path, files: Sequence[Path], name: str) -> None:
        super().__init__(folder, name)
        self._files = {path.name: path for path in files}
        added: dict[str, SourceTensor] = {}
        for path in files:
            added |= read_header(path)
        replaced = {module_path(name) for name in added}
        kept = {
            name: tensor
            for name, tensor in self.tensors.items()
            if module_path(canonical_name(name) or name) not in replaced
        }
        self.tensors = kept | added
        plain = {path: False for path in replaced if f"{path}.scales" not in added}
        for key in ("quantization", "quantization_config"):
            if self.config.get(key):
                self.config = {**self.config, key: {**self.config[key], **plain}}

    def shard_path(self, shard: str) -> Path:
        return self._files.get(shard) or super().shard_path(shard)
