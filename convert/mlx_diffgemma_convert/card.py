"""The model card: what a repository holds and is made from, its size and errors, and how to run
it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_diffgemma import __version__
from mlx_diffgemma.checkpoint.names import module_class, module_path
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma_convert.plan import Plan
from mlx_diffgemma_convert.plan_table import fits_text, rows, size_text, summary

CARD = "README.md"


def write_card(plan: Plan, records: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Write `README.md` into `folder`; `records` holds the record of each tensor, by name.

    Raises:
        CheckpointError: the source's own card cannot be read.
    """
    from huggingface_hub import ModelCard, ModelCardData

    origin = _source_card(plan)
    data = ModelCardData(
        license=origin.get("license"),
        license_name=origin.get("license_name"),
        license_link=origin.get("license_link"),
        language=origin.get("language"),
        base_model=_base_model(plan, origin),
        library_name="transformers" if plan.hugging_face else "mlx",
        pipeline_tag=origin.get("pipeline_tag") or "text-generation",
        tags=["text-diffusion", "diffusion-gemma", *([] if plan.hugging_face else ["mlx"])],
    )
    text = _text(plan, records, _base_model(plan, origin))
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / CARD)


def _source_card(plan: Plan) -> dict[str, Any]:
    """The front matter of the source's own card."""
    path = plan.source.card()
    if path is None:
        return {}
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: its front matter cannot be read ({reason}).") from None


def _base_model(plan: Plan, origin: Mapping[str, Any]) -> str | None:
    if plan.source.revision is not None:
        return plan.source.name
    named = origin.get("base_model")
    if isinstance(named, list):
        named = named[0] if named else None
    return named if isinstance(named, str) else None


def _text(plan: Plan, records: Mapping[str, Mapping[str, Any]], base: str | None) -> str:
    found = summary(plan)
    from_what = f"[{base}](https://huggingface.co/{base})" if base else "the original weights"
    lines = [
        f"# {base.split('/')[-1] if base else 'DiffusionGemma'}, {plan.recipe.name}",
        "",
        f"Converted from {from_what} with mlx-diffgemma {__version__}, recipe "
        f"`{plan.recipe.name}`: {size_text(found['stored_bytes'])}, about "
        f"{size_text(found['peak_memory_bytes'])} of memory when running. {fits_text(found)}",
        "",
        "| modules | format | parameters | bits per weight | size | relative error |",
        "|---|---|---|---|---|---|",
    ]
    errors = _errors(plan, records)
    for row in rows(plan):
        error = errors.get((row.kind, row.format))
        lines.append(
            f"| {row.kind} | {row.format} | {row.parameters:,} | {row.bits:.2f} | "
            f"{size_text(row.nbytes)} | {f'{error:.2%}' if error else 'none'} |"
        )
    lines += [
        "",
        "The relative error is that of the weights, root mean square, against the source. "
        "`conversion.json` has it for every tensor, with checksums of sources and outputs; "
        "`mlx-diffgemma-convert verify FOLDER` checks them.",
        "",
        "## Run it",
        "",
        "```sh",
        "pip install mlx-diffgemma",
        'mlx-diffgemma generate --model THIS_REPOSITORY --prompt "Why is the sky blue?"',
        "```",
        "",
        "It also runs in mlx-vlm:",
        "",
        "```sh",
        "pip install mlx-vlm",
        'mlx_vlm.generate --model THIS_REPOSITORY --prompt "Why is the sky blue?"',
        "```",
        "",
    ]
    if plan.hugging_face:
        lines = lines[: lines.index("## Run it")]
    return "\n".join(lines)


def _errors(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """Relative error by class and format: the root of the mean square over its tensors."""
    sums: dict[tuple[str, str], list[float]] = {}
    for target in plan.targets:
        error = records[target.name].get("relative_error")
        if error is not None:
            key = module_class(module_path(target.name)), target.format.name
            sums.setdefault(key, []).append(error**2)
    return {key: (sum(squares) / len(squares)) ** 0.5 for key, squares in sums.items()}
