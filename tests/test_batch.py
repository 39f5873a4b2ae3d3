"""A batch: each row is what its prompt gets alone, with settings, seed, room and end of its own."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from editing.small_models import demo, tiny

from mlx_diffgemma import batch_generate, stream_generate
from mlx_diffgemma.errors import NumericalError, PromptError, UsageError
from mlx_diffgemma.fitting import diffusion_config

PUZZLE = "sudoku\n4..613\n61.42.\n.6...4\n134...\n3265.1\n5...6."
PROMPTS = [PUZZLE, "sudoku", f"{PUZZLE}\n\n{PUZZLE[7:]}"]
FIELDS = (
    "finish_reason", "tokens", "prompt_tokens", "seed", "denoising_steps", "converged",
    "context_full", "stop_token", "stop_string",
)  # fmt: skip


def beside(row: Any, alone: list[Any]) -> None:
    assert row.text == "".join(response.text for response in alone)
    for name in FIELDS:
        assert getattr(row, name) == getattr(alone[-1], name), name


def test_each_row_has_settings_seed_and_length_of_its_own() -> None:
    model, tokenizer = demo()
    configs = [
        diffusion_config(model, "balanced"),
        diffusion_config(model, max_denoising_steps=2),
        diffusion_config(model, eos_certainty=0.5),
    ]
    given = {"max_tokens": [128, 20, 70], "seed": [3, 9, 3]}
    found = batch_generate(model, tokenizer, PROMPTS, config=configs, stop="\n\n", **given)
    for row, prompt, config, limit, seed in zip(
        found.rows, PROMPTS, configs, *given.values(), strict=True
    ):
        alone = stream_generate(
            model, tokenizer, prompt, limit, config=config, seed=seed, stop="\n\n"
        )
        beside(row, list(alone))
        assert row.config == config.override(
            max_tokens=limit, eos_token_ids=row.config.eos_token_ids
        )
        assert row.error is None
    assert found.finish_reasons == ["stop", "length", "stop"]
    assert found.rows[2].stop_string == "\n\n" and found.rows[0].stop_token is not None
    assert not found.rows[1].converged and found.rows[0].converged
    assert found.texts == [row.text for row in found.rows]
    assert found.token_ids == [list(row.tokens) for row in found.rows]
    stats = found.stats
    assert stats.prompt_tokens == sum(row.prompt_tokens for row in found.rows)
    assert stats.generation_tokens == sum(len(row.tokens) for row in found.rows)
    assert min(stats.prompt_tps, stats.prompt_time, stats.generation_tps, stats.peak_memory) > 0


def test_thoughts_calls_and_a_beginning_belong_to_their_row() -> None:
    model, tokenizer = tiny()
    options: dict[str, Any] = {"seed": [5, 6], "max_denoising_steps": 2, "raw": True}
    found = batch_generate(model, tokenizer, ["ab", "ba"], [24, 60], **options)
    options.pop("seed")
    for row, prompt, limit, seed in zip(found.rows, ["ab", "ba"], [24, 60], [5, 6], strict=True):
        alone = list(stream_generate(model, tokenizer, prompt, limit, seed=seed, **options))
        beside(row, alone)
        assert row.thought == "".join(response.thought for response in alone)
        assert row.tool_calls == sum((response.tool_calls for response in alone), ())
        assert row.failed_calls == sum((response.failed_calls for response in alone), ())


def spoilt(model: Any, rows: set[int], after: int = 0) -> Any:
    """A form of the pass in which some rows come to nothing after some steps."""
    whole, count = model.decode_keeping, 0

    def broken(views: Any) -> Any:
        nonlocal count
        hidden, kept = whole(views)
        count += 1
        start, parts = 0, []
        for place, view in enumerate(views):
            part = hidden[start : start + len(view.tokens)]
            parts.append(part * float("nan") if place in rows and count > after else part)
            start += len(view.tokens)
        return mx.concatenate(parts), kept

    return broken


@pytest.mark.parametrize("after", [0, 1])
def test_a_row_that_fails_ends_alone_and_is_never_taken_for_an_answer(after, monkeypatch) -> None:
    model, tokenizer = demo()
    sound = batch_generate(model, tokenizer, PROMPTS, seed=0)
    monkeypatch.setattr(model, "decode_keeping", spoilt(model, {1}, after), raising=False)
    found = batch_generate(model, tokenizer, PROMPTS[:2], seed=0)
    assert found.rows[0] == sound.rows[0]
    assert (found.rows[1].finish_reason, found.rows[1].text) == ("error", "")
    message = rf"^prompt 2, canvas 1, step {after + 1}: the model returned NaN or infinity"
    with pytest.raises(NumericalError, match=message):
        raise found.rows[1].error
    for read in (lambda: found.texts, lambda: found.token_ids):
        with pytest.raises(NumericalError, match=message):
            read()


def test_a_batch_of_which_every_row_fails_is_an_error(monkeypatch) -> None:
    model, tokenizer = demo()
    monkeypatch.setattr(model, "decode_keeping", spoilt(model, {0, 1}), raising=False)
    with pytest.raises(NumericalError, match=r"^prompt 1, canvas 1, step 1: "):
        batch_generate(model, tokenizer, PROMPTS[:2], seed=0)
    with pytest.raises(NumericalError, match=r"^canvas 1, step 1: "):
        batch_generate(model, tokenizer, PROMPTS[:1], seed=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": [1]}, "max_tokens has 1 values and there are 2 prompts; give one for each, "
         "or one for all."),
        ({"max_tokens": [8, 0]}, "prompt 2: max_tokens must be an integer of at least 1, not 0."),
        ({"max_tokens": [8, None]}, "prompt 2: max_tokens must be an integer of at least 1, not "
         "None."),
        ({"seed": [0, -1]}, "prompt 2: seed must be an integer of at least 0, not -1."),
        ({"seed": []}, "seed has 0 values and there are 2 prompts; give one for each, or one for "
         "all."),
        ({"config": [None, 3]}, "prompt 2: config must be a DiffusionConfig, not 3."),
        ({"config": 3}, "config must be a DiffusionConfig, not 3."),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, not 0."),
        ({"no_such": 0}, "unknown setting 'no_such'"),
        ({"prompts": ["ab", ""]}, "prompt 2: the prompt is empty"),
        ({"prompts": ["ab", "\ud800"]}, "prompt 2: the prompt is not valid Unicode at character 1"),
        ({"prompts": ["ab", [5, 416]]}, "prompt 2: token 1 is 416; ids go from 0 to 415."),
    ],
)  # fmt: skip
def test_what_is_wrong_with_one_row_names_it(given, message) -> None:
    with pytest.raises(UsageError) as caught:
        batch_generate(*tiny(), **{"prompts": ["ab", "b"], "max_tokens": 8, **given})
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, PromptError) == ("prompts" in given)
