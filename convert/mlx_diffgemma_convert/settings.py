"""What the converter's commands are asked for, every field an option."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.settings import Setting

_SIZE = re.compile(r"[0-9]{1,9}(TB|GB|MB|KB)", re.IGNORECASE)
_RESULT, _WEIGHTS, _NETWORK = "Result", "Formats of weights", "Network"


@dataclass(frozen=True)
class Conversion:
    """What to convert, into which formats, and where to.

    Raises:
        UsageError: a number is out of range.
    """

    model: Annotated[
        str | None,
        Setting("Folder or Hugging Face repository to convert.", ("--model", "--hf-path")),
    ] = None
    revision: Annotated[str | None, Setting("Branch, tag or commit.")] = None
    mlx_path: Annotated[Path, Setting("Folder to make; it must not exist yet.", panel=_RESULT)] = (
        Path("mlx_model")
    )
    max_shard_size: Annotated[
        str, Setting("Most bytes of an output file, such as 5GB.", panel=_RESULT)
    ] = "5GB"
    to_hf: Annotated[
        bool, Setting("Result in the layout of transformers, unquantized.", panel=_RESULT)
    ] = False
    quantize: Annotated[
        bool,
        Setting(
            "Quantization of the weights, by the recipe 4bit if nothing else is said.",
            ("--quantize", "-q"),
            _WEIGHTS,
        ),
    ] = False
    recipe: Annotated[
        str | None,
        Setting(
            "Recipe by name (--recipe list shows them), or a file that measure --budget wrote.",
            panel=_WEIGHTS,
        ),
    ] = None
    override: Annotated[
        tuple[str, ...],
        Setting(
            "Format of some modules, as 'experts=3bit/64' or 'layers[0:3].attn=8bit'; it may be "
            "given several times.",
            ("--set",),
            _WEIGHTS,
        ),
    ] = ()
    q_bits: Annotated[
        int | None, Setting("Bits of every quantized module, instead of a recipe.", panel=_WEIGHTS)
    ] = None
    q_mode: Annotated[
        str | None, Setting("Mode of every quantized module: affine, mxfp4, ...", panel=_WEIGHTS)
    ] = None
    q_group_size: Annotated[
        int | None, Setting("Group size of every quantized module.", panel=_WEIGHTS)
    ] = None
    dtype: Annotated[
        str | None,
        Setting("Type of what stays unquantized: bfloat16, float16, float32.", panel=_WEIGHTS),
    ] = None
    dequantize: Annotated[
        bool, Setting("Plain weights in place of quantized ones.", panel=_WEIGHTS)
    ] = False
    no_vision: Annotated[
        bool, Setting("Result without the vision tower, which reads no pictures.", panel=_WEIGHTS)
    ] = False
    delete_source_shards: Annotated[
        bool, Setting("Deletion of each downloaded shard after its use.", panel=_NETWORK)
    ] = False
    retries: Annotated[int, Setting("New attempts when the network is lost.", panel=_NETWORK)] = 5
    upload_repo: Annotated[
        str | None, Setting("Hugging Face repository to upload the result to.", panel=_NETWORK)
    ] = None
    dry_run: Annotated[
        bool, Setting("List of what would be uploaded, in place of the upload.", panel=_NETWORK)
    ] = False
    plan: Annotated[bool, Setting("Sizes and memory alone; nothing is fetched or written.")] = False
    restart: Annotated[bool, Setting("New start where an interrupted run has left files.")] = False
    quiet: Annotated[bool, Setting("Work without a progress bar.")] = False

    def __post_init__(self) -> None:
        if not _SIZE.fullmatch(self.max_shard_size):
            raise UsageError(
                f"--max-shard-size must be a number and a unit, as 5GB, "
                f"not {self.max_shard_size!r}."
            )
        if not self.mlx_path.name or "\0" in str(self.mlx_path):
            raise UsageError(f"--mlx-path must name a folder to make, not '{self.mlx_path}'.")
        if self.retries < 0:
            raise UsageError(f"--retries must be at least 0, not {self.retries}.")


@dataclass(frozen=True)
class Measurement:
    """What converted models are compared by.

    Raises:
        UsageError: a number is out of range.
    """

    prompts: Annotated[
        Path | None,
        Setting(
            "File of JSON lines, each with a 'prompt' and, where it is known, its "
            "'answer'; a built-in list if left out."
        ),
    ] = None
    count: Annotated[int, Setting("Number of prompts whose logits are compared.")] = 8
    generate: Annotated[
        int, Setting("Number of prompts that are answered, to compare denoising steps.")
    ] = 8
    seed: Annotated[int, Setting("Number that every random draw follows from.")] = 0
    budget: Annotated[
        str | None, Setting("Size of a mixed recipe to find, such as 14GB or 1.4MB.")
    ] = None
    save: Annotated[Path | None, Setting("File to write the mixed recipe to, for --recipe.")] = None
    plot: Annotated[Path | None, Setting("SVG file for a chart of divergence over size.")] = None

    def __post_init__(self) -> None:
        for name in ("count", "generate"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, not {getattr(self, name)}.")
