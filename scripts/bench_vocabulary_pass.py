"""Time and memory of the pass over the vocabulary in all its forms, in one run.

    python scripts/bench_vocabulary_pass.py --openblas /usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0

The library is in Debian's package libopenblas0-pthread; on a Mac leave the option out. Each variant
runs in turn, round after round; the least time and the largest memory beyond weights are shown.
"""  # noqa: E501

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=262_144)
    parser.add_argument("--canvas", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tile", type=int, help="tokens at a time of the form for a CPU")
    parser.add_argument("--skip", nargs="*", default=[], help="variants to leave out")
    parser.add_argument("--bits", type=int, choices=[4, 8], help="quantize the embedding (affine)")
    parser.add_argument("--gain", type=float, default=1.0, help="larger: more certain positions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--openblas", metavar="PATH", help="load this library before MLX")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.openblas:
        ctypes.CDLL(options.openblas, ctypes.RTLD_GLOBAL)  # MLX then finds its product there
    report = measure(options)
    print(json.dumps(report, indent=2) if options.json else as_table(report))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and bytes of each variant."""
    import mlx.core as mx

    from mlx_diffgemma.cpu.vocabulary import tiled_pass
    from mlx_diffgemma.kernels.embedding_table import EmbeddingTable
    from mlx_diffgemma.kernels.materialized import whole_pass
    from mlx_diffgemma.kernels.vocabulary import Row, vocabulary_pass

    vocab, width = options.vocab, options.hidden
    scale = options.gain * 5 * width**-0.5
    weight = mx.random.normal((vocab, width), scale=scale, key=mx.random.key(0))
    table = EmbeddingTable(weight, mx.float32)
    if options.bits:
        table = EmbeddingTable(*quantized(weight, options.bits))
    del weight
    shape = (options.rows * options.canvas, width)
    hidden = mx.random.normal(shape, key=mx.random.key(1))
    keys = mx.random.split(mx.random.key(2), options.rows)
    mx.eval(hidden, keys, table.weight)

    forms: dict[str, Callable[..., Any]] = {
        "whole": whole_pass,
        "for a CPU": partial(tiled_pass, tile=options.tile),
        "for a GPU": vocabulary_pass,
    }
    asked: dict[str, dict[str, Any]] = {
        "all tokens": {},
        "likely tokens": {"soft_cutoff": 10.0, "likely": True},
        "no soft embeddings": {"need_soft": False},
    }

    def run(form: str, what: str) -> list[mx.array]:
        rows = [Row(options.canvas, 0.6, key, **asked[what]) for key in keys]
        result = forms[form](hidden, table, rows, softcap=30.0)
        arrays = (result.argmax, result.draw, result.entropy, result.soft_embeddings)
        return [array for array in arrays if array is not None]

    variants = {
        f"{form}, {what}": partial(run, form, what)
        for form in forms
        for what in asked
        if form not in options.skip and f"{form}, {what}" not in options.skip
    }
    measured = {name: {"seconds": float("inf"), "bytes": 0} for name in variants}
    for _ in range(options.rounds):
        for name, variant in variants.items():
            mx.clear_cache()
            mx.reset_peak_memory()
            before, start = mx.get_active_memory(), time.perf_counter()
            mx.eval(variant())
            seconds, peak = time.perf_counter() - start, mx.get_peak_memory() - before
            best = measured[name]
            best["seconds"] = min(best["seconds"], seconds)
            best["bytes"] = max(best["bytes"], peak)
    sizes = {name: getattr(options, name) for name in ("vocab", "canvas", "hidden", "rows", "bits")}
    device = mx.device_info().get("device_name", str(mx.default_device()))
    return {"device": device, "sizes": sizes, "gain": options.gain, "variants": measured}


def quantized(weight: Any, bits: int) -> tuple[Any, ...]:
    import mlx.core as mx

    packed = mx.quantize(weight, group_size=64, bits=bits)
    mx.eval(packed)
    return (packed[0], mx.float32, packed[1], packed[2], 64, bits)


def as_table(report: dict[str, Any]) -> str:
    first = next(iter(report["variants"].values()))["seconds"]
    lines = [f"{report['device']}, {report['sizes']}, gain {report['gain']:g}", ""]
    lines += ["| variant | seconds | ratio | MB beyond weights |", "|---|---|---|---|"]
    for name, best in report["variants"].items():
        seconds, size = best["seconds"], best["bytes"] / 1e6
        lines.append(f"| {name} | {seconds:.2f} | {seconds / first:.2f} | {size:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
