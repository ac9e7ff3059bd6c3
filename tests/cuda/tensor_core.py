# SPDX-License-Identifier: Apache-2.0
"""How the tensor cores sum of a GPU that is not there (emulation/tensor_core.h).

Each test runs with one of CORES, or all with that which PFGM_TENSOR_CORE names.
"""

from __future__ import annotations

import ctypes
import functools
import os
import zlib

import numpy as np
from numpy.typing import NDArray

from tests.cuda import emulated

CORES = {
    "rounded": (0, 0),
    "bare": (8, 23),  # without guard bits: no chip that has bfloat16, but sm_70
    "sm_80": (8, 24),  # and sm_86, sm_89
    "sm_90": (16, 25),  # and sm_100, sm_120
}
"""Products that are added at a time, and binary places that are kept."""

Floats = NDArray[np.float32]


def of_test(test: str) -> tuple[int, int]:
    """One of CORES, always the same one."""
    name = os.environ.get("PFGM_TENSOR_CORE") or [*CORES][zlib.crc32(test.encode()) % len(CORES)]
    return CORES[name]


def multiply(a: Floats, b: Floats, c: Floats, core: tuple[int, int]) -> Floats:
    """c + a @ b of values that bfloat16 holds."""
    if core == CORES["rounded"]:
        return np.matmul(a, b, dtype=np.float32) + c
    (rows, depth), columns = a.shape, b.shape[1]
    a, b, c = (np.ascontiguousarray(v, np.float32) for v in (a, b, c))
    c = c.copy()
    _library()(*(v.ctypes.data for v in (a, b, c)), rows, depth, columns, *core)
    return c


@functools.cache
def _library() -> ctypes._NamedFuncPointer:
    function = ctypes.CDLL(str(emulated.tensor_core_library())).multiply_matrices
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int] * 5
    function.restype = None
    return function
