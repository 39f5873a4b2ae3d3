"""Time a denoising step of two processes against one, each pinned to one core of this machine.

    python scripts/bench_ranks.py                  # the release's widths, two layers, 32,768 words
    python scripts/bench_ranks.py --kind experts
    python scripts/bench_ranks.py --model-macs     # no measurement: a model of pairs of Macs

Rank 0 holds the whole model beside its share and runs steps of both in turns, so that a busy
machine slows both alike; while it runs the whole model, rank 1 waits on its own core. The ratio is
that of the least times. Messages and bytes are what the ranks exchange in a step, counted.

On Linux, put a fast BLAS with one thread under MLX:

    LD_PRELOAD=libopenblas.so.0 OPENBLAS_NUM_THREADS=1 python scripts/bench_ranks.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path

GOAL = 0.6
RANKS = 2
WARMUP = 2  # turns that do not count: the first encodes the prefix


def write_checkpoint(folder: Path, layers: int, words: int, bits: int) -> None:
    """A checkpoint of random weights with the release's widths."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_diffgemma.bench.presets import RELEASE, config_like
    from mlx_diffgemma.bench.random_model import chosen_dtype, chosen_recipe, random_model
    from mlx_diffgemma.config import ModelConfig, both_spellings

    config = both_spellings(config_like(RELEASE, layers))
    config["text_config"]["vocab_size"] = words
    config["vision_config"] = None
    group = {"group_size": 64, "bits": bits, "mode": "affine"}
    model = random_model(
        ModelConfig.from_dict(config), chosen_recipe(bits, None), chosen_dtype(None)
    )
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps({**config, "quantization": group}))


def busy() -> dict[str, float]:
    """Seconds that each thread of this process has computed, by its id, where Linux tells."""
    ticks = os.sysconf("SC_CLK_TCK")
    found = {}
    for task in Path("/proc/self/task").glob("*/stat"):
        with suppress(OSError):  # the thread has just ended
            fields = task.read_text().rpartition(")")[2].split()
            found[task.parent.name] = (int(fields[11]) + int(fields[12])) / ticks
    return found


