"""`mlx-diffgemma-convert`: convert (the default), verify, upload and measure. Heavy modules are
imported only by the command that needs them."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from mlx_diffgemma.cli import errors, streams
from mlx_diffgemma.cli.command import command
from mlx_diffgemma.cli.help_page import PLAIN, PlainCommand
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.settings import Setting
from mlx_diffgemma_convert.settings import Conversion, Measurement

app = typer.Typer(
    name="mlx-diffgemma-convert",
    cls=errors.Program,
    **{**PLAIN, "add_completion": True},
)

Json = Annotated[bool, Setting("One JSON object on stdout at the end.", ("--json",))]


@app.callback(invoke_without_command=True)
@command(
    "mlx-diffgemma convert --model google/diffusiongemma-26B-A4B-it -q --mlx-path my-4bit",
    "mlx-diffgemma convert --model my-weights --recipe 4bit-hq --plan",
    "mlx-diffgemma convert --model my-weights -q --set 'experts=3bit/64'",
)
def convert(ctx: typer.Context, *, conversion: Conversion, as_json: Json = False) -> None:
    """Turn Hugging Face weights of DiffusionGemma into verified MLX form, shard by shard.

    The same command again goes on where an interrupted one stopped.
    """
    if ctx.invoked_subcommand is not None:
        return
    if conversion.model is None and conversion.recipe != "list":
        raise UsageError("say what to convert: --model with a folder or a repository.")
    from mlx_diffgemma_convert.converting import run_convert

    run_convert(conversion, as_json=as_json)


@app.command(cls=PlainCommand)
@command(
    "mlx-diffgemma convert verify my-4bit",
    "mlx-diffgemma convert verify my-4bit --source google/diffusiongemma-26B-A4B-it",
    "mlx-diffgemma convert verify my-4bit --json",
)
def verify(
    *,
    folder: Annotated[Path, typer.Argument(help="Folder that this converter wrote.")],
    source: Annotated[
        str | None, Setting("Folder or repository to compare every weight with.")
    ] = None,
    revision: Annotated[str | None, Setting("Revision of the source.")] = None,
    as_json: Json = False,
) -> None:
    """Check a converted folder: every file as it was written, every tensor sound."""
    from mlx_diffgemma_convert.converting import run_verify

    run_verify(folder, source, revision, as_json)


@app.command(cls=PlainCommand)
@command(
    "mlx-diffgemma convert upload my-4bit --upload-repo me/my-4bit",
    "mlx-diffgemma convert upload my-4bit --upload-repo me/my-4bit --dry-run",
    "mlx-diffgemma convert upload my-4bit --upload-repo me/my-4bit --json",
)
def upload(
    *,
    folder: Annotated[Path, typer.Argument(help="Folder that this converter wrote.")],
    upload_repo: Annotated[
        str, Setting("Hugging Face repository to upload the result to.", ("--upload-repo",))
    ],
    dry_run: Annotated[bool, Setting("List of files, in place of the upload.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a converted folder to the Hugging Face hub; the same command again goes on."""
    from mlx_diffgemma_convert.converting import run_upload

    run_upload(folder, upload_repo, dry_run, as_json)


@app.command(cls=PlainCommand)
@command(
    "mlx-diffgemma convert measure my-weights my-4bit my-8bit",
    "mlx-diffgemma convert measure my-weights my-4bit --plot divergence.svg",
    "mlx-diffgemma convert measure my-weights --budget 14GB --save mixed.json",
)
def measure(
    *,
    source: Annotated[str, typer.Argument(help="Original weights: folder or repository.")],
    converted: Annotated[
        list[str] | None, typer.Argument(help="Converted models to compare with it.")
    ] = None,
    measurement: Measurement,
    as_json: Json = False,
) -> None:
    """Compare converted models with their source: divergence, flipped tokens, denoising steps."""
    from mlx_diffgemma_convert.measuring import run_measure

    run_measure(source, converted or [], measurement, as_json=as_json)


def main() -> None:
    """Entry point of the console script."""
    try:
        streams.prepare()
        app(prog_name=Path(sys.argv[0]).name)
    except SystemExit as end:
        if end.code and threading.active_count() > 1:
            # A download may still run in its thread, and Python would wait for it. Stopping at any
            # moment is safe.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise
