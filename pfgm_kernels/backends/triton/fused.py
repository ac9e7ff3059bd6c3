# SPDX-License-Identifier: Apache-2.0
"""Displacement and log mass, Eqs. (3) and (12), for up to 256 columns in one pass over the
references, with nothing of size B · N in memory. With r_j and the offset of a query from

    s_j / unit² = r_j + offset,   r_j = ‖y_j‖² − centre − 2 x'·y_j   (operands.py)

weights are relative to the smallest r so far, m:

    w_j = exp(−(k/2) log1p((r_j − m)/(m + offset)))       (Gaussian: exp(−unit² (r_j − m)/(2t²)))

When m moves, what was summed is rescaled. s_m = unit² (m + offset) need not be the s of any
reference exactly: it is what all logits refer to. References that hold much of the weight are
listed, left out of the product Σ w y, and taken by direct differences in float64 once m is known.

Three bfloat16 parts hold the 24 bits of a float32, six products of them, the small ones first, are
as precise as one of float32. Queries for which this is not enough are left to others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pfgm_kernels.backends.triton.call import Call
from pfgm_kernels.backends.triton.configurations import blocks, multiprocessors
from pfgm_kernels.backends.triton.exact import next_tile
from pfgm_kernels.backends.triton.maths import (
    load_values,
    logit_of,
    logits_float,
    relative_logit,
    round_to_bfloat16,
    s_offset,
)
from pfgm_kernels.backends.triton.operands import FUSED_MAX_DIM as MAX_DIM
from pfgm_kernels.backends.triton.operands import Operands, split
from pfgm_kernels.backends.triton.route import DEPTH

CAP = tl.constexpr(128)  # references that may be listed for a query in each split
HEAVY = tl.constexpr(1 / 32)  # share of the weight so far beyond which a reference is listed
FEWEST_TILES = 4  # in a split
# What the products may be off by at most if all of their roundings added up, in logits: of all the
# weight, and of what is not listed. In fact they hardly do.
LOGIT_BOUND = tl.constexpr(4e-5)
LISTED_BOUND = tl.constexpr(0.25)
# By how much the logit of an anchor that is not listed may be off: there are others like it, which
# may all err alike.
ANCHOR_BOUND = tl.constexpr(8e-7)


@triton.jit
def load_offset(header_ptr, squares_ptr, shared_ptr, index, t, GAUSSIAN: tl.constexpr):
    """s_j / unit² − r_j of queries."""
    unit, centre = tl.load(header_ptr), tl.load(header_ptr + 4)
    squared, shared = tl.load(squares_ptr + index), tl.load(shared_ptr + index)
    return squared + centre + s_offset(t, GAUSSIAN) / (unit * unit) - 2 * shared


@triton.jit
def load_parts(ptr, index, mask, stride, PARTS: tl.constexpr):
    """High, middle and low part of what lies at `index`; the high one alone where there is one."""
    high = tl.load(ptr + index, mask=mask, other=0.0)
    middle, low = high, high
    if PARTS == 3:
        middle = tl.load(ptr + stride + index, mask=mask, other=0.0)
        low = tl.load(ptr + 2 * stride + index, mask=mask, other=0.0)
    return high, middle, low


@triton.jit
def split_parts(v, element: tl.constexpr):
    """High, middle and low part of float32 values."""
    high = round_to_bfloat16(v)
    rest = v - high
    middle = round_to_bfloat16(rest)
    return high.to(element), middle.to(element), (rest - middle).to(element)


@triton.jit
def dot_parts(a_high, a_middle, a_low, b_high, b_middle, b_low, B_PARTS: tl.constexpr):
    """a @ b without the products below 2⁻²⁴ of the largest, summed from zero."""
    total = tl.dot(a_low, b_high, input_precision="ieee")
    if B_PARTS == 3:
        total = tl.dot(a_high, b_low, total, input_precision="ieee")
        total = tl.dot(a_middle, b_middle, total, input_precision="ieee")
    total = tl.dot(a_middle, b_high, total, input_precision="ieee")
    if B_PARTS == 3:
        total = tl.dot(a_high, b_middle, total, input_precision="ieee")
    return tl.dot(a_high, b_high, total, input_precision="ieee")


@triton.jit
def fused_kernel(
    t_ptr,  # (B,) float64
    half_k_ptr,  # (1,) float64
    header_ptr,  # (5,) float64
    squares_ptr,  # (B,) float64 ‖x'‖²
    shared_ptr,  # (B,) float64: what the products x'·y_j of a query all lack
    x_ptr,  # (3, B, width)
    y_ptr,  # (Y_PARTS, N, width)
    norms_ptr,  # (N,) float32
    list_ptr,  # (splits, B, CAP) int32
    counts_ptr,  # (splits, B) int32: references listed, beyond CAP without being written
    nearest_ptr,  # (splits, B) int32: where r is the smallest
    least_ptr,  # (splits, B) float32: the smallest r
    mass_ptr,  # (2, splits, B) float64 Σ w of what was not listed, and, about, of what was
    sums_ptr,  # (splits, B, width) float32 Σ w y of what was not listed
    B,
    N,
    width,
    GAUSSIAN: tl.constexpr,
    Y_PARTS: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What every splits-th tile of BLOCK_N references is to BLOCK_M queries: BLOCK_D columns of
    Σ w y, which are all columns or one of two halves. Programs of both halves find the same weights:
    the sum of two products does not depend on their order.
    """
    block, half, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    b = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query = tl.minimum(b, B - 1).to(tl.int64)
    t = tl.load(t_ptr + query)
    offset = load_offset(header_ptr, squares_ptr, shared_ptr, query, t, GAUSSIAN)
    unit, half_k = tl.load(header_ptr), tl.load(half_k_ptr)
    square, half_k_float = unit * unit, half_k.to(tl.float32)
    depth = -(tl.log(tl.cast(N, tl.float64)) + DEPTH).to(tl.float32)
    room = tl.where((b < B) & (b >= half * B), CAP, 0)[:, None]  # one half writes the list
    listed = (split.to(tl.int64) * B + query)[:, None] * CAP

    element = x_ptr.dtype.element_ty
    column = half * BLOCK_D + tl.arange(0, BLOCK_D)
    other = (1 - half) * BLOCK_D + tl.arange(0, BLOCK_D)
    low_x, low_y = tl.cast(B, tl.int64) * width, tl.cast(N, tl.int64) * width
    own_x = query[:, None] * width + column[None, :]
    other_x = query[:, None] * width + other[None, :]

    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    least = tl.full((BLOCK_M,), float("inf"), tl.float32)
    inverse = tl.zeros((BLOCK_M,), tl.float32)
    correction = tl.zeros((BLOCK_M,), tl.float32)
    nearest = tl.zeros((BLOCK_M,), tl.int32)
    count = tl.zeros((BLOCK_M,), tl.int32)
    light = tl.zeros((BLOCK_M,), tl.float64)
    taken = tl.zeros((BLOCK_M,), tl.float64)
    for tile in range(split, tl.cdiv(N, BLOCK_N), splits):
        j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.minimum(j, N - 1).to(tl.int64)[:, None] * width
        mask = (column < width)[None, :]
        x_high, x_middle, x_low = load_parts(x_ptr, own_x, mask, low_x, 3)
        y_high, y_middle, y_low = load_parts(y_ptr, row + column[None, :], mask, low_y, Y_PARTS)
        r = dot_parts(
            x_high, x_middle, x_low, tl.trans(y_high), tl.trans(y_middle), tl.trans(y_low), Y_PARTS
        )
        if HALVES == 2:
            mask = (other < width)[None, :]
            x_high, x_middle, x_low = load_parts(x_ptr, other_x, mask, low_x, 3)
            z_high, z_middle, z_low = load_parts(y_ptr, row + other[None, :], mask, low_y, Y_PARTS)
            r += dot_parts(
                x_high, x_middle, x_low, tl.trans(z_high), tl.trans(z_middle), tl.trans(z_low), Y_PARTS
            )
        norms = tl.load(norms_ptr + j, mask=j < N, other=float("inf"))
        r = norms[None, :] - 2 * r

        lowest = tl.min(r, 1)
        moved = lowest < least
        if tl.max(moved.to(tl.int32), 0) > 0:
            at = tl.min(tl.where(r == lowest[:, None], j[None, :], N), 1)
            nearest = tl.where(moved, at, nearest)
            level = (lowest.to(tl.float64) + offset) * square
            before = (least.to(tl.float64) + offset) * square
            factor = tl.exp(relative_logit(before, level, half_k, t, GAUSSIAN))
            factor = tl.where(moved, tl.where(before == float("inf"), 0.0, factor), 1.0)
            light *= factor
            taken *= factor
            accumulator *= factor.to(tl.float32)[:, None]
            least = tl.where(moved, lowest, least)
            if GAUSSIAN:
                exact = square * (0.5 / (t * t))
                correction = (exact / exact.to(tl.float32) - 1).to(tl.float32)
            else:
                exact = square / tl.where(moved, level, before)
                correction = (half_k * (exact / exact.to(tl.float32)) - half_k_float).to(tl.float32)
            inverse = exact.to(tl.float32)

        u = tl.minimum((r - least[:, None]) * inverse[:, None], 1e30)
        logits = logits_float(u, half_k_float, correction[:, None], GAUSSIAN)
        w = tl.where(logits >= depth, tl.exp(logits), 0.0)
        mass = tl.sum(w, 1)
        share = ((light + taken + mass) * HEAVY).to(tl.float32)
        if tl.max((tl.max(w, 1) > share).to(tl.int32), 0) > 0:
            heavy = w > share[:, None]
            slot = count[:, None] + tl.cumsum(heavy.to(tl.int32), 1) - 1
            index = j[None, :] + tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
            tl.store(list_ptr + listed + slot, index, mask=heavy & (slot < room))
            count += tl.sum(heavy.to(tl.int32), 1)
            taken += tl.sum(tl.where(heavy, w, 0.0), 1)
            w = tl.where(heavy, 0.0, w)
            mass = tl.sum(w, 1)
        light += mass
        if tl.max(mass, 0) > 0:
            w_high, w_middle, w_low = split_parts(w, element)
            accumulator += dot_parts(w_high, w_middle, w_low, y_high, y_middle, y_low, Y_PARTS)

    to = split.to(tl.int64) * B + b
    inside = (b < B) & (b >= half * B)
    tl.store(counts_ptr + to, count, mask=inside)
    tl.store(nearest_ptr + to, nearest, mask=inside)
    tl.store(least_ptr + to, least, mask=inside)
    tl.store(mass_ptr + to, light, mask=inside)
    tl.store(mass_ptr + splits.to(tl.int64) * B + to, taken, mask=inside)
    to = to[:, None] * width + column[None, :]
    tl.store(sums_ptr + to, accumulator, mask=(b < B)[:, None] & (column < width)[None, :])