def run_rank(folder: Path, kind: str, prefix: int, repeats: int) -> None:
    """Be one of the ranks, on a core of its own; rank 0 prints what it has measured."""
    rank = int(os.environ["MLX_RANK"])
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    from mlx_diffgemma.bench.steps import Stepper
    from mlx_diffgemma.bench.timing import seconds
    from mlx_diffgemma.checkpoint.loading import load_model
    from mlx_diffgemma.diffusion.config import DiffusionConfig
    from mlx_diffgemma.distributed import channel
    from mlx_diffgemma.distributed.exchange import Exchange
    from mlx_diffgemma.distributed.following import follow
    from mlx_diffgemma.distributed.group import join
    from mlx_diffgemma.distributed.leading import lead
    from mlx_diffgemma.distributed.loading import load_share
    from mlx_diffgemma.distributed.shares import Split
    from mlx_diffgemma.distributed.traffic import step_traffic

    channel.STUCK_SECONDS = inf  # rank 1 waits while rank 0 runs the whole model
    ranks = join(seconds=300.0)
    loaded = load_share(folder, Split.even(kind, ranks.size), rank)
    ranks.gather(loaded.bytes_read)
    exchange = Exchange(ranks.group)
    if ranks.follower is not None:
        follow(loaded.model, loaded.share, exchange, ranks.follower.orders())
        ranks.end()
        return
    assert ranks.leader is not None
    whole, _ = load_model(folder)
    led = lead(loaded.model, loaded.share, exchange, ranks.leader)
    config = DiffusionConfig(max_tokens=whole.config.canvas_length, eos_token_ids=(1,))
    steps = {
        "one process": Stepper(whole, config, prefix=prefix),
        "two processes": Stepper(led, config, prefix=prefix),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    computed: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for turn in range(WARMUP + repeats):
        for name, step in steps.items():
            began = busy()
            taken = seconds(step)
            gained = {id: spent - began.get(id, 0.0) for id, spent in busy().items()}
            most = max(gained.values(), default=0.0)
            said = f"{name}: {taken:.2f} s, of which a thread is busy for at most {most:.2f} s"
            print(said, file=sys.stderr, flush=True)
            if turn >= WARMUP:
                times[name].append(taken)
                computed[name].append(gained)
    before = exchange.messages, exchange.bytes
    steps["two processes"]()
    item = led.dtype.size
    formula = step_traffic(loaded.share, whole.config.canvas_length, item)
    print(
        json.dumps({
            "kind": kind,
            "seconds": times,
            "computed": own_thread(computed["one process"], computed["two processes"]),
            "messages": exchange.messages - before[0],
            "bytes": exchange.bytes - before[1],
            "formula": [formula.messages, formula.bytes],
            "read": loaded.bytes_read,
        }),
        flush=True,
    )  # fmt: skip
    ranks.end()


def own_thread(
    alone: Sequence[Mapping[str, float]], together: Sequence[Mapping[str, float]]
) -> list[float]:
    """Mean seconds of a step, alone and together, of the thread that computes most of a step that
    one process runs; those of MLX's ring, which wait by spinning, are others."""
    if not alone or not alone[0]:
        return []
    sums = {id: sum(step.get(id, 0.0) for step in alone) for step in alone for id in step}
    own = max(sums, key=lambda id: sums[id])
    return [sum(step.get(own, 0.0) for step in steps) / len(steps) for steps in (alone, together)]


def measure(args: argparse.Namespace) -> None:
    from mlx_diffgemma.train.processes import local_hosts

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, args.layers, args.words, args.bits)
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps(local_hosts(RANKS)))
        command = [sys.executable, __file__, "--rank", str(folder), "--kind", args.kind]
        command += ["--prefix", str(args.prefix), "--repeats", str(args.repeats)]
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
                stdout=subprocess.PIPE if rank == 0 else None,
                text=True,
            )
            for rank in range(RANKS)
        ]
        try:
            out = processes[0].communicate()[0]
        finally:
            for process in processes:
                process.kill()
    if not out:
        sys.exit("rank 0 measured nothing; what it said stands above")
    found = json.loads(out)
    one, two = (found["seconds"][each] for each in ("one process", "two processes"))
    ratio = min(two) / min(one)
    print(f"{args.layers} layers of the release's widths, {args.words} words, {args.bits} bits")
    for name, times in found["seconds"].items():
        listed = ", ".join(f"{each:.2f}" for each in times)
        print(f"{name}: {min(times):.2f} s a step at least, of {listed}")
    print(f"ratio of the least times: {ratio:.2f} (goal: at most {GOAL})")
    if found["computed"]:
        alone, together = found["computed"]
        print(
            f"rank 0's thread that computes is busy for {alone:.2f} s a step alone and for "
            f"{together:.2f} s together: {together / alone:.2f}, whatever else the machine does"
        )
    print(
        f"a step exchanges {found['messages']} messages and {found['bytes'] / 1e6:.2f} MB; by the "
        f"formula {found['formula'][0]} and {found['formula'][1] / 1e6:.2f} MB"
    )


@dataclass(frozen=True)
class Mac:
    """A Mac, as published.

    Attributes:
        operations: peak of the GPU in multiplications and additions of float32 a second: its cores
            times 128 times 2 times its clock.
        bandwidth: bytes a second from memory, as Apple states it.
    """

    name: str
    operations: float
    bandwidth: float


@dataclass(frozen=True)
class Link:
    """What joins two Macs.

    Attributes:
        bandwidth: bytes a second in each direction that a program gets.
        latency: seconds that a collective takes beside its bytes.
        source: where the figures are from.
    """

    name: str
    bandwidth: float
    latency: float
    source: str


