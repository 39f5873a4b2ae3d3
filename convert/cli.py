"""`mlx-diffgemma-convert`: convert (the default), verify, measure. Heavy imports come when used."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_diffgemma.cli import errors, streams
from mlx_diffgemma.errors import UsageError

app = typer.Typer(
    name="mlx-diffgemma-convert",
    cls=errors.Program,
    help="Turn Hugging Face weights of DiffusionGemma into verified MLX form, shard by shard.",
    pretty_exceptions_enable=False,
)

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout at the end.")]


@app.callback(invoke_without_command=True)
def convert(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Option("--model", "--hf-path", help="Folder or Hugging Face repository to convert."),
    ] = None,
    mlx_path: Annotated[
        Path, typer.Option("--mlx-path", help="Folder to make; it must not exist yet.")
    ] = Path("mlx_model"),
    quantize: Annotated[
        bool, typer.Option("--quantize", "-q", help="Quantize; without more, with recipe 4bit.")
    ] = False,
    q_bits: Annotated[
        int | None, typer.Option(help="Bits of every quantized module (instead of a recipe).")
    ] = None,
    q_mode: Annotated[
        str | None, typer.Option(help="Mode of every quantized module: affine, mxfp4, ...")
    ] = None,
    q_group_size: Annotated[
        int | None, typer.Option(help="Group size of every quantized module.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Named recipe (--recipe list shows them), or a file from --budget."),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override, as 'experts=3bit/64' or 'layers[0:3].attn=8bit'."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of what stays unquantized: bfloat16, float16, float32.")
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Turn quantized weights back into plain ones.")
    ] = False,
    to_hf: Annotated[
        bool, typer.Option("--to-hf", help="Write the layout of transformers, unquantized.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    delete_source_shards: Annotated[
        bool,
        typer.Option("--delete-source-shards", help="Delete each downloaded shard after use."),
    ] = False,
    retries: Annotated[int, typer.Option(min=0, help="New attempts when the network is lost.")] = 5,
    max_shard_size: Annotated[str, typer.Option(help="Most bytes of an output file.")] = "5GB",
    upload_repo: Annotated[str | None, typer.Option(help="Upload to this repository.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Convert, but only say what would be uploaded.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show sizes and memory; fetch and write nothing.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard what an interrupted run has left.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint; the same command again goes on where an interrupted one stopped."""
    if ctx.invoked_subcommand is not None:
        return
    settings: dict[str, Any] = {**ctx.params, "json": as_json}

    def body() -> None:
        from mlx_diffgemma_convert.command import run_convert

        if model is None and recipe != "list":
            raise UsageError("say what to convert: --model with a folder or a repository.")
        run_convert(settings)

    errors.run(body, debug=debug)


@app.command()
def verify(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A folder that this converter wrote.")],
    source: Annotated[
        str | None, typer.Option(help="Compare every weight with this source as well.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the source.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a converted folder: every file as it was written, every tensor sound."""
    del debug  # read from the context, before the command's name or after it

    def body() -> None:
        from mlx_diffgemma_convert.command import run_verify

        run_verify(folder, source, revision, as_json)

    errors.run(body, debug=errors.debugging(ctx))


@app.command()
def upload(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A folder that this converter wrote.")],
    upload_repo: Annotated[str, typer.Option(help="Repository to upload to.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Upload a converted folder to the Hugging Face hub; the same command again goes on."""
    del debug

    def body() -> None:
        from mlx_diffgemma_convert.command import run_upload

        run_upload(folder, upload_repo, dry_run, as_json)

    errors.run(body, debug=errors.debugging(ctx))


@app.command()
def measure(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(help="The original weights: folder or repository.")],
    converted: Annotated[
        list[str] | None, typer.Argument(help="Converted models to compare with it.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON lines with 'prompt', perhaps 'answer'; else a built-in list."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts whose logits are compared.")] = 8,
    generate: Annotated[int, typer.Option(min=1, help="Prompts that are answered.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    budget: Annotated[
        str | None, typer.Option(help="Find a mixed recipe of this size, as 14GB or 1.4MB.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Where the mixed recipe goes, for --recipe.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw divergence over size into this SVG file.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare converted models with their source: divergence, flipped tokens, denoising steps."""
    del debug
    settings = {**ctx.params, "json": as_json}

    def body() -> None:
        from mlx_diffgemma_convert.report import run_measure

        run_measure(settings)

    errors.run(body, debug=errors.debugging(ctx))


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
