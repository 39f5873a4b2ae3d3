"""Models are used in other threads than those that loaded them, by several at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma import generate, load, stream_generate
from mlx_diffgemma.checkpoint import adapters
from mlx_diffgemma.errors import UsageError

PUZZLE = "sudoku\n4..613\n61.42.\n.6...4\n134...\n3265.1\n5...6."
ALIKE: dict[str, Any] = {"seed": 0, "max_denoising_steps": 6}


def elsewhere(*calls: Callable[[], Any]) -> list[Any]:
    """What calls return, each in a thread of its own, all at once."""
    together = Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        together.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return [found.result() for found in [threads.submit(run, call) for call in calls]]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Adapters for the demo that change what it says."""
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = load("demo")
    parameters = {"rank": 2, "scale": 4.0, "dropout": 0.0, "keys": ["mlp.down_proj"]}
    (folder / adapters.CONFIG).write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters})
    )
    paths = adapters.modules_of_keys(model, parameters["keys"], -1)
    adapters.add_adapters(model, paths, rank=2, scale=4.0)
    weights = {
        name: mx.random.normal(array.shape, key=mx.random.key(number)) * 2.0
        for number, (name, array) in enumerate(tree_flatten(model.parameters()))
        if name.rpartition(".")[2] in ("lora_a", "lora_b")
    }
    mx.save_safetensors(str(folder / adapters.WEIGHTS), weights)
    return str(folder)


def answered(loaded: tuple[Any, Any], **more: Any) -> str:
    return generate(*loaded, PUZZLE, **ALIKE, **more)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_answers_in_any_thread_and_in_several_at_once(lazy, adapted, adapter) -> None:
    options: dict[str, Any] = {"lazy": lazy, "adapter_path": adapter if adapted else None}
    expected = answered(load("demo", **(options | {"lazy": False})))
    loaded = load("demo", **options)
    assert elsewhere(*[lambda: answered(loaded)] * 2) == [expected] * 2
    assert answered(loaded) == expected
    (other,) = elsewhere(lambda: load("demo", **options))
    assert answered(other) == expected


def test_models_answer_at_once(adapter) -> None:
    plain, adapted = load("demo"), load("demo", adapter_path=adapter)
    alone = [answered(plain), answered(adapted)]
    assert alone[0] != alone[1]
    assert elsewhere(lambda: answered(plain), lambda: answered(adapted)) == alone


def test_a_cache_goes_from_thread_to_thread_and_is_refused_to_two_at_once() -> None:
    loaded = load("demo")
    expected, cache = answered(loaded), loaded[0].make_cache()
    for _ in range(2):
        assert elsewhere(lambda: answered(loaded, prefix_cache=cache)) == [expected]
    running = stream_generate(*loaded, PUZZLE, prefix_cache=cache, **ALIKE)
    next(running)
    for refused in (
        lambda: elsewhere(lambda: answered(loaded, prefix_cache=cache)),
        lambda: answered(loaded, prefix_cache=cache),
    ):
        with pytest.raises(UsageError, match=r"^this prefix_cache is in use by another call; "):
            refused()
    assert "".join(response.text for response in running) == expected
    assert answered(loaded, prefix_cache=cache) == expected


def test_weights_that_are_read_later_are_read_by_whoever_is_first() -> None:
    model, tokenizer = load("demo", lazy=True)
    assert model.read_weights is not None
    elsewhere(*[lambda: answered((model, tokenizer))] * 3)
    assert model.read_weights is None
    assert load("demo")[0].read_weights is None
