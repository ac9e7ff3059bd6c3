# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter as GPUs compute: a product of float32 numbers is added without rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np


@contextlib.contextmanager
def contracted(first: str) -> Iterator[None]:
    """Wherever a product is an operand of a sum: compilers may, and need not. first: "left" or
    "right", which of two products in a sum, where only one can stay unrounded.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    multiply = InterpreterBuilder.create_fmul

    def keep(self: Any, a: Any, b: Any) -> Any:
        out = multiply(self, a, b)
        if out.data.dtype == np.float32:  # float64 holds the product of any two
            out.attr = out.attr | {"product": a.data.astype(np.float64) * b.data}
        return out

    def add(sign: int) -> Callable[[Any, Any, Any], Any]:
        def operation(self: Any, a: Any, b: Any) -> Any:
            values = [a.data, b.data]
            kept = [i for i, handle in enumerate((a, b)) if "product" in handle.attr]
            if kept:
                one = kept[0 if first == "left" else -1]
                values[one] = (a, b)[one].attr["product"]
                values = [value.astype(np.float64) for value in values]
            return self.binary_op(a, b, lambda *_: values[0] + sign * values[1])

        return operation

    with (
        mock.patch.object(InterpreterBuilder, "create_fmul", keep),
        mock.patch.object(InterpreterBuilder, "create_fadd", add(1)),
        mock.patch.object(InterpreterBuilder, "create_fsub", add(-1)),
    ):
        yield
