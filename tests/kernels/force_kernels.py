"""A pytest plugin: run any tests with every kernel forced to one implementation.

    PYTHONPATH=tests/kernels python -m pytest -p force_kernels --kernels emulated tests/diffusion

`emulated` runs the Metal source on the CPU, `mlx` the twins, `metal` the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from metal_emulator import MetalEmulator

from mlx_diffgemma.kernels.dispatch import override

CHOICES = ["emulated", "mlx", "metal"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", choices=CHOICES, default="mlx")


@pytest.fixture(scope="session")
def forced_emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MetalEmulator]:
    emulator = MetalEmulator(Path(tmp_path_factory.mktemp("forced")))
    yield emulator
    print(f"\nkernels run in emulation: {len(emulator.launches)}")


@pytest.fixture(autouse=True)
def forced_kernels(
    request: pytest.FixtureRequest, forced_emulator: MetalEmulator
) -> Iterator[None]:
    choice = request.config.getoption("--kernels")
    with override(forced_emulator if choice == "emulated" else choice):
        yield
