# SPDX-License-Identifier: Apache-2.0
"""Products of three bfloat16 parts, as precise as float32, of slices of columns in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from pfgm_kernels.backends.triton.maths import round_to_bfloat16


@triton.jit
def load_slices(
    ptr,
    stride,
    rows,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
):
    """The first `rows` of BLOCK rows in slices of columns, each as its high, middle and low part,
    which are `stride` apart; the high one alone where there is one.
    """
    stride = tl.cast(stride, tl.int64)
    row, column = tl.arange(0, BLOCK), tl.arange(0, SLICE)
    index, mask = row[:, None] * (SLICE * SLICES) + column[None, :], (row < rows)[:, None]
    slices = tl.tuple([])
    for c in tl.static_range(SLICES):
        high = tl.load(ptr + c * SLICE + index, mask=mask, other=0.0)
        middle, low = high, high
        if PARTS == 3:
            middle = tl.load(ptr + stride + c * SLICE + index, mask=mask, other=0.0)
            low = tl.load(ptr + 2 * stride + c * SLICE + index, mask=mask, other=0.0)
        slices = slices + ((high, middle, low),)
    return slices


@triton.jit
def split_parts(v, element: tl.constexpr):
    """High, middle and low part of float32 values."""
    high = round_to_bfloat16(v)
    rest = v - high
    middle = round_to_bfloat16(rest)
    return high.to(element), middle.to(element), (rest - middle).to(element)


@triton.jit
def dot_parts(a, b_high, b_middle, b_low, B_PARTS: tl.constexpr):
    """a @ b without the products below 2⁻²⁴ of the largest, summed from zero; a as three parts."""
    total = tl.dot(a[2], b_high, input_precision="ieee")
    if B_PARTS == 3:
        total = tl.dot(a[0], b_low, total, input_precision="ieee")
        total = tl.dot(a[1], b_middle, total, input_precision="ieee")
    total = tl.dot(a[1], b_high, total, input_precision="ieee")
    if B_PARTS == 3:
        total = tl.dot(a[0], b_middle, total, input_precision="ieee")
    return tl.dot(a[0], b_high, total, input_precision="ieee")


@triton.jit
def dot_slices(x, y, Y_PARTS: tl.constexpr, COUNT: tl.constexpr):
    """Σ x @ yᵀ over COUNT slices of columns."""
    total = 0.0
    for c in tl.static_range(COUNT):
        high, middle, low = tl.trans(y[c][0]), tl.trans(y[c][1]), tl.trans(y[c][2])
        total += dot_parts(x[c], high, middle, low, Y_PARTS)
    return total
