"""Recipes, which say by named rules in which format each module is stored.

The `quantization` block of `config.json` is written and read here too. It has a default for all
modules that have scales, an entry for each that differs, and `false` for those left unquantized.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from mlx_diffgemma.checkpoint.names import (
    QUANTIZABLE_CLASSES,
    expected_shapes,
    is_vision,
    module_class,
    module_path,
    vision_shapes,
)
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma.reading import Section, shown

AFFINE = "affine"
FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
KEEP = "none"

# What mlx 0.32 can pack: mode -> (bits, group sizes, bits of scale and bias per group).
_MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    AFFINE: ((1, 2, 3, 4, 5, 6, 8), (64, 32, 128), 32),
    "mxfp4": ((4,), (32,), 8),
    "mxfp8": ((8,), (32,), 8),
    "nvfp4": ((4,), (16,), 8),
}


@dataclass(frozen=True)
class Format:
    """How a weight is stored.

    Attributes:
        mode: "affine", "mxfp4", "mxfp8" or "nvfp4"; or, unquantized, "bf16", "fp16", "fp32", or
            "none" for the type of the whole model.
        bits: bits of a weight without its share of scales; 0 where unquantized.
        group_size: weights that share a scale; 0 where unquantized.

    Raises:
        UsageError: mlx has no such format.
    """

    mode: str
    bits: int = 0
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.mode in FLOATS or self.mode == KEEP:
            return
        if self.mode not in _MODES:
            raise UsageError(
                f"quantization mode '{self.mode}' is unknown; known are {', '.join(_MODES)}."
            )
        bits, groups, _ = _MODES[self.mode]
        for what, value, known in (
            ("bits", self.bits, bits),
            ("group size", self.group_size, groups),
        ):
            if value not in known:
                raise UsageError(
                    f"{self.mode} has no {what} {value}; mlx packs "
                    f"{', '.join(map(str, sorted(known)))}."
                )

    @property
    def quantized(self) -> bool:
        return self.mode in _MODES

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight, its share of scales and biases included ("none" counts as 16)."""
        if not self.quantized:
            return 32.0 if self.mode == "fp32" else 16.0
        return self.bits + _MODES[self.mode][2] / self.group_size

    @property
    def name(self) -> str:
        """The format as `--set` spells it: `4bit/64`, `mxfp4`, `bf16`."""
        return f"{self.bits}bit/{self.group_size}" if self.mode == AFFINE else self.mode

    @property
    def parameters(self) -> dict[str, Any]:
        """The format as mlx and `config.json` spell it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    @classmethod
    def make(cls, mode: str = AFFINE, bits: int | None = None, group: int | None = None) -> Format:
        """A quantized format; what is None takes mlx's default for the mode.

        Raises:
            UsageError: mlx has no such format.
        """
        known_bits, groups, _ = _MODES.get(mode, ((0,), (0,), 0))
        default = 4 if mode == AFFINE else known_bits[0]
        return cls(mode, default if bits is None else bits, groups[0] if group is None else group)

    @classmethod
    def parse(cls, text: str) -> Format:
        """Read `4bit`, `3bit/128`, `mxfp4`, `nvfp4`, `bf16`, `none`.

        Raises:
            UsageError: the text is none of these, or mlx has no such format.
        """
        affine = re.fullmatch(r"(\d+)bit(?:/(\d+))?", text)
        if affine:
            return cls.make(AFFINE, int(affine[1]), int(affine[2]) if affine[2] else None)
        if text in FLOATS or text == KEEP:
            return cls(text)
        if text in _MODES and text != AFFINE:
            return cls.make(text)
        raise UsageError(
            f"format '{text}' is unknown; write 4bit, 3bit/128, mxfp4, mxfp8, nvfp4, "
            f"{', '.join(FLOATS)} or {KEEP}."
        )

    def check_fits(self, path: str, shape: tuple[int, ...]) -> None:
        """Raise UsageError, naming the module, if the groups do not divide its rows."""
        if not self.quantized or shape[-1] % self.group_size == 0:
            return
        fitting = [g for g in sorted(_MODES[self.mode][1]) if shape[-1] % g == 0]
        mend = f"{self.bits}bit/{fitting[-1]}" if fitting else KEEP
        raise UsageError(
            f"{path}: a group size of {self.group_size} does not divide its {shape[-1]} columns; "
            f"add --set '{path}={mend}'."
        )


_ALIASES = {"attn": "attention", "embed": "embedding", "embed_tokens": "embedding"}
_SELECTOR = re.compile(r"(?:layers\[(?P<layers>[-\d:]+)\]\.?)?(?P<module>.*)")
_LAYER = re.compile(r"\.decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Rule:
    """A format for the modules that a selector names, written `selector=format`.

    A selector is a class of modules (`experts`, `attn`, `mlp`, `router`, `embedding`,
    `self_conditioning`, `vision`; `all` stands for all but the last), one of its projections
    (`experts.down_proj`), either of them in some layers (`layers[0:3].attn`, `layers[-1]`), or a
    path with `*`.
    """

    selector: str
    format: Format

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read `selector=format`.

        Raises:
            UsageError: the text is no rule, or mlx has no such format.
        """
        selector, equals, name = text.partition("=")
        if not equals or not selector.strip():
            raise UsageError(f"'{text}' is no rule; write it as 'experts=3bit/64'.")
        return cls(selector.strip(), Format.parse(name.strip()))

    def __str__(self) -> str:
        return f"{self.selector}={self.format.name}"

    def matches(self, path: str, num_layers: int = 0) -> bool:
        """Whether the rule is about the module `path`; `num_layers` is what `layers[-1]` counts
        from."""
        return selects(self.selector, path, num_layers)


