"""Convert, verify and upload on the terminal, once their options are read."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mlx_diffgemma.checkpoint.names import (
    is_quantizable,
    is_vision_quantizable,
    module_path,
)
from mlx_diffgemma.checkpoint.quantization import FLOATS, RECIPES, Format, Recipe, Rule
from mlx_diffgemma.errors import CheckpointError, UsageError
from mlx_diffgemma.reading import os_reason, read_object, shown
from mlx_diffgemma_convert.hub import HubSource, open_source, prepare_upload, upload
from mlx_diffgemma_convert.job import Progress, check_target, convert
from mlx_diffgemma_convert.journal import Journal
from mlx_diffgemma_convert.plan import Plan, make_plan
from mlx_diffgemma_convert.plan_table import print_plan, size_text, summary
from mlx_diffgemma_convert.settings import Conversion
from mlx_diffgemma_convert.source import FolderSource, Source


def run_convert(conversion: Conversion, *, as_json: bool = False) -> None:
    """Plan a conversion and, unless only the plan is wanted, convert and upload.

    Raises:
        CheckpointError: the source cannot be read, is damaged or has changed, or there is no room.
        UsageError: options contradict each other, or the target may not be written.
    """
    if conversion.recipe == "list":
        print_recipes()
        return
    target: Path = conversion.mlx_path.expanduser()
    recipe, rules = chosen_recipe(conversion)
    repository = conversion.upload_repo
    if conversion.dry_run and not repository:
        raise UsageError("--dry-run is about uploading; name the repository with --upload-repo.")
    journal = Journal(target)
    downloads = journal.downloads if conversion.delete_source_shards else None
    assert conversion.model is not None
    source = open_source(conversion.model, conversion.revision, downloads, conversion.retries)
    plan = _plan(source, recipe, rules, conversion)
    if plan.in_float16 and not conversion.quiet:
        _say(
            "warning: float16 overflows on activations of this model, which then answers NaN; "
            "bf16 does not."
        )
    if conversion.plan:
        print(json.dumps(summary(plan), indent=2)) if as_json else print_plan(plan)
        return
    if repository and not conversion.dry_run:
        prepare_upload(repository)
    with journal:
        if not journal.published(plan):
            check_target(target, source.folder if isinstance(source, FolderSource) else None)
        started = time.monotonic()
        with progress_bar(plan, conversion.quiet) as progress:
            outcome = convert(plan, journal, restart=conversion.restart, progress=progress)
        seconds = time.monotonic() - started
    found = {
        **summary(plan),
        "target": str(target),
        "resumed_files": outcome.resumed_files,
        "seconds": round(seconds, 2),
    }
    if repository:
        found["upload"] = upload(target, repository, dry_run=conversion.dry_run)
    if as_json:
        print(json.dumps(found, indent=2))
    elif not conversion.quiet:
        _say(
            f"{target}: {size_text(plan.stored_bytes())} in {len(plan.shards)} file(s), "
            f"{recipe.name}, verified; {seconds:.1f} s."
        )
        if repository:
            _say(_upload_text(found["upload"]))


def chosen_recipe(conversion: Conversion) -> tuple[Recipe, list[Rule]]:
    """The recipe that the options ask for, and the overrides on top of it.

    Raises:
        UsageError: options contradict each other or name something unknown.
    """
    plain = {name: getattr(conversion, name) for name in ("q_bits", "q_mode", "q_group_size")}
    given = [f"--{k.replace('_', '-')}" for k, v in plain.items() if v is not None]
    name = conversion.recipe
    rules = [Rule.parse(text) for text in conversion.override]
    if conversion.dequantize or conversion.to_hf:
        if conversion.quantize or given or name or rules:
            way = "--dequantize" if conversion.dequantize else "--to-hf"
            raise UsageError(f"{way} takes no recipe and no quantization; leave one of them out.")
        return Recipe("dequantized" if conversion.dequantize else "plain", ()), []
    if name is not None and given:
        raise UsageError(f"{given[0]} and --recipe exclude each other; use --set to override.")
    if name is not None:
        return named_recipe(name), rules
    if given:
        fmt = Format.make(conversion.q_mode or "affine", conversion.q_bits, conversion.q_group_size)
        return Recipe(f"all {fmt.name}", (Rule("all", fmt),)), rules
    if conversion.quantize:
        return RECIPES["4bit"], rules
    return Recipe("plain", ()), rules


def named_recipe(name: str) -> Recipe:
    """A recipe by name, or from a JSON file that `measure --budget` wrote.

    Raises:
        UsageError: there is no such recipe, or the file holds none.
    """
    if name in RECIPES:
        return RECIPES[name]
    try:
        path = Path(name).expanduser()
        if path.is_file():
            content = read_object(path, mend="measure --budget writes one")
            return Recipe.of(content["name"], content["rules"])
    except UsageError as error:
        raise UsageError(f"{shown(name)}: {error}") from None
    except (
        CheckpointError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError,
    ) as error:  # fmt: skip
        raise UsageError(
            f"{shown(name)} is no recipe ({os_reason(error)}); measure --budget writes one."
        ) from None
    raise UsageError(f"recipe {shown(name)} is unknown; known are {', '.join(RECIPES)}.")


def _plan(source: Source, recipe: Recipe, rules: list[Rule], conversion: Conversion) -> Plan:
    known = {long: short for short, long in FLOATS.items()} | {short: short for short in FLOATS}
    dtype = conversion.dtype
    if dtype is not None and dtype not in known:
        raise UsageError(f"--dtype {dtype} is unknown; known are {', '.join(FLOATS.values())}.")
    plan = partial(
        make_plan,
        source,
        dtype=known[dtype] if dtype else None,
        dequantize=conversion.dequantize,
        hugging_face=conversion.to_hf,
        shard_size=conversion.max_shard_size,
        vision=not conversion.no_vision,
    )
    if rules:
        draft = plan(Recipe("draft", ()))
        paths = [
            module_path(t.name)
            for t in draft.targets
            if is_quantizable(t.name, len(t.shape)) or is_vision_quantizable(t.name, len(t.shape))
        ]
        recipe, matched = recipe.with_rules(rules, paths, draft.config.text.num_hidden_layers)
        for rule, found in matched:
            some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            if not conversion.quiet:
                _say(f"--set '{rule}': {len(found)} module(s): {some}")
    return plan(recipe)


def print_recipes() -> None:
    """Print the table of recipes on stdout."""
    for name, recipe in RECIPES.items():
        print(f"{name:8} {'  '.join(map(str, recipe.rules))}")


@contextmanager
def progress_bar(plan: Plan, quiet: bool) -> Iterator[Progress]:
    """Show a bar over all source bytes and the tensor at work on stderr, unless `quiet`. Gives the
    function that moves the bar."""
    if quiet:
        yield lambda target, source_bytes: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import (
        Progress as Bar,
    )

    columns = (
        BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )  # fmt: skip
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=plan.source_bytes)
        if isinstance(plan.source, HubSource):
            plan.source.announce = lambda text: bar.update(task, description=text)
        yield lambda target, size: bar.update(
            task, advance=size, description=target.name.removeprefix("model.")
        )


def run_verify(folder: Path, source: str | None, revision: str | None, as_json: bool) -> None:
    """Check a folder, and compare it with its source where one is given.

    Raises:
        CheckpointError: a file or a tensor is not as it should be.
    """
    from mlx_diffgemma_convert.verify import compare_with_source, verify

    found = verify(folder)
    report: dict[str, Any] = {"files": found.files, "tensors": found.tensors, "bytes": found.nbytes}
    text = f"{folder}: {found.files} files as written, {found.tensors} tensors sound"
    if source is not None:
        loss = compare_with_source(folder, open_source(source, revision))
        report["relative_error"] = loss.relative
        text += f", all within {loss.worst:.0%} of what their formats allow"
    print(json.dumps(report, indent=2) if as_json else f"{text}.")


def run_upload(folder: Path, repository: str, dry_run: bool, as_json: bool) -> None:
    """Check a folder, then upload it.

    Raises:
        CheckpointError: the folder is not as it was written, or the upload fails.
    """
    from mlx_diffgemma_convert.verify import verify

    verify(folder)
    report = upload(folder, repository, dry_run=dry_run)
    print(json.dumps(report, indent=2) if as_json else _upload_text(report))


def _upload_text(report: Mapping[str, Any]) -> str:
    if not report["dry_run"]:
        return f"Uploaded to https://huggingface.co/{report['repository']}."
    files = "\n".join(f"  {name}  {size_text(size)}" for name, size in report["files"].items())
    login = "logged in" if report["token"] else "not logged in: run `hf auth login` first"
    return (
        f"Would upload {size_text(report['bytes'])} to "
        f"https://huggingface.co/{report['repository']} ({login}):\n{files}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr)
