"""How long do clients wait for our server, and for mlx-vlm's, on the same weights in one run?

    python3 -m venv beside && beside/bin/pip install "mlx-vlm==0.7.10"
    python scripts/bench_server.py --rival-python beside/bin/python
    python scripts/bench_server.py                # ours alone: --max-batch 1 beside 4

Random weights: small layers under the release's vocabulary (262,144) and canvas (256). All clients
of a round ask at once, each with a prompt of its own, for one canvas in so many steps, with the
sampler of the checkpoint. The servers take turns. A number is a median over the rounds: seconds
until the first committed text, the mean over the clients, and until the last client has all. The
processor's seconds that a server takes say the same beside other work, where the clock does not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean, median

import httpx

from mlx_diffgemma.bench.presets import PRESETS, SMALL, config_like

TURN = ("<|turn>", "<turn|>")  # 105 and 106, as in the release
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn>{{ message['role'] }}\n"
    "{{ message['content'] }}<turn|>\n{% endfor %}<|turn>model\n"
)
OURS, THEIRS = "ours", "mlx-vlm"
_WORDS = 64  # of a prompt
_READY_SECONDS = 300.0


def write_checkpoint(folder: Path, like: str, steps: int) -> None:
    """A checkpoint of random weights that both servers read."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_diffgemma.bench.random_model import chosen_dtype, chosen_recipe, random_model
    from mlx_diffgemma.config import ModelConfig, both_spellings

    config = both_spellings(config_like(like))
    model = random_model(
        ModelConfig.from_dict(config), chosen_recipe(None, None), chosen_dtype(None)
    )
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    # Theirs makes a tower for pictures unless it is told that there is none.
    (folder / "config.json").write_text(json.dumps({**config, "vision_config": None}))
    generation = {
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": 0,
        "max_denoising_steps": steps,
        "max_new_tokens": config["canvas_length"],
        "t_min": 0.4,
        "t_max": 0.8,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
        "confidence_threshold": 0.005,
        "stability_threshold": 1,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write_tokenizer(folder, config["text_config"]["vocab_size"])


def write_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of `size` words, with a token for every byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    controls = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<unused{n}>" for n in range(101)), *TURN]
    words = [*controls, *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [f" w{number}" for number in range(size - len(words))]
    tokenizer = Tokenizer(
        models.BPE({word: n for n, word in enumerate(words)}, [], byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in controls])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@contextmanager
def server(command: Sequence[str], log: Path) -> Iterator[tuple[str, int]]:
    """The URL of a server that `command` starts, given a port, and the id of its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=out)
        try:
            end = time.monotonic() + _READY_SECONDS
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() > end:
                    sys.exit(f"{' '.join(command)} did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield url, process.pid
        finally:
            process.terminate()
            process.wait(30)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def processor_seconds(pid: int) -> float:
    """Seconds that all threads of a process have computed; nan where there is no /proc."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return float("nan")
    user, system = stat.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def ask(url: str, body: dict[str, object]) -> tuple[float, float]:
    """Seconds until the first text of an answer, and until its end."""
    start, first, text = time.perf_counter(), 0.0, ""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=None) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            data = json.loads(line[len("data: ") :])
            if "error" in data:
                sys.exit(f"{url}: {data['error']}")
            for choice in data.get("choices") or ():
                text += choice["delta"].get("content") or ""
                first = first or (time.perf_counter() - start if text else 0.0)
        if response.status_code != 200 or not text:
            sys.exit(f"{url}: status {response.status_code}, and no text")
    return first, time.perf_counter() - start


def round_of(url: str, bodies: Sequence[dict[str, object]]) -> tuple[float, float]:
    """Seconds until the first text, the mean over the clients, and until the last has all."""
    times: list[tuple[float, float]] = []
    clients = [
        threading.Thread(target=lambda own=body: times.append(ask(url, own))) for body in bodies
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    if len(times) < len(bodies):
        sys.exit(f"{url}: a client got no answer")
    return mean(first for first, _ in times), max(total for _, total in times)


def body_of(model: str, steps: int, tokens: int, rng: random.Random) -> dict[str, object]:
    """A request that both servers understand alike."""
    words = "".join(f" w{rng.randrange(200_000)}" for _ in range(_WORDS))
    return {
        "model": model,
        "messages": [{"role": "user", "content": words}],
        "max_tokens": tokens,
        "temperature": 1.0,
        "stream": True,
        "seed": rng.randrange(1 << 30),
        "max_denoising_steps": steps,  # theirs
        "diffusion_sampler": "entropy-bound",
        "diffusion_full_canvas": True,
        "diffusion_max_steps": steps,  # ours; the sampler's names are alike
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--like", default=SMALL, help=f"a folder, or one of {', '.join(PRESETS)}")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps of a canvas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, action="append", help="1, 4 and 8 if left out")
    parser.add_argument("--rival-python", help="Python of an environment with mlx-vlm")
    args = parser.parse_args()
    clients = args.clients or [1, 4, 8]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers are ended then too
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as servers:
        folder = Path(directory) / "model"
        folder.mkdir()
        write_checkpoint(folder, args.like, args.steps)
        own = [sys.executable, "-m", "mlx_diffgemma", "serve", "--model", str(folder)]
        commands = {OURS: own, f"{OURS}, --max-batch 4": [*own, "--max-batch", "4"]}
        commands[f"{OURS}, --max-batch 1"] = [*own, "--max-batch", "1"]
        if args.rival_python:
            rival = [args.rival_python, "-m", "mlx_vlm.server", "--model", str(folder)]
            commands[THEIRS] = rival
        started = {
            name: servers.enter_context(server(command, Path(directory) / f"{n}.log"))
            for n, (name, command) in enumerate(commands.items())
        }
        tokens = config_like(args.like)["canvas_length"]
        print(f"{args.like}, {args.steps} steps, load {os.getloadavg()[0]:.1f}\n")
        print("| clients | server | first text, s | total, s | to ours | processor, s | to ours |")
        print("|---|---|---|---|---|---|---|")
        for url, _ in started.values():  # what is compiled or loaded on first use is no part of it
            round_of(url, [body_of(str(folder), args.steps, tokens, rng)])
        for count in clients:
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in started}
            worked: dict[str, list[float]] = {name: [] for name in started}
            for _ in range(args.rounds):
                bodies = [body_of(str(folder), args.steps, tokens, rng) for _ in range(count)]
                for name, (url, pid) in started.items():
                    before = processor_seconds(pid)
                    times[name].append(round_of(url, bodies))
                    worked[name].append(processor_seconds(pid) - before)
            totals = {name: median(total for _, total in rounds) for name, rounds in times.items()}
            for name, rounds in times.items():
                first = median(first for first, _ in rounds)
                ratio = totals[name] / totals[OURS]
                spent, ours = median(worked[name]), median(worked[OURS])
                print(
                    f"| {count} | {name} | {first:.2f} | {totals[name]:.2f} | {ratio:.2f} "
                    f"| {spent:.2f} | {spent / ours:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
