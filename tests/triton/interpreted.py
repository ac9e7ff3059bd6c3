# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter as the tests use it: faster, with bfloat16 and the sums of tensor cores. It
remembers which kernels ran.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pfgm_kernels.backends import triton as backend
from tests.cuda import tensor_core

LAUNCHED: set[str] = set()

CORE = tensor_core.CORES["rounded"]
"""Set for each test."""


def install() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    from pfgm_kernels.backends.triton import operands

    patch, patched = interpreter._patch_lang, set()
    launch = interpreter.GridExecutor.__call__

    def call_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        # It patches triton.language at each call of a function within a kernel, which takes longer
        # than the function. Once for each function does.
        if self.fn not in patched:
            patched.add(self.fn)
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    def call_kernel(self: Any, *args: Any, **kwargs: Any) -> None:
        LAUNCHED.add(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}")
        launch(self, *args, **kwargs)

    # Its own conversion to bfloat16 truncates, and its products are of bit patterns.
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_rounded(self: Any, value: Any, to: Any) -> Any:
        if (value.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, value, to)
        return interpreter.TensorHandle(bfloat16_bits(value.data), tl.bfloat16)

    def dot(self: Any, a: Any, b: Any, c: Any, *precision: Any) -> Any:
        if a.dtype.scalar == tl.int8:  # exact in float32, of which there is a fast product
            product = np.matmul(a.data, b.data, dtype=np.float32)
            return interpreter.TensorHandle(c.data + product.astype(np.int32), tl.int32)
        left, right = (
            float32_of(v.data) if v.dtype.scalar == tl.bfloat16 else v.data for v in (a, b)
        )
        return interpreter.TensorHandle(
            tensor_core.multiply(left, right, c.data, CORE), c.dtype.scalar
        )

    operands.PART = torch.bfloat16
    interpreter.InterpreterBuilder.cast_impl = cast_rounded
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpretedFunction.__call__ = call_function
    interpreter.GridExecutor.__call__ = call_kernel


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even."""
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()


def float32_of(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def kernels_that_did_not_run() -> list[str]:
    """Of the backend, with their module."""
    kernels = {
        f"{source.stem}.{name}"
        for source in Path(backend.__file__).parent.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.M)
    }
    return sorted(kernels - LAUNCHED)
