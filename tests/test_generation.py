"""The rooms joined: prompts in, responses out, on the shipped demo model."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import mlx_diffgemma
from mlx_diffgemma import batch_generate, generate, load, stream_generate
from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.errors import MemoryShortageError, NumericalError, PromptError, UsageError
from mlx_diffgemma.fitting import diffusion_config
from mlx_diffgemma.text.prompt import encode_prompt

PUZZLE = "sudoku\n4..613\n61.42.\n.6...4\n134...\n3265.1\n5...6."
SOLVED = "452613\n613425\n265134\n134256\n326541\n541362"


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return load("demo")


class Counting:
    """A model that counts its passes."""

    def __init__(self, model: Any) -> None:
        self.model, self.decoded, self.encoded = model, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def decode_keeping(self, canvases: Any) -> Any:
        self.decoded += 1
        return self.model.decode_keeping(canvases)

    def encode(self, ids: Any, prefixes: Any) -> Any:
        self.encoded += sum(map(len, ids))
        return self.model.encode(ids, prefixes)


def test_public_names_are_there_after_any_import() -> None:
    code = (
        "import mlx_diffgemma.generation, mlx_diffgemma as m;"
        "assert all(callable(getattr(m, name)) for name in m.__all__), m.__all__;"
        "assert set(m.__all__) <= set(dir(m))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mlx_diffgemma.nonsense


def test_solves_a_sudoku(demo: tuple[Any, Any]) -> None:
    assert generate(*demo, PUZZLE, seed=0) == SOLVED


def test_verbose_prints_the_text(demo: tuple[Any, Any], capsys: pytest.CaptureFixture) -> None:
    assert generate(*demo, PUZZLE, seed=0, verbose=True) == SOLVED
    assert capsys.readouterr().out == SOLVED + "\n"


def test_the_first_draft_arrives_after_one_denoising_step(demo: tuple[Any, Any]) -> None:
    model = Counting(demo[0])
    responses = stream_generate(model, demo[1], PUZZLE, seed=0)
    assert model.decoded == 0
    seen = []
    for response in responses:
        if response.finish_reason is None:
            seen.append((response.step, model.decoded))
            assert response.draft and not response.text
    # The step that follows is queued before a draft is handed out; none follows the last.
    steps = range(1, len(seen) + 1)
    assert seen == [(step, min(step + 1, len(seen))) for step in steps]


def test_responses_say_how_it_went(demo: tuple[Any, Any]) -> None:
    *steps, last = stream_generate(*demo, PUZZLE, seed=0)
    assert [response.step for response in steps] == list(range(1, len(steps) + 1))
    for response in steps:
        assert len(response.canvas) == len(response.entropy) == 64
        assert response.finish_reason is None
    assert steps[-1].draft == last.text == SOLVED
    assert last.finish_reason == "stop"
    assert last.generation_tokens == len(last.tokens) == len(SOLVED)
    assert last.denoising_steps == (len(steps),)
    assert last.tokens_per_forward == len(SOLVED) / len(steps)
    assert last.prompt_tokens == len(encode_prompt(demo[1], PUZZLE))
    assert last.seed == 0 and last.peak_memory > 0 and last.prompt_tps > 0


def test_a_seed_repeats_a_run_and_is_reported(demo: tuple[Any, Any]) -> None:
    def run(seed: int | None) -> list[Any]:
        return [(r.canvas, r.tokens, r.seed) for r in stream_generate(*demo, "sudoku", seed=seed)]

    first = run(None)
    assert run(first[0][2]) == first
    assert run(first[0][2] + 1) != first


@pytest.mark.parametrize("count", [1, 41, 42, 63, 64, 65, 83])
def test_max_tokens_is_honoured_to_the_token(demo: tuple[Any, Any], count: int) -> None:
    two = f"{PUZZLE}\n\n{PUZZLE[7:]}"
    *_, last = stream_generate(*demo, two, max_tokens=count, seed=3, max_denoising_steps=4)
    assert last.generation_tokens == count
    assert last.finish_reason == "length"
    assert len(last.denoising_steps) == -(-count // 64)


def test_two_canvases_make_one_text(demo: tuple[Any, Any]) -> None:
    two = f"{PUZZLE}\n\n{PUZZLE[7:]}"
    responses = list(stream_generate(*demo, two, seed=3))
    text = "".join(response.text for response in responses)
    assert text.startswith(f"{SOLVED}\n\n")
    assert [r.canvas_index for r in responses if r.text] == [0, 1]
    assert text == demo[1].decode(list(responses[-1].tokens))


def test_a_stop_string_saves_the_canvases_behind_it(demo: tuple[Any, Any]) -> None:
    two = f"{PUZZLE}\n\n{PUZZLE[7:]}"
    whole = list(stream_generate(*demo, two, seed=3))
    model = Counting(demo[0])
    responses = list(stream_generate(model, demo[1], two, seed=3, stop=["\n\n", "?"]))
    assert "".join(response.text for response in responses) == SOLVED
    last = responses[-1]
    assert (last.finish_reason, last.stop_string) == ("stop", "\n\n")
    assert last.tokens == whole[-1].tokens[: len(SOLVED)]
    assert last.denoising_steps == whole[-1].denoising_steps[:1] == (model.decoded,)
    assert batch_generate(*demo, [two, PUZZLE], seed=3, stop="\n").texts[1] == SOLVED[:6]


def test_initial_canvas_replaces_the_noise(demo: tuple[Any, Any]) -> None:
    solution = demo[1].encode(SOLVED, add_special_tokens=False)
    canvas = solution + [5] * (64 - len(solution))
    first, *_ = stream_generate(*demo, "sudoku", initial_canvas=canvas, seed=0)
    assert first.draft == SOLVED
    with pytest.raises(UsageError, match="initial_canvas has 3 tokens, and the canvas has 64"):
        next(stream_generate(*demo, "sudoku", initial_canvas=[1, 2, 3]))


def test_a_batch_answers_each_prompt(demo: tuple[Any, Any]) -> None:
    prompts = ["sudoku", PUZZLE, f"{PUZZLE}\n\n{PUZZLE[7:]}"]
    answers = batch_generate(*demo, prompts, seed=3, max_denoising_steps=8).texts
    assert answers[1] == SOLVED
    assert answers[2].startswith(SOLVED) and len(answers[2]) > len(SOLVED)
    assert len(answers[0]) >= 41
    assert batch_generate(*demo, []).texts == []


def test_a_prefix_cache_is_continued_not_encoded_again(demo: tuple[Any, Any]) -> None:
    model, tokenizer = Counting(demo[0]), demo[1]
    cache = model.make_cache()
    turns = [{"role": "user", "content": PUZZLE}]
    answer = generate(model, tokenizer, turns, seed=0, prefix_cache=cache)
    encoded = model.encoded
    turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "sudoku"}]
    options: dict[str, Any] = {"seed": 1, "max_denoising_steps": 4}
    second = generate(model, tokenizer, turns, prefix_cache=cache, **options)
    assert model.encoded == len(encode_prompt(tokenizer, turns)) > encoded
    alone = generate(demo[0], tokenizer, turns, **options)
    assert second == alone


def test_a_changed_beginning_is_encoded_anew(demo: tuple[Any, Any]) -> None:
    cache = demo[0].make_cache()
    generate(*demo, PUZZLE, seed=0, prefix_cache=cache)
    held = cache.prefix.ids
    reused = cache.prefix.back_to([*held[:20], 99])
    assert reused.ids == held[:20] and len(reused) == 20
    _, (fresh,) = demo[0].encode([held[:20]], [demo[0].empty_prefix()])
    outputs = [np.array(demo[0].encode([[30, 31, 32]], [each])[0]) for each in (reused, fresh)]
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-5)


def test_past_the_window_a_changed_beginning_clears_the_cache(demo: tuple[Any, Any]) -> None:
    cache = demo[0].make_cache()
    generate(*demo, [30] * 200, max_tokens=1, seed=0, prefix_cache=cache)
    assert cache.offset == 200
    assert cache.prefix.back_to([30] * 150 + [31]).ids == ()


def test_prefill_reports_its_progress(demo: tuple[Any, Any]) -> None:
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {"prefill_step_size": 30, "seed": 0}
    text = generate(*demo, PUZZLE, on_prefill=lambda *at: seen.append(at), **options)
    # A chunk ends at 56 too, where the turn of the user does: the prefix is marked there.
    assert seen == [(0, 64), (30, 64), (56, 64), (64, 64)]
    assert text == SOLVED


def test_settings_come_from_the_checkpoint_and_can_be_overridden(demo: tuple[Any, Any]) -> None:
    config = diffusion_config(demo[0])
    assert (config.max_denoising_steps, config.eos_token_ids) == (48, (1, 5))
    *_, last = stream_generate(*demo, "sudoku", max_denoising_steps=1, seed=0)
    assert last.denoising_steps == (1,)
    with pytest.raises(UsageError, match="unknown setting 'nonsense'"):
        stream_generate(*demo, "sudoku", nonsense=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1"),
        ({"max_denoising_steps": 0}, "max_denoising_steps must be"),
        ({"t_min": -1.0}, "t_min must be a number at least 0"),
        ({"t_min": 0.9}, "t_max .* must not be below t_min"),
        ({"entropy_bound": 0}, "entropy_bound must be a number above 0"),
        ({"entropy_bound": float("nan")}, "entropy_bound must be"),
        ({"confidence_threshold": 0.0}, "confidence_threshold must be"),
        ({"stability_threshold": -1}, "stability_threshold must be"),
        ({"canvas_length": 0}, "canvas_length must be"),
        ({"prefill_step_size": 0}, "prefill_step_size must be an integer of at least 1, not 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, not -1"),
    ],
)
def test_settings_out_of_range(demo: tuple[Any, Any], options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stream_generate(*demo, "sudoku", **options)


def test_prompts_that_cannot_be_run(demo: tuple[Any, Any]) -> None:
    for prompt, message in (
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([7, 128], "the prompt: token 1 is 128; ids go from 0 to 127"),
        ([7, 6], r"the prompt: token 1 \(6\) stands for a picture, and none"),
        ([30] * 4033, "has 4033 tokens and the model's context is 4096"),
    ):
        with pytest.raises(PromptError, match=message):
            stream_generate(*demo, prompt)


def test_the_answer_ends_where_the_context_ends(demo: tuple[Any, Any]) -> None:
    model = Counting(demo[0])
    text = replace(model.config.text, max_position_embeddings=200)
    model.config = replace(model.config, text=text)
    *_, last = stream_generate(
        model, demo[1], [30] * 100, max_denoising_steps=1, seed=0, eos_token_ids=(0,)
    )
    assert (last.generation_tokens, last.finish_reason) == (64, "length")


def test_memory_is_estimated_before_the_prompt_is_encoded(
    demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 10)
    with pytest.raises(MemoryShortageError, match="a prompt of 13 tokens needs about"):
        stream_generate(*demo, [30] * 13)


def test_nan_stops_the_run_with_the_step_named(demo: tuple[Any, Any]) -> None:
    class Broken(Counting):
        def decode_keeping(self, canvases: Any) -> Any:
            hidden, layers = super().decode_keeping(canvases)
            return hidden * float("nan") if self.decoded == 2 else hidden, layers

    with pytest.raises(NumericalError, match="canvas 1, step 2: the model returned NaN"):
        generate(Broken(demo[0]), demo[1], PUZZLE, seed=0, stability_threshold=5)
