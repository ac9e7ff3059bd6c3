# SPDX-License-Identifier: Apache-2.0
"""Rows of queries, references and cotangents as the kernels take them apart (operands.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from pfgm_kernels.backends.triton.maths import load_values

CODE_ORIGIN = tl.constexpr(128)


@triton.jit
def multiple(y, step):
    """The integer nearest to y/step, in float64; 0 where that is not finite, or y not at most 127
    · 2¹⁶ steps, as all of a row are.
    """
    near = tl.floor(y / step + 0.5)
    return tl.where(tl.abs(near) <= 8323072, near, 0.0)


@triton.jit
def last_digit(n):
    """n − 256 m, from −128 to 127, and m."""
    digit = ((n + 128) & 255) - 128
    return digit, (n - digit) >> 8


@triton.jit
def load_centred(
    values_ptr,
    table_ptr,
    header_ptr,
    origin_ptr,
    index,
    mask,
    column,
    d,
    CODES: tl.constexpr,
    REFERENCES: tl.constexpr,
    COTANGENTS: tl.constexpr,
):
    """y, or of cotangents g, as float64; 0 where masked."""
    y = load_values(values_ptr, table_ptr, index, mask, False)
    if CODES:
        y -= CODE_ORIGIN
    elif not COTANGENTS:
        y -= tl.load(origin_ptr + column, mask=column < d, other=0.0)[None, :]
        if not REFERENCES:
            y /= tl.load(header_ptr)
    return tl.where(mask, y, 0.0)
