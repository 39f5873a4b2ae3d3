"""The Metal source of each kernel against its plain-MLX twin: run on the CPU by the emulator, and
on the GPU itself where there is one (marker `metal`)."""

from __future__ import annotations

import pkgutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from metal_emulator import MetalEmulator

import mlx_diffgemma.kernels
from mlx_diffgemma.kernels.dispatch import Launcher, MetalKernel, launch_on_metal
from mlx_diffgemma.survey.comparing import Case, DifferenceError
from mlx_diffgemma.survey.kernel_cases import kernel_cases
from mlx_diffgemma.survey.pass_cases import SMALL_SIZES, Sizes, pass_cases, whole_cases

CASES = [*kernel_cases(), *pass_cases()]
WHOLE, SMALL_WHOLE = list(whole_cases(Sizes())), list(whole_cases(SMALL_SIZES))
FIRST = {case.group: case for case in reversed([*CASES, *SMALL_WHOLE])}.values()
on_linux = pytest.mark.skipif(sys.platform == "darwin", reason="there the GPU runs them: -m metal")


@pytest.fixture(
    params=[
        pytest.param(0, id="forward", marks=on_linux),
        pytest.param(1, id="backward", marks=on_linux),
        pytest.param(7, id="shuffled", marks=on_linux),
        pytest.param("metal", id="metal", marks=pytest.mark.metal),
    ]
)
def launcher(request: pytest.FixtureRequest, emulator_folder: Path) -> Launcher:
    """What runs the Metal source, in every order of its threads."""
    if request.param == "metal":
        return launch_on_metal
    return MetalEmulator(emulator_folder, schedule=request.param)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kernel_computes_what_its_twin_does(launcher: Launcher, case: Case) -> None:
    assert 0 <= case.run(launcher) <= 1


@pytest.mark.metal
@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_the_pass_in_chunks_computes_what_the_whole_one_does(case: Case) -> None:
    assert 0 <= case.run(launch_on_metal) <= 1


@on_linux
@pytest.mark.parametrize("case", SMALL_WHOLE, ids=str)
def test_a_small_pass_in_chunks_computes_what_the_whole_one_does(
    emulator_folder: Path, case: Case
) -> None:
    assert 0 <= case.run(MetalEmulator(emulator_folder)) <= 1


@on_linux
@pytest.mark.parametrize("case", FIRST, ids=str)
def test_a_kernel_that_is_wrong_is_found(emulator_folder: Path, case: Case) -> None:
    right = MetalEmulator(emulator_folder)

    def wrong(kernel: MetalKernel, **arguments: Any) -> list[mx.array]:
        return [(each + 1).astype(each.dtype) for each in right(kernel, **arguments)]

    with pytest.raises(DifferenceError):
        case.run(wrong)


def test_every_kernel_has_a_case() -> None:
    modules = [
        import_module(f"mlx_diffgemma.kernels.{each.name}")
        for each in pkgutil.iter_modules(mlx_diffgemma.kernels.__path__)
    ]
    names = {
        value.name
        for module in modules
        for value in vars(module).values()
        if isinstance(value, MetalKernel)
    }
    assert names == {name for case in CASES for name in case.kernels}