@triton.jit
def finish_kernel(
    x_ptr,  # (B, d)
    t_ptr,  # (B,) float64
    half_k_ptr,  # (1,) float64
    values_ptr,  # (N, d)
    table_ptr,  # (256,) float32, for CODES
    header_ptr,  # (5,) float64
    origin_ptr,  # (d,) float64
    squares_ptr,  # (B,) float64 ‖x'‖²
    shared_ptr,  # (B,) float64
    list_ptr,  # these and all below to sums_ptr: see fused_kernel
    counts_ptr,
    nearest_ptr,
    least_ptr,
    mass_ptr,
    sums_ptr,
    displacement_ptr,  # (B, d) float64
    log_mass_ptr,  # (B,) float64
    anchor_ptr,  # (B,) int64
    anchor_log_weight_ptr,  # (B,) float64
    left_ptr,  # (B,) int8: whether the query is left to others
    N,
    d,
    width,
    splits,
    CODES: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merges the splits of one query, adds what was listed, and writes the result where it is
    certain to be precise enough.
    """
    b = tl.program_id(0).to(tl.int64)
    B = tl.num_programs(0).to(tl.int64)
    tl.store(left_ptr + b, tl.full((), 1, tl.int8))
    t, half_k = tl.load(t_ptr + b), tl.load(half_k_ptr)
    offset = load_offset(header_ptr, squares_ptr, shared_ptr, b, t, GAUSSIAN)
    unit, deviation = tl.load(header_ptr), tl.load(header_ptr + 1)
    crowded, radius, centre = tl.load(header_ptr + 2), tl.load(header_ptr + 3), tl.load(header_ptr + 4)
    square, offset_t, squared = unit * unit, s_offset(t, GAUSSIAN), tl.load(squares_ptr + b)

    ids = tl.arange(0, SPLITS)
    at = ids * B + b
    least = tl.load(least_ptr + at, mask=ids < splits, other=float("inf"))
    counts = tl.load(counts_ptr + at, mask=ids < splits, other=0)
    smallest = tl.min(least, 0)
    first = tl.min(tl.where(least == smallest, ids, splits - 1), 0)
    anchor = tl.minimum(tl.load(nearest_ptr + first * B + b), N - 1).to(tl.int64)
    base = (smallest.to(tl.float64) + offset) * square

    # The error of r at most, tensor cores rounding twice as far as float32 does.
    length, spread = tl.sqrt(squared), tl.maximum(centre, radius * radius - centre)
    error = 5.960464477539063e-08 * (6 * length * radius + 2 * spread)
    error += 2 * deviation * (length + radius)
    slope = half_k / base
    if GAUSSIAN:
        slope = 0.5 / (t * t)
    error *= slope * square
    fine = (error <= LISTED_BOUND) & (slope * square < 1e30) & (slope * square > 1e-30)
    fine = fine & (squared + offset_t / square < 1e30) & (radius < 1e15) & (crowded == 0)
    fine = fine & (tl.max(counts, 0) <= CAP)
    if fine:
        level = (least.to(tl.float64) + offset) * square
        factor = tl.exp(relative_logit(level, base, half_k, t, GAUSSIAN))
        factor = tl.where(least == float("inf"), 0.0, factor)
        masses = tl.load(mass_ptr + at, mask=ids < splits, other=0.0)
        taken = tl.load(mass_ptr + splits * B + at, mask=ids < splits, other=0.0)
        light = tl.sum(factor * masses, 0)
        column = tl.arange(0, BLOCK_D)
        inside = column < d
        x = tl.load(x_ptr + b * d + column, mask=inside, other=0.0).to(tl.float64)
        origin = tl.load(origin_ptr + column, mask=inside, other=0.0)
        moved = light * (origin - x)
        for start in range(0, splits, GROUP):
            group = start + tl.arange(0, GROUP)
            level = tl.load(least_ptr + group * B + b, mask=group < splits, other=float("inf"))
            scale = (level.to(tl.float64) + offset) * square
            scale = unit * tl.exp(relative_logit(scale, base, half_k, t, GAUSSIAN))
            scale = tl.where(level == float("inf"), 0.0, scale)
            index = (group * B + b)[:, None] * width + column[None, :]
            mask = (group < splits)[:, None] & inside[None, :]
            sums = tl.load(sums_ptr + index, mask=mask, other=0.0).to(tl.float64)
            moved += tl.sum(scale[:, None] * sums, 0)

        # What was listed and still counts.
        total = light
        least_mass = tl.exp(0 * base - DEPTH) / N
        meant = tl.where(factor * taken >= least_mass, counts, 0)
        part = next_tile(meant, ids, -1, SPLITS)
        while part < SPLITS:
            count = tl.sum(tl.where(ids == part, meant, 0), 0)
            start = 0
            while start < count:
                slots = start + tl.arange(0, GROUP)
                live = slots < count
                rows = tl.load(list_ptr + (part * B + b) * CAP + slots, mask=live, other=0)
                mask = live[:, None] & inside[None, :]
                index = rows.to(tl.int64)[:, None] * d + column[None, :]
                y = load_values(values_ptr, table_ptr, index, mask, CODES)
                difference = tl.where(mask, y - x[None, :], 0.0)
                s = tl.sum(difference * difference, 1) + offset_t
                w = tl.where(live, tl.exp(relative_logit(s, base, half_k, t, GAUSSIAN)), 0.0)
                total += tl.sum(w, 0)
                moved += tl.sum(w[:, None] * difference, 0)
                start += GROUP
            part = next_tile(meant, ids, part, SPLITS)

        y = load_values(values_ptr, table_ptr, anchor * d + column, inside, CODES)
        distance = tl.sum(tl.where(inside, (y - x) * (y - x), 0.0), 0)
        anchor_logit = relative_logit(distance + offset_t, base, half_k, t, GAUSSIAN)
        log_mass = logit_of(base, half_k, t, GAUSSIAN) + tl.log(total)
        moved /= total
        size = tl.sqrt(distance + tl.sum(moved * moved, 0))
        # A sum of the light must resolve the displacement.
        fine = (error * light <= LOGIT_BOUND * total) & (unit * radius * light <= 4 * size * total)
        fine = fine & ((tl.abs(anchor_logit) <= ANCHOR_BOUND) | (total * HEAVY <= 1))
        if fine & (tl.abs(log_mass) < float("inf")):
            tl.store(displacement_ptr + b * d + column, moved, mask=inside)
            tl.store(log_mass_ptr + b, log_mass)
            tl.store(anchor_ptr + b, anchor)
            tl.store(anchor_log_weight_ptr + b, anchor_logit - tl.log(total))
            tl.store(left_ptr + b, tl.full((), 0, tl.int8))


def fused_forward(
    call: Call, operands: Operands, out: tuple[Tensor, Tensor, Tensor, Tensor]
) -> Tensor:
    """Writes displacement, log_mass, anchor and its log weight of the queries that this is precise
    enough for. Returns which are left, (B,) int8.
    """
    device, B = call.x.device, call.B
    inverse_unit = 1 / operands.header[:1]
    parts, squares, shared = split(
        call.x, call.table, operands.origin, inverse_unit, 3, operands.mean
    )
    width = parts.shape[2]
    sizes = blocks(f"fused {width}", device)
    halves = triton.cdiv(width, sizes["BLOCK_D"])
    assert halves <= 2
    query_blocks, tiles = triton.cdiv(B, sizes["BLOCK_M"]), triton.cdiv(call.N, sizes["BLOCK_N"])
    splits = triton.cdiv(2 * multiprocessors(device), query_blocks * halves)
    splits = min(splits, triton.cdiv(tiles, FEWEST_TILES))

    state = (
        torch.empty(splits, B, CAP.value, dtype=torch.int32, device=device),
        torch.empty(splits, B, dtype=torch.int32, device=device),
        torch.empty(splits, B, dtype=torch.int32, device=device),
        torch.empty(splits, B, dtype=torch.float32, device=device),
        torch.empty(2, splits, B, dtype=torch.float64, device=device),
        torch.empty(splits, B, width, dtype=torch.float32, device=device),
    )
    fused_kernel[query_blocks, halves, splits](
        call.t,
        call.half_k,
        operands.header,
        squares,
        shared,
        parts,
        operands.parts,
        operands.norms,
        *state,
        B,
        call.N,
        width,
        GAUSSIAN=call.gaussian,
        Y_PARTS=len(operands.parts),
        HALVES=halves,
        **sizes,
    )
    left = torch.empty(B, dtype=torch.int8, device=device)
    finish_kernel[B,](
        call.x,
        call.t,
        call.half_k,
        call.values,
        call.table,
        operands.header,
        operands.origin,
        squares,
        shared,
        *state,
        *out,
        left,
        call.N,
        call.d,
        width,
        splits,
        CODES=call.codes,
        GAUSSIAN=call.gaussian,
        SPLITS=triton.next_power_of_2(splits),
        GROUP=blocks("exact", device)["GROUP"],
        BLOCK_D=triton.next_power_of_2(call.d),
    )
    return left