def selects(selector: str, path: str, num_layers: int = 0) -> bool:
    """Whether a selector (see `Rule`) is about the module `path`."""
    found = _SELECTOR.fullmatch(selector)
    assert found is not None  # the second group takes anything
    if found["layers"] is not None:
        layer = _LAYER.search(path)
        if layer is None or int(layer[1]) not in _layer_range(found["layers"], num_layers):
            return False
    module = found["module"]
    if module in ("", "all"):
        return True
    head, _, tail = module.partition(".")
    if _ALIASES.get(head, head) in (*QUANTIZABLE_CLASSES, "vision"):
        kind = _ALIASES.get(head, head)
        return module_class(path) == kind and (not tail or path.endswith(f".{tail}"))
    return fnmatchcase(path, module) or fnmatchcase(path, f"*.{module}")


def _layer_range(text: str, num_layers: int) -> range:
    parts = text.split(":")
    try:
        bounds = [int(part) if part else None for part in parts]
    except ValueError:
        bounds = []
    if len(bounds) == 1 and bounds[0] is not None:
        index = bounds[0] + num_layers if bounds[0] < 0 else bounds[0]
        return range(index, index + 1)
    if len(bounds) != 2:
        raise UsageError(f"layers[{text}] is no range of layers; write layers[5] or layers[0:3].")
    return range(*slice(*bounds).indices(num_layers or 1 << 16))


@dataclass(frozen=True)
class Recipe:
    """A named list of rules; of those that match a module, the last one decides."""

    name: str
    rules: tuple[Rule, ...]

    @classmethod
    def of(cls, name: str, rules: Iterable[str]) -> Recipe:
        return cls(name, tuple(Rule.parse(rule) for rule in rules))

    def format_for(self, path: str, num_layers: int = 0) -> Format:
        """The format of a module; "none" where no rule matches."""
        for rule in reversed(self.rules):
            if rule.matches(path, num_layers):
                return rule.format
        return Format(KEEP)

    def format_for_vision(self, path: str, columns: int) -> Format:
        """The format of a matrix of the vision tower: that of the last rule which names the tower
        (`vision`) or the module's path. "none" where there is no such rule, or where the groups do
        not divide the `columns`."""
        for rule in reversed(self.rules):
            if rule.selector not in ("", "all") and rule.matches(path):
                fits = not rule.format.quantized or columns % rule.format.group_size == 0
                return rule.format if fits else Format(KEEP)
        return Format(KEEP)

    def with_rules(
        self, rules: Iterable[Rule], paths: Iterable[str], num_layers: int
    ) -> tuple[Recipe, list[tuple[Rule, list[str]]]]:
        """This recipe with more rules, and which of `paths` each of them matched.

        Raises:
            UsageError: a rule matches nothing.
        """
        known, matched = list(paths), []
        for rule in rules:
            found = [path for path in known if rule.matches(path, num_layers)]
            if not found:
                raise UsageError(
                    f"--set '{rule}' matches no module; known are all, "
                    f"{', '.join(QUANTIZABLE_CLASSES)}, vision, one of their projections "
                    "(experts.down_proj), layers[0:3].attn, or a path with *."
                )
            matched.append((rule, found))
        added = tuple(rule for rule, _ in matched)
        name = "+".join([self.name, *map(str, added)])
        return Recipe(name, self.rules + added), matched


RECIPES: dict[str, Recipe] = {
    name: Recipe.of(name, rules.split())
    for name, rules in {
        "3bit": "all=4bit experts=3bit router=8bit experts.gate_up_proj=3bit/128",
        "4bit": "all=8bit experts=4bit",
        "4bit-hq": "all=8bit experts=4bit embedding=none router=none self_conditioning=none",
        "6bit": "all=8bit experts=6bit",
        "8bit": "all=8bit",
        "mxfp4": "all=8bit experts=mxfp4",
        "mxfp8": "all=mxfp8",
        "nvfp4": "all=8bit experts=nvfp4",
        "bf16": "all=bf16",
        "fp16": "all=fp16",
    }.items()
}


def recipe_formats(config: ModelConfig, recipe: Recipe) -> dict[str, Format]:
    """The format that a recipe gives to every matrix of the text model, by the module's path."""
    layers = config.text.num_hidden_layers
    matrices = (name for name, shape in expected_shapes(config).items() if len(shape) > 1)
    return {path: recipe.format_for(path, layers) for path in map(module_path, matrices)}


