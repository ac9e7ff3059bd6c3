# SPDX-License-Identifier: Apache-2.0
"""Matrix products on tensor cores: of digits, exact, and of bfloat16 parts, at nearly float32
precision (operands.py). Of the latter:

Tensor cores align what they add at a time, the products of 8 columns (from sm_90 on 16) and a sum,
to the largest exponent among them and cut each toward zero, as far behind its point as a float
reaches or one bit further, from sm_90 on two. They cut the sum to a float. Of g columns that loses
at most (g + 2) units in the last place of Σ|a b|, g ≥ 8: CUT for each column.

So much is lost where one product outweighs all others and these have one sign. Where columns are
alike, few products are cut: they have 16 digits. But the sum is, each time: of PROMOTED columns it
loses CUT of itself on average.

So a block of BLOCK_K columns, PROMOTED at most, is summed from zero, the small products first, and
then added to a float32 accumulator.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pfgm_kernels.backends.triton.launch import Kernel
from pfgm_kernels.backends.triton.maths import pitch, place

PROMOTED = tl.constexpr(128)
SUMMED = tl.constexpr(32768)  # columns of three products of −128 … 127
CUT = tl.constexpr(1.25 * 2.0**-23)


@triton.jit
def dot_parts(a_high, a_low, b_high, b_low, B_PARTS: tl.constexpr):
    """(a_high + a_low) @ (b_high + b_low) without the product of the low parts. float32 parts stand
    for bfloat16 ones where the interpreter runs this.
    """
    total = tl.dot(a_low, b_high, input_precision="ieee")
    if B_PARTS == 2:
        total = tl.dot(a_high, b_low, total, input_precision="ieee")
    return tl.dot(a_high, b_high, total, input_precision="ieee")


@triton.jit
def dot_digits(a, b, total):
    return tl.dot(a, b, total, out_dtype=tl.int32)  # Triton 3.6 expects float32 else


@triton.jit
def sum_digits(
    x_ptr,
    y_ptr,
    first,
    end,
    x_plane,
    y_plane,
    Y_DIGITS: tl.constexpr,
    CARRY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Products of rows x (BLOCK_M, 1) and y (1, BLOCK_N) over columns, of the places that
    three digits have.
    """
    high = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    middle = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    low = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(first, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x, y = x_ptr + k[None, :], y_ptr + k[:, None]
        x_high, x_middle = tl.load(x), tl.load(x + x_plane)
        x_low, y_high = tl.load(x + 2 * x_plane), tl.load(y)
        high = dot_digits(x_high, y_high, high)
        if Y_DIGITS == 3:
            y_middle, y_low = tl.load(y + y_plane), tl.load(y + 2 * y_plane)
            if CARRY:
                middle = dot_digits(x_high, y_middle, dot_digits(x_middle, y_high, middle))
                low = dot_digits(x_middle, y_middle, dot_digits(x_low, y_high, low))
                low = dot_digits(x_high, y_low, low)
            else:
                none = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
                middle += dot_digits(x_high, y_middle, dot_digits(x_middle, y_high, none))
                sums = dot_digits(x_middle, y_middle, dot_digits(x_low, y_high, none))
                low += dot_digits(x_high, y_low, sums)
        else:
            middle = dot_digits(x_middle, y_high, middle)
            low = dot_digits(x_low, y_high, low)
    if Y_DIGITS == 3:
        # Rounded to whole middles: by less than what is left out, for fewer registers.
        return (high.to(tl.int64) * 256 + (middle + ((low + 128) >> 8))).to(tl.float64) * 256
    else:
        return (high.to(tl.float64) * 256 + middle.to(tl.float64)) * 256 + low.to(tl.float64)


@Kernel
def screen_kernel(
    x_ptr,  # (3, B, width) int8 digits of queries
    x_steps_ptr,  # (B,) float64
    y_ptr,  # (Y_DIGITS, N, width) int8, digits y_plane apart
    y_steps_ptr,  # (N,) float64, for three Y_DIGITS
    norms_ptr,  # (N,) float64
    wanted_ptr,  # (B,) int8, but for ALL
    out_ptr,  # (B, pitch) float32
    minima_ptr,  # (B, tiles) float32
    B,
    N,
    width,
    y_plane,
    ALL: tl.constexpr,
    Y_DIGITS: tl.constexpr,
    LONG: tl.constexpr,
    CARRY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """r_j = ‖y_j‖² − 2 x'·y_j and for each query its smallest over a tile of BLOCK_N references.
    Nothing where none of BLOCK_M queries is wanted.

    Of three digits each, products of lower places than the third of five are left out (route.py).
    Sums of integers are exact: those of SUMMED columns fit 32 bits, for LONG there are more.
    """
    # Programs that run together share references: there are far more of these than of queries.
    block, tile = place(tl.cdiv(B, BLOCK_M))
    b = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if not ALL:
        if tl.max(tl.load(wanted_ptr + b, mask=b < B, other=0).to(tl.int32), 0) == 0:
            return
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(b, B - 1).to(tl.int64)[:, None] * width
    column = tl.minimum(j, N - 1).to(tl.int64)[None, :] * width
    x_plane, y_plane = tl.cast(B, tl.int64) * width, tl.cast(y_plane, tl.int64)
    x_ptr, y_ptr = x_ptr + row, y_ptr + column
    if LONG:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
        for first in range(0, width, SUMMED):
            total += sum_digits(
                *(x_ptr, y_ptr, first, tl.minimum(first + SUMMED, width), x_plane, y_plane),
                *(Y_DIGITS, CARRY, BLOCK_M, BLOCK_N, BLOCK_K),
            )
    else:
        total = sum_digits(
            *(x_ptr, y_ptr, 0, width, x_plane, y_plane),
            *(Y_DIGITS, CARRY, BLOCK_M, BLOCK_N, BLOCK_K),
        )
    # Not j: 32 comparisons of it would stay in each thread's registers throughout the loop.
    reference = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = 2 * tl.load(x_steps_ptr + tl.minimum(b, B - 1))[:, None]
    if Y_DIGITS == 3:
        step *= 65536 * tl.load(y_steps_ptr + reference, mask=reference < N, other=0.0)[None, :]
    norms = tl.load(norms_ptr + reference, mask=reference < N, other=float("inf"))
    r = (norms[None, :] - total * step).to(tl.float32)
    to = minima_ptr + b.to(tl.int64) * tl.cdiv(N, BLOCK_N) + tile
    tl.store(to, tl.min(r, 1), mask=b < B)
    out = out_ptr + b.to(tl.int64)[:, None] * pitch(N) + j[None, :]
    tl.store(out, r, mask=(b < B)[:, None] & (j < pitch(N))[None, :])


@Kernel
def compare_kernel(
    a_ptr,  # (2, B, width) parts of cotangents
    y_ptr,  # (Y_PARTS, N, width), parts y_plane apart
    out_ptr,  # (B, pitch) float32
    B,
    N,
    width,
    y_plane,
    Y_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a·y_j."""
    # As in screen_kernel.
    block, tile = place(tl.cdiv(B, BLOCK_M))
    b = block * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(b, B - 1).to(tl.int64)[:, None] * width
    column = tl.minimum(j, N - 1).to(tl.int64)[None, :] * width
    low_a, low_y = tl.cast(B, tl.int64) * width, tl.cast(y_plane, tl.int64)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, width, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a_high = tl.load(a_ptr + row + k[None, :])
        a_low = tl.load(a_ptr + low_a + row + k[None, :])
        y_high = tl.load(y_ptr + column + k[:, None])
        y_low = y_high
        if Y_PARTS == 2:
            y_low = tl.load(y_ptr + low_y + column + k[:, None])
        accumulator += dot_parts(a_high, a_low, y_high, y_low, Y_PARTS)
    out = out_ptr + b.to(tl.int64)[:, None] * pitch(N) + j[None, :]
    tl.store(out, accumulator, mask=(b < B)[:, None] & (j < pitch(N))[None, :])


@Kernel
def list_kernel(
    cut_ptr,  # (B,) float32
    active_ptr,  # (B, tiles) int8: 0 or 1, where cut is not −∞
    order_ptr,  # (blocks · BLOCK_M,) int32
    list_ptr,  # (blocks, tiles) int32
    length_ptr,  # (blocks,) int32
    B,
    tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The queries with a cut side by side, BLOCK_M to a block, −1 beyond the last: a few of them in
    each block would make all blocks pay. And the tiles in which any of a block has a weight, in
    order.
    """
    block = tl.program_id(0)
    order_ptr += block * BLOCK_M
    before = -block * BLOCK_M
    for first in range(0, B, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        cut = tl.load(cut_ptr + b, mask=b < B, other=-float("inf"))
        dense = (cut != -float("inf")).to(tl.int32)
        slot = before + tl.cumsum(dense, 0) - 1
        tl.store(order_ptr + slot, b, mask=(dense > 0) & (slot >= 0) & (slot < BLOCK_M))
        before += tl.sum(dense, 0)
    slot = tl.arange(0, BLOCK_M)
    tl.store(order_ptr + slot, -1, mask=slot >= before)
    tl.debug_barrier()  # other threads have written what is read here
    b = tl.load(order_ptr + slot)
    active_ptr += tl.maximum(b, 0).to(tl.int64)[:, None] * tiles
    list_ptr += block.to(tl.int64) * tiles
    length = 0
    for first in range(0, tiles, GROUP):
        tile = first + tl.arange(0, GROUP)
        mask = (b >= 0)[:, None] & (tile < tiles)[None, :]
        active = tl.load(active_ptr + tile[None, :], mask=mask, other=0)
        wanted = tl.max(active.to(tl.int32), 0)
        tl.store(list_ptr + length + tl.cumsum(wanted, 0) - 1, tile, mask=wanted > 0)
        length += tl.sum(wanted, 0)
    tl.store(length_ptr + block, length)


@Kernel
def sum_kernel(
    weights_ptr,  # (2, B, tiles · BLOCK_K) parts, where cut is not −∞
    y_ptr,  # (Y_PARTS, N, width), parts y_plane apart
    order_ptr,  # these three: see list_kernel
    list_ptr,
    length_ptr,
    out_ptr,  # (splits, B, width) float32
    B,
    N,
    width,
    y_plane,
    tiles,
    Y_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ_j w_j y_j over every splits-th tile of BLOCK_K references in which any query of the block
    has a weight.
    """
    block, split, splits = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    length = tl.load(length_ptr + block)
    b = tl.load(order_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    if tl.max(b, 0) >= 0:
        row = tl.maximum(b, 0).to(tl.int64)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        column = d % width  # in one piece, unlike a minimum, so that loads stay wide
        stride = tiles * BLOCK_K
        low_w, low_y = tl.cast(B, tl.int64) * stride, tl.cast(y_plane, tl.int64)
        mask = (b >= 0)[:, None]
        accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        list_ptr += block.to(tl.int64) * tiles
        following = tl.load(list_ptr + tl.maximum(tl.minimum(split, length - 1), 0))
        for i in range(split, length, splits):
            tile = following  # read ahead, so that the pipeline need not wait for it
            following = tl.load(list_ptr + tl.minimum(i + splits, length - 1))
            j = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            w = weights_ptr + row[:, None] * stride + j[None, :]
            w_high, w_low = (
                tl.load(w, mask=mask, other=0.0),
                tl.load(w + low_w, mask=mask, other=0.0),
            )
            y = y_ptr + tl.minimum(j, N - 1).to(tl.int64)[:, None] * width + column[None, :]
            y_high = tl.load(y)
            y_low = y_high
            if Y_PARTS == 2:
                y_low = tl.load(y + low_y)
            accumulator += dot_parts(w_high, w_low, y_high, y_low, Y_PARTS)
        to = out_ptr + (split.to(tl.int64) * B + row[:, None]) * width + d[None, :]
        tl.store(to, accumulator, mask=mask & (d < width)[None, :])
