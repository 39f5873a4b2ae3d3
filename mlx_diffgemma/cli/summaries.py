"""What is said about a generation once it is over: for people on stderr, for machines as JSON."""

from __future__ import annotations

import json

from mlx_diffgemma.cli.display import printable
from mlx_diffgemma.cli.opening import Opened
from mlx_diffgemma.cli.outcome import Outcome
from mlx_diffgemma.cli.streams import as_line
from mlx_diffgemma.text.tool_calls import ToolCall

EMPTY_ANSWER = (
    "the answer is empty: the model ended it on the first canvas. Try another --seed, or say more."
)
BLANK_ANSWER = "the answer is empty: it is white space alone. Try another --seed, or say more."
UNSETTLED = "not every canvas settled within its steps; --steps N allows more."
THOUGHT_ALONE = "the answer is empty: the model thought and then said nothing."


def remarks(outcome: Outcome, go_on: str, make_room: str) -> list[str]:
    """Lines that say what a user should know of an answer beside its text.

    Args:
        go_on: how to go on with an answer that `--max-tokens` cut; `{}` in it stands for a larger
            number of tokens.
        make_room: what to do about a context that is full.
    """
    lines = [f"tool call: {_call(call)}" for call in outcome.tool_calls]
    lines += [f"{call.error}: {_one_line(call.raw)}" for call in outcome.failed_calls]
    if outcome.empty and outcome.thought:
        lines.append(THOUGHT_ALONE)
    elif outcome.empty:
        lines.append(BLANK_ANSWER if outcome.text else EMPTY_ANSWER)
    last = outcome.last
    if last is not None and last.finish_reason == "length":
        tokens = last.generation_tokens
        what = "thought" if outcome.empty and outcome.thought else "answer"
        cut = f"the {what} was cut at {_count(tokens, 'token')}"
        if last.context_full:
            lines.append(f"{cut}, where the model's context ends; {make_room}")
        else:
            lines.append(f"{cut}; {go_on.format(2 * tokens)}")
    if last is not None and not last.converged:
        lines.append(UNSETTLED)
    return lines


def statistics(outcome: Outcome) -> str:
    """Several lines: speeds, steps, canvases, tokens per forward, peak memory, seed."""
    last = outcome.last
    if last is None:
        return ""
    rows = (
        ("prompt", f"{_count(last.prompt_tokens, 'token')}, {last.prompt_tps:.1f} tokens/s"),
        *((("pictures", f"{last.images} in {last.image_seconds:.2f} s"),) if last.images else ()),
        (
            "generation",
            f"{_count(last.generation_tokens, 'token')}, {last.generation_tps:.1f} tokens/s",
        ),
        ("denoising", effort(outcome)),
        ("memory", f"{last.peak_memory:.2f} GB at the peak" if last.peak_memory else ""),
        ("seed", str(last.seed)),
    )
    return "\n".join(f"{name + ':':<12}{value}" for name, value in rows if value)


def summary(outcome: Outcome) -> str:
    """One short line for a turn of a conversation: tokens, speed, steps and canvases."""
    last = outcome.last
    if last is None:
        return ""
    return (
        f"{_count(last.generation_tokens, 'token')}, {last.generation_tps:.1f} tokens/s, "
        f"{effort(outcome)}"
    )


def effort(outcome: Outcome) -> str:
    """Steps, canvases and tokens per forward pass, which decide the speed on every machine."""
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
    return as_line(
        {
            "text": outcome.text,
            "thought": outcome.thought,
            "tool_calls": [
                {"name": call.name, "arguments": call.arguments} for call in outcome.tool_calls
            ],
            "failed_calls": [
                {"name": call.name, "raw": call.raw, "error": call.error}
                for call in outcome.failed_calls
            ],
            "empty": outcome.empty,
            "tokens": list(last.tokens),
            "finish_reason": last.finish_reason,
            "context_full": last.context_full,
            "converged": last.converged,
            "stop_token": last.stop_token,
            "stop_string": last.stop_string,
            "prompt_tokens": last.prompt_tokens,
            "generation_tokens": last.generation_tokens,
            "canvases": len(last.denoising_steps),
            "denoising_steps": list(last.denoising_steps),
            "tokens_per_forward": last.tokens_per_forward,
            "times": {
                "load_s": opened.load_seconds,
                "prompt_s": outcome.prompt_seconds,
                "images_s": last.image_seconds,
                "generation_s": outcome.generation_seconds,
            },
            "images": last.images,
            "prompt_tps": last.prompt_tps,
            "generation_tps": last.generation_tps,
            "peak_memory": last.peak_memory,
            "seed": last.seed,
            "model": opened.name,
        }
    )


def _call(call: ToolCall) -> str:
    return json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