MACS = (
    Mac("M4, 10 GPU cores", 4.0e12, 120e9),
    Mac("M4 Pro, 20 GPU cores", 8.1e12, 273e9),
    Mac("M4 Max, 40 GPU cores", 16.2e12, 546e9),
    Mac("M3 Ultra, 80 GPU cores", 28.3e12, 819e9),
)
LINKS = (
    Link(
        "10 GbE, ring", 1.18e9, 300e-6,
        "94% of the rate of the line; about 300 us a collective of the ring over TCP, as reported "
        "when JACCL came out",
    ),
    Link(
        "TB4, ring", 2.05e9, 300e-6,
        "16.4 Gb/s of TCP measured by iperf3 (jiribrejcha.net, 2024); latency as above",
    ),
    Link(
        "TB5, JACCL", 6.9e9, 60e-6,
        "50 to 60 Gb/s and less than 10 us reported for JACCL; 50 us are added for the handover "
        "between GPU and CPU",
    ),
)  # fmt: skip
EFFICIENCY = 0.6  # of the GPU's peak that a step reaches; assumed
FULLER = 0.51  # what the fuller of two ranks computes of a step: 17 of 33 groups of columns at most


def model_macs(prefix: int, bits: int) -> None:
    """Print what a step of the release would take on pairs of Macs."""
    import mlx.core as mx

    from mlx_diffgemma.bench.counting import Weights, layers_cost, vocabulary_cost
    from mlx_diffgemma.bench.presets import RELEASE, config_like
    from mlx_diffgemma.bench.random_model import blank_model, chosen_recipe, formats_of
    from mlx_diffgemma.config import ModelConfig
    from mlx_diffgemma.distributed.shares import Split, shares_of
    from mlx_diffgemma.distributed.traffic import step_traffic

    config = ModelConfig.from_dict(config_like(RELEASE))
    formats = formats_of(blank_model(config, chosen_recipe(bits, None), mx.bfloat16))
    weights, canvas = Weights(config, formats, 2), config.canvas_length
    cost = layers_cost(weights, canvas, prefix) + vocabulary_cost(weights, canvas)
    share = shares_of(config, Split.even("tensor", RANKS), formats)[0]
    traffic = step_traffic(share, canvas, 2)
    print("This is a model from published figures, and not a measurement.")
    print(
        f"A step over {canvas} positions behind {prefix} takes {cost.operations / 1e12:.2f} TFLOP "
        f"and reads {cost.bytes / 1e9:.1f} GB at {bits} bits; split by tensor over two Macs it "
        f"exchanges {traffic.messages} messages and {traffic.bytes / 1e6:.0f} MB. A GPU is taken "
        f"to reach {EFFICIENCY:.0%} of its peak, and nothing is computed while Macs exchange."
    )
    print(f"{'two of':24}{'one alone':>11}" + "".join(f"{link.name:>22}" for link in LINKS))
    for mac in MACS:
        alone = max(cost.operations / mac.operations / EFFICIENCY, cost.bytes / mac.bandwidth)
        cells = []
        for link in LINKS:
            both = FULLER * alone + traffic.messages * link.latency + traffic.bytes / link.bandwidth
            cells.append(f"{1e3 * both:.0f} ms ({both / alone:.2f})")
        print(f"{mac.name:24}{1e3 * alone:>8.0f} ms" + "".join(f"{cell:>22}" for cell in cells))
    for link in LINKS:
        print(f"{link.name}: {link.source}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=("tensor", "experts"), default="tensor")
    parser.add_argument("--layers", type=int, default=2, help="how many of the release's layers")
    parser.add_argument("--words", type=int, default=32768, help="words of the vocabulary")
    parser.add_argument("--bits", type=int, default=4, help="bits per weight")
    parser.add_argument("--prefix", type=int, default=64, help="tokens before the canvas")
    parser.add_argument("--repeats", type=int, default=3, help="turns that are timed")
    parser.add_argument("--model-macs", action="store_true", help="a model of pairs of Macs")
    args = parser.parse_args()
    if args.rank:
        run_rank(Path(args.rank), args.kind, args.prefix, args.repeats)
    elif args.model_macs:
        model_macs(args.prefix, args.bits)
    else:
        measure(args)


if __name__ == "__main__":
    main()
