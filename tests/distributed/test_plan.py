"""What a plan counts is what the ranks hold, and the command shows it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from mlx_diffgemma.checkpoint import memory
from mlx_diffgemma.cli.main import app
from mlx_diffgemma.cli.planned import planned_model, released
from mlx_diffgemma.distributed.loading import load_share
from mlx_diffgemma.distributed.plan import first_fitting, longest_context, plan
from mlx_diffgemma.distributed.shares import Split


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["distributed", "plan", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["distributed", "plan", *arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("kind", ["tensor", "experts", "pipeline"])
def test_the_weights_of_a_rank_are_what_it_loads(kind: str) -> None:
    split = Split(kind, (2, 1))
    counted = plan(planned_model("demo", here=True), split, 512).ranks
    for rank, needed in enumerate(counted):
        model = load_share("demo", split, rank).model
        assert needed.weights == sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def test_prefixes_are_shared_by_heads_or_layers() -> None:
    model = released("4bit")
    one = plan(model, Split.even("tensor", 1), 100_000).ranks[0]
    for kind in ("tensor", "pipeline"):
        ranks = plan(model, Split.even(kind, 2), 100_000).ranks
        assert sum(rank.prefix for rank in ranks) == one.prefix
    for rank in plan(model, Split.even("experts", 2), 100_000).ranks:
        assert rank.prefix == one.prefix


def test_bf16_fits_two_macs_of_32_gb_with_raised_limits_only() -> None:
    model = released("bf16")
    halves = plan(model, Split.even("tensor", 2), 8192)
    assert [halves.fit([gb, gb]) for gb in (24, 32, 36)] == ["no", "raised", "yes"]
    assert halves.fit([48, 16]) == "no"
    assert plan(model, Split.even("tensor", 1), 8192).fit([32]) == "no"


def test_the_fastest_split_that_fits_is_found() -> None:
    model = released("bf16")
    fitting = first_fitting(model, (1, 1), (27e9, 27e9), 8192)
    assert fitting is not None and fitting.split.kind == "tensor"
    assert first_fitting(model, (1, 1), (27e9, 24e9), 8192) is None
    # Forty ranks cannot share sixteen query heads, and can share 128 experts.
    many = first_fitting(model, (1,) * 40, (27e9,) * 40, 8192)
    assert many is not None and many.split.kind == "experts"


def test_the_longest_context_is_the_last_that_fits() -> None:
    model, split = released("8bit"), Split.even("tensor", 2)
    assert longest_context(model, split, (8, 8)) == 0
    longest = longest_context(model, split, (16, 16))
    assert 0 < longest < 262_144
    assert plan(model, split, longest).fit((16, 16)) == "raised"
    assert plan(model, split, longest + 256).fit((16, 16)) == "no"
    assert longest_context(model, split, (64, 64)) == 262_144


def test_the_table_of_recipes_says_what_fits() -> None:
    text = run("--hosts", "2", "--memory", "32")
    (row,) = (line for line in text.splitlines() if "bf16" in line)
    halves = plan(released("bf16"), Split.even("tensor", 2), 8192).ranks
    assert f"{halves[0].total / 1e9:.1f} fits*" in row
    assert " no " in row.split("fits*")[0]
    assert "Counted, not measured" in text


def test_ranks_are_shown_with_their_sizes() -> None:
    text = run("--recipe", "8bit", "--memory", "64,32", "--weights", "2 1", "--context", "262144")
    first, second = plan(released("8bit"), Split("tensor", (2, 1)), 262_144).ranks
    for needed in (first, second):
        assert memory.size_text(needed.weights) in text
        assert memory.size_text(needed.total) in text
    assert "weights 2, 1" in text and "fits" in text and "262,144" in text
    assert "smallest Mac" in run("--recipe", "4bit")


def test_json_has_the_same_figures() -> None:
    found: dict[str, Any] = json.loads(
        run("--recipe", "4bit", "--hosts", "4", "--memory", "16", "--json")
    )
    assert found["memory_gb"] == [16] * 4 and found["weights"] == [1.0] * 4
    (model,) = found["models"]
    assert [each["split"] for each in model["splits"]] == [None, "tensor", "experts", "pipeline"]
    quarters = plan(released("4bit"), Split.even("tensor", 4), 8192).ranks
    ranks = model["splits"][1]["ranks"]
    assert [rank["bytes"] for rank in ranks] == [needed.total for needed in quarters]
    assert model["splits"][1]["fits"] == "yes" and model["splits"][1]["longest_context"] > 8192


def test_a_split_that_cannot_be_is_said_in_a_line() -> None:
    text = run("--model", "demo", "--hosts", "9")
    assert "tensor: 9 ranks cannot share" in text
    assert json.loads(run("--model", "demo", "--hosts", "9", "--json"))["models"][0]["splits"][1][
        "why_not"
    ].startswith("9 ranks cannot share")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--hosts", "0"), "between 1 and 64"),
        (("--hosts", "3", "--weights", "1,2"), "different numbers of Macs (2, 3)"),
        (("--weights", "1,-2"), "numbers above 0"),
        (("--memory", "1.5"), "whole GB"),
        (("--recipe", "9bit"), "known are 3bit"),
        (("--recipe", "4bit", "--model", "demo"), "drop it or --model"),
        (("--revision", "main"), "goes with --model"),
        (("--model", "demo", "--context", "9999"), "between 1 and 4,096"),
    ],
)
def test_wrong_values_are_refused(arguments: tuple[str, ...], says: str) -> None:
    assert says in fails(*arguments)
