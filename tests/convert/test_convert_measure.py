from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import convert_to, plan_of, write_tiny
from demo_checkpoint import CHECKPOINT
from hypothesis import given, settings
from hypothesis import strategies as st
from one_pass import decoded, encoded
from typer.testing import CliRunner

from mlx_diffgemma.checkpoint.quantization import Format, Recipe
from mlx_diffgemma.errors import UsageError
from mlx_diffgemma.fitting import diffusion_config
from mlx_diffgemma.generation import load
from mlx_diffgemma_convert.budget import Group, choose, groups_of, rules_of, sensitivities
from mlx_diffgemma_convert.cli import app
from mlx_diffgemma_convert.measure import measure, reference_of
from mlx_diffgemma_convert.measuring import Point, parse_size, table, write_plot
from mlx_diffgemma_convert.probes import LEVELS, PROMPTS, Task, make_probes, read_tasks

TASKS = [
    Task(
        "sudoku\n4..613\n61.42.\n.6...4\n134...\n3265.1\n5...6.",
        "452613\n613425\n265134\n134256\n326541\n541362",
    ),
    Task("sudoku"),
]


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(part) for part in arguments])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The demo model, unquantized."""
    target = tmp_path_factory.mktemp("measure") / "plain"
    quantized = "quantization" in json.loads((CHECKPOINT / "config.json").read_text())
    convert_to(target, plan_of(CHECKPOINT, Recipe("plain", ()), dequantize=quantized))
    return target


@pytest.fixture(scope="module")
def loaded(plain):
    return load(plain)


def test_probes_are_fixed_and_as_noisy_as_they_say(loaded):
    model, tokenizer = loaded
    config = diffusion_config(model)
    first, second = (make_probes(model, tokenizer, TASKS[:1] * 40, config, 3) for _ in range(2))
    clean = tokenizer.encode(TASKS[0].answer, add_special_tokens=False)
    for probe, again in zip(first, second, strict=True):
        for level, canvas, same in zip(LEVELS, probe.canvases, again.canvases, strict=True):
            assert np.array_equal(canvas, same)
            kept = (canvas[:, : len(clean)] == np.array(clean)).mean()
            assert kept == pytest.approx(1 - level + level / 128, abs=0.05)
            tail = canvas[:, len(clean) :]
            assert (tail == config.eos_token_ids[0]).mean() == pytest.approx(1 - level, abs=0.05)
    other = make_probes(model, tokenizer, TASKS[:1] * 40, config, 4)
    assert not np.array_equal(other[0].canvases[0], first[0].canvases[0])


def test_divergence_is_that_of_the_logits(loaded, plain):
    """Against a naive computation, for one prompt and one level."""
    model, tokenizer = loaded
    config = diffusion_config(model)
    path = "model.decoder.layers.2.mlp.up_proj"
    module = model.layers[2].mlp.up_proj
    with reference_of(model, tokenizer, TASKS[:1], 0) as reference:
        same = reference.compare(model)
        before = module.weight
        probe = reference.probes[0]

        def naive():
            _, prefix = encoded(model, probe.prompts[0])
            hidden = decoded(model, probe.canvases[1][0], prefix)
            logits = np.array(model.logits(hidden), np.float64)
            logits /= config.t_min + (config.t_max - config.t_min) * LEVELS[1]
            return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

        log_p = naive()
        module.weight = before + 0.05 * mx.random.normal(before.shape, key=mx.random.key(1))
        found, log_q = reference.compare(model), naive()
        module.weight = before
    assert path and same.mean == 0 and same.flips == 0
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    assert found.kl[1] == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert found.mean > 0


def test_fewer_bits_diverge_more(plain, tmp_path):
    for name in ("8bit", "3bit"):
        convert_to(tmp_path / name, plan_of(plain, name))
    others = [str(tmp_path / name) for name in ("8bit", "3bit")]
    source, eight, three = measure(str(plain), others, TASKS[:1], TASKS[:1], 0)
    assert source.divergence is None and source.exact == 1.0
    assert 0 < eight.divergence.mean < three.divergence.mean
    assert source.bits_per_weight == 16 > eight.bits_per_weight > 8 > three.bits_per_weight > 3
    assert eight.steps_per_canvas >= 1 and len(eight.divergence.kl) == len(LEVELS)
    lines = table([source, eight, three]).splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith("| 8bit | ")


def test_a_model_with_another_vocabulary_is_refused(plain, tiny_4bit, tmp_path):
    with pytest.raises(UsageError, match="has another vocabulary or canvas than"):
        list(measure(str(plain), [str(tiny_4bit)], TASKS[:1], TASKS[:1], 0))


def test_sensitivities_leave_the_model_as_it_was(loaded):
    model, tokenizer = loaded
    groups = [
        replace(g, formats=tuple(Format.parse(name) for name in ("none", "8bit", "2bit")))
        for g in groups_of(model)
        if g.selector in ("embedding", "layers[1].mlp")
    ]
    with reference_of(model, tokenizer, TASKS[:1], 0) as reference:
        costs = sensitivities(model, groups, reference)
        assert reference.compare(model).mean == 0
    for group in groups:
        assert costs[group.selector, Format("none")] == 0
        assert (
            costs[group.selector, Format.parse("2bit")]
            > costs[group.selector, Format.parse("8bit")]
        )


def test_groups_cover_every_matrix_once(loaded):
    model, _ = loaded
    groups = groups_of(model)
    paths = [path for group in groups for path in group.paths]
    assert len(paths) == len(set(paths))
    assert {g.selector for g in groups} >= {"embedding", "self_conditioning", "layers[5].experts"}
    assert sum(g.weights for g in groups) == sum(
        dict(model.named_modules())[path].weight.size for path in paths
    )


FORMATS = tuple(Format.parse(name) for name in ("none", "8bit", "4bit", "2bit"))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_choice_fits_and_is_what_a_naive_search_finds(data):
    """The same greedy rule, written naively: start from the largest formats, take the cheapest step
    per byte until it fits."""
    count = data.draw(st.integers(1, 4))
    groups = [
        Group(f"layers[{i}].mlp", (str(i),), 64 * data.draw(st.integers(1, 9)), FORMATS)
        for i in range(count)
    ]
    costs = {}
    for group in groups:
        costs[group.selector, FORMATS[0]] = 0.0
        for fmt in FORMATS[1:]:
            costs[group.selector, fmt] = data.draw(st.floats(0.001, 1))
    least = sum(g.nbytes(FORMATS[-1]) for g in groups)
    most = sum(g.nbytes(FORMATS[0]) for g in groups)
    budget = int(data.draw(st.floats(least, most))) + 101
    choice = choose(groups, costs, 100, budget)
    assert choice.nbytes <= budget
    now = {g.selector: 0 for g in groups}
    while 100 + sum(g.nbytes(FORMATS[now[g.selector]]) for g in groups) > budget:
        steps = [
            (
                (costs[g.selector, FORMATS[k]] - costs[g.selector, FORMATS[now[g.selector]]])
                / (g.nbytes(FORMATS[now[g.selector]]) - g.nbytes(FORMATS[k])),
                index,
                k,
            )
            for index, g in enumerate(groups)
            for k in range(now[g.selector] + 1, len(FORMATS))
        ]
        _, index, k = min(steps)
        now[groups[index].selector] = k
    assert choice.formats == {s: FORMATS[k] for s, k in now.items()}
    recipe = Recipe.of("mixed", rules_of(choice))
    for i, group in enumerate(groups):
        path = f"model.decoder.layers.{i}.mlp.up_proj"
        assert recipe.format_for(path, count) == choice.formats[group.selector]
    with pytest.raises(UsageError, match="is below the smallest possible"):
        choose(groups, costs, 100, int(least) + 99)


@pytest.fixture
def small(tmp_path):
    """One layer of random weights, with the demo's tokenizer."""
    folder = write_tiny(tmp_path / "small", layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(CHECKPOINT / name, folder)
    return folder


def test_command_finds_a_recipe_that_converts_to_the_size(small, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": TASKS[0].prompt, "answer": TASKS[0].answer}) + "\n")
    found = invoke(
        "measure", small, "--prompts", prompts, "--budget", "220kB", "--json",
        "--save", tmp_path / "mixed.json",
    )  # fmt: skip
    assert found.exit_code == 0, found.stderr
    recipe = json.loads(found.stdout)["recipe"]
    assert json.loads((tmp_path / "mixed.json").read_text())["rules"] == recipe["rules"]
    result = invoke(
        "--model", small, "--mlx-path", tmp_path / "mixed", "--recipe", tmp_path / "mixed.json",
        "--json",
    )  # fmt: skip
    stored = json.loads(result.stdout)["stored_bytes"]
    assert stored == recipe["bytes"] <= 220_000
    assert len({rule.partition("=")[2] for rule in recipe["rules"]}) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo"], "name converted models to compare with the source, or give --budget."),
        (["demo", "--budget", "much"], "'much' is no size; write it as 14GB or 1.4MB."),
        (["demo", "x", "--save", "r.json"], "--save is about the recipe that --budget finds"),
        (["demo", "x", "--prompts", "nowhere.jsonl"], "nowhere.jsonl is no file of prompts"),
    ],
)
def test_wrong_use_is_one_line(arguments, message):
    result = invoke("measure", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1


def test_sizes_and_prompts_are_read(tmp_path):
    assert [parse_size(t) for t in ("14GB", "1.4MB", "2GiB")] == [14 * 10**9, 1_400_000, 2**31]
    assert read_tasks(None, 3) == [Task(prompt) for prompt in PROMPTS[:3]]
    (tmp_path / "empty").write_text("")
    with pytest.raises(UsageError, match="holds no prompts"):
        read_tasks(tmp_path / "empty", 3)


def test_plot_is_a_picture_of_the_points(tmp_path):
    points = [Point("8bit", 8.5, 1e-5), Point("4bit & <odd>", 5.1, 3e-3)]
    write_plot(tmp_path / "plot.svg", points)
    root = ElementTree.parse(tmp_path / "plot.svg").getroot()
    circles = root.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 2
    (x8, y8), (x4, y4) = ((float(c.get("cx")), float(c.get("cy"))) for c in circles)
    assert x8 > x4 and y8 > y4
    assert re.search("4bit &amp; &lt;odd&gt;", (tmp_path / "plot.svg").read_text())
    with pytest.raises(UsageError, match="nothing to draw"):
        write_plot(tmp_path / "plot.svg", [])
