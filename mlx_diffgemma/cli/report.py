"""What is said about a generation once it is over: for people on stderr, for machines as JSON."""

from __future__ import annotations

import json

from mlx_diffgemma.cli.session import Opened, Outcome

EMPTY_ANSWER = (
    "the answer is empty: the model ended it on the first canvas. Try another --seed, or say more."
)


def statistics(outcome: Outcome) -> str:
    """Several lines: speeds, steps, canvases, tokens per forward, peak memory, seed."""
    last = outcome.last
    if last is None:
        return ""
    rows = (
        ("prompt", f"{_count(last.prompt_tokens, 'token')}, {last.prompt_tps:.1f} tokens/s"),
        (
            "generation",
            f"{_count(last.generation_tokens, 'token')}, {last.generation_tps:.1f} tokens/s",
        ),
        ("denoising", effort(outcome)),
        ("memory", f"{last.peak_memory:.2f} GB at the peak"),
        ("seed", str(last.seed)),
    )
    return "\n".join(f"{name + ':':<12}{value}" for name, value in rows)


def summary(outcome: Outcome) -> str:
    """The same in one short line, for a turn of a conversation."""
    last = outcome.last
    if last is None:
        return ""
    return (
        f"{_count(last.generation_tokens, 'token')}, {last.generation_tps:.1f} tokens/s, "
        f"{effort(outcome)}"
    )


def effort(outcome: Outcome) -> str:
    """Steps, canvases and tokens per forward: what decides the speed, whatever the machine."""
    last = outcome.last
    if last is None:
        return ""
    steps = last.denoising_steps
    each = f" ({' + '.join(map(str, steps))})" if len(steps) > 1 else ""
    return (
        f"{_count(sum(steps), 'step')}{each}, {_count(len(steps), 'canvas', 'canvases')}, "
        f"{last.tokens_per_forward:.1f} tokens per forward"
    )


def as_json(outcome: Outcome, opened: Opened) -> str:
    """One JSON object on one line; times in seconds, peak memory in GB (1e9 bytes)."""
    last = outcome.last
    assert last is not None, "a generation ends with a response"
    return json.dumps(
        {
            "text": outcome.text,
            "tokens": list(last.tokens),
            "finish_reason": last.finish_reason,
            "prompt_tokens": last.prompt_tokens,
            "generation_tokens": last.generation_tokens,
            "canvases": len(last.denoising_steps),
            "denoising_steps": list(last.denoising_steps),
            "tokens_per_forward": last.tokens_per_forward,
            "times": {
                "load_s": opened.load_seconds,
                "prompt_s": outcome.prompt_seconds,
                "generation_s": outcome.generation_seconds,
            },
            "prompt_tps": last.prompt_tps,
            "generation_tps": last.generation_tps,
            "peak_memory": last.peak_memory,
            "seed": last.seed,
            "model": opened.name,
        },
        ensure_ascii=False,
    )


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
