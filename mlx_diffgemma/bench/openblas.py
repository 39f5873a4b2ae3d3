"""OpenBLAS under MLX's CPU backend, whose wheel brings a slow reference BLAS."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from mlx_diffgemma.errors import UsageError

VARIABLE = "MLX_DIFFGEMMA_OPENBLAS"


def load_openblas(path: str) -> str:
    """Put the library at `path` in front of the BLAS that MLX brings. Returns what it calls itself.

    Its symbols have to be there before MLX is loaded, so nothing may have imported MLX yet.

    Raises:
        UsageError: it is too late, or there is no OpenBLAS at `path`.
    """
    if "mlx.core" in sys.modules:
        raise UsageError("OpenBLAS must be loaded before mlx is; start a process of its own.")
    if not Path(path).exists():
        raise UsageError(f"--openblas: there is no file {path}; name libopenblas.so.0.")
    try:
        describe = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL).openblas_get_config
    except (OSError, AttributeError):
        raise UsageError(f"--openblas: {path} is no OpenBLAS; name libopenblas.so.0.") from None
    describe.restype = ctypes.c_char_p
    return describe().decode()