def parameter_bytes(
    config: ModelConfig, formats: Mapping[str, Format], plain_bytes: int = 2
) -> dict[str, int]:
    """Bytes of every parameter of the text model, scales and biases included, by its name; a number
    of one that is not quantized takes `plain_bytes`."""
    sizes = {}
    for name, shape in expected_shapes(config).items():
        fmt = formats.get(module_path(name), Format(KEEP))
        each = fmt.bits_per_weight / 8 if fmt.quantized else plain_bytes
        sizes[name] = int(prod(shape) * each)
    return sizes


def quantization_entry(
    formats: Mapping[str, Format], sizes: Mapping[str, int] | None = None
) -> dict[str, Any] | None:
    """The `quantization` block for modules in these formats, None if none is quantized.

    The default is the format of most weights (`sizes`, by module; without it, of most modules).
    """
    counts: Counter[Format] = Counter()
    for path, fmt in formats.items():
        if fmt.quantized:
            counts[fmt] += sizes[path] if sizes else 1
    if not counts:
        return None
    default = min(counts, key=lambda fmt: (-counts[fmt], fmt.name))
    block: dict[str, Any] = dict(default.parameters)
    for path, fmt in formats.items():
        if fmt != default:
            block[path] = fmt.parameters if fmt.quantized else False
    return block


def formats_from_config(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Format]:
    """The format of every module that is stored with scales, by module path.

    Args:
        config: its `quantization` has a default and entries by module path. A module without an
            entry is read from its shapes, since the default is known to be wrong at times.
        shapes: shape of every stored tensor, by MLX name.

    Raises:
        CheckpointError: an entry contradicts the stored shapes, or mlx has no such format.
    """
    block = config.quantization or {}
    full = expected_shapes(config)
    if any(map(is_vision, shapes)) and (vision := config.vision) is not None:
        full |= vision_shapes(vision, config.text.hidden_size)
    formats = {}
    for name, scales in shapes.items():
        path = name.removesuffix(".scales")
        if path == name or f"{path}.weight" not in full:
            continue
        stored = _stored_format(path, full[f"{path}.weight"], shapes, scales)
        entry = block.get(path)
        # mlx-lm writes `true` for what has the default format, whichever that is.
        if entry is not None and entry is not True:
            named = _entry_format(path, entry)
            if named != stored:
                raise CheckpointError(
                    f"{path}: config.json says {named.name}, the stored tensors are "
                    f"{stored.name}; convert the weights again."
                )
        formats[path] = stored
    for path, entry in block.items():
        wanted = entry is True or isinstance(entry, Mapping)
        if wanted and f"{path}.weight" in shapes and path not in formats:
            raise CheckpointError(
                f"tensor {path}.scales is missing, though config.json says that {path} is "
                "quantized; convert the weights again."
            )
    return formats


def named_format(config: ModelConfig, path: str) -> Format:
    """The format that `config.json` names for a module that is stored with scales: the entry of
    the module, or the default.

    Raises:
        CheckpointError, ConfigError: mlx has no such format.
    """
    block = config.quantization or {}
    entry = block.get(path)
    if isinstance(entry, Mapping):
        return _entry_format(path, entry)
    default = {key: block[key] for key in ("bits", "group_size", "mode") if key in block}
    return _entry_format(path, default)


def _entry_format(path: str, entry: Any) -> Format:
    if entry is False:
        return Format(KEEP)
    section = Section(entry, f"quantization.{path}")
    mode = section.get("mode", AFFINE)
    if not isinstance(mode, str):
        raise section.fail("mode", f"must be a text, not {shown(mode)}")
    bits = section.size("bits") if section.has("bits") else None
    group = section.size("group_size") if section.has("group_size") else None
    try:
        return Format.make(mode, bits, group)
    except UsageError as error:
        raise CheckpointError(f"config.json: quantization of {path}: {error}") from None


def _stored_format(
    path: str, full: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], scales: tuple[int, ...]
) -> Format:
    """Read a format from the shapes of packed weight and scales.

    Raises:
        CheckpointError: they are of no format that mlx has.
    """
    packed = shapes.get(f"{path}.weight", (0,))
    groups, columns = (scales[-1] if scales else 0), full[-1]
    bits, group = packed[-1] * 32 // columns, columns // groups if groups else 0
    modes = [AFFINE] if f"{path}.biases" in shapes else [m for m in _MODES if m != AFFINE]
    for mode in modes:
        known_bits, known_groups, _ = _MODES[mode]
        if bits in known_bits and group in known_groups and group * groups == columns:
            return Format(mode, bits, group)
    raise CheckpointError(
        f"{path}: {list(packed)} packed integers and {list(scales)} scales for a matrix of "
        f"{list(full)} ({prod(full)} weights) are no format that mlx has; convert them again."
    )
