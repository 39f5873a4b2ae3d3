"""Who decides which implementation runs."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mlx_diffgemma.kernels.accept_renoise import accept_renoise
from mlx_diffgemma.kernels.dispatch import launch_on_metal, launcher_for, override


def refuse(*args: Any, **kwargs: Any) -> list[mx.array]:
    raise AssertionError("this launcher was not to run")


def test_without_a_metal_gpu_the_twin_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert launcher_for("auto") is None
    assert launcher_for("mlx") is None
    assert launcher_for("metal") is launch_on_metal


def test_an_override_holds_inside_and_an_explicit_choice_is_stronger() -> None:
    before = launcher_for("auto")
    with override(refuse):
        assert launcher_for("auto") is refuse
        assert launcher_for("mlx") is None
        with override("mlx"):
            assert launcher_for("auto") is None
            assert launcher_for(refuse) is refuse
        assert launcher_for("auto") is refuse
        with override("metal"):
            assert launcher_for("auto") is launch_on_metal
    assert launcher_for("auto") is before


def test_an_override_ends_with_an_error() -> None:
    before = launcher_for("auto")
    with pytest.raises(KeyError), override(refuse):
        raise KeyError
    assert launcher_for("auto") is before


def test_a_kernel_asks_the_dispatch() -> None:
    entropy, ids = mx.zeros((1, 4)), mx.zeros((1, 4), mx.int32)
    with override(refuse), pytest.raises(AssertionError, match="not to run"):
        accept_renoise(entropy, ids, ids, 0.1)


@pytest.mark.skipif(mx.metal.is_available(), reason="here it runs")
def test_metal_where_there_is_none_is_an_error_and_not_the_twin() -> None:
    entropy, ids = mx.zeros((1, 4)), mx.zeros((1, 4), mx.int32)
    with pytest.raises(RuntimeError, match="No Metal back-end"):
        accept_renoise(entropy, ids, ids, 0.1, implementation="metal")
