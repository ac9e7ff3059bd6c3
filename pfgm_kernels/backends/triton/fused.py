# SPDX-License-Identifier: Apache-2.0
"""Displacement and log mass, Eqs. (3) and (12), for 32 < d ≤ 128 in one pass over the
references, with nothing of size B · N in memory. With r_j and the offset of a query from

    ‖x − x0_j‖² / unit² = r_j + offset,   r_j = ‖y_j‖² − centre − 2 x'·y_j   (operands.py)

weights are relative to the smallest r so far, m:

    w_j = exp(−(k/2) log1p(unit² (r_j − m)/s_m))       (Gaussian: exp(−unit² (r_j − m)/(2t²)))

When m moves, what was summed is rescaled. s_m = unit² (m + offset) + t² need not be the s of
any reference exactly: it is what all logits refer to. References that hold much of the weight are
listed, left out of the product Σ w y, and taken by direct differences in float64 once m is known.

Three bfloat16 parts hold the 24 bits of a float32, six products of them, the small ones first, are
as precise as one of float32. Queries for which this is not enough are left to the two passes.

A block of queries and its sums stay in registers. Those do not hold more than 128 columns: halves
of the columns would each need all products with the references again, and two passes cost less.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pfgm_kernels.backends.triton.call import Call
from pfgm_kernels.backends.triton.configurations import blocks, multiprocessors
from pfgm_kernels.backends.triton.fused_errors import (
    MOST_OFF,
    error_of_r,
    largest_share,
    precise_enough,
)
from pfgm_kernels.backends.triton.fused_products import (
    dot_parts,
    dot_slices,
    load_slices,
    split_parts,
)
from pfgm_kernels.backends.triton.launch import Kernel
from pfgm_kernels.backends.triton.maths import (
    as_double,
    load_values,
    log_count,
    logit_of,
    logits_float,
    relative_logit,
    s_offset,
)
from pfgm_kernels.backends.triton.operands import Operands, Split, split
from pfgm_kernels.backends.triton.route import DEPTH

CAP = tl.constexpr(128)  # references that may be listed for a query in each split
ROUNDS = tl.constexpr(4)  # and in each tile
FEWEST_TILES = 4  # in a split


@triton.jit
def load_offset(header_ptr, squares_ptr, shared_ptr, index):
    """‖x − x0_j‖² / unit² − r_j of queries."""
    squared, shared = tl.load(squares_ptr + index), tl.load(shared_ptr + index)
    return squared + tl.load(header_ptr + 4) - 2 * shared


@Kernel
def fused_kernel(
    t_ptr,  # (B,) float64
    half_k,
    header_ptr,  # (7,) float64
    squares_ptr,  # (B,) float64 ‖x'‖²
    shared_ptr,  # (B,) float64: what the products x'·y_j of a query all lack
    x_ptr,  # (3, B, width)
    y_ptr,  # (Y_PARTS, N, width), parts y_plane apart
    norms_ptr,  # (N,) float64
    list_ptr,  # (splits, B, CAP) int32
    counts_ptr,  # (splits, B) int32: references listed, beyond CAP without being written
    nearest_ptr,  # (splits, B) int32: where r is the smallest
    least_ptr,  # (splits, B) float32: the smallest r
    mass_ptr,  # (2, splits, B) float64 Σ w of what was not listed and, about, of what was
    sums_ptr,  # (splits, B, width) float32 Σ w y of what was not listed
    B,
    N,
    y_plane,
    GAUSSIAN: tl.constexpr,
    Y_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
):
    """What every splits-th tile of BLOCK_N references is to BLOCK_M queries. The columns are SLICES
    slices, each of which is multiplied and summed on its own.
    """
    block, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = tl.arange(0, BLOCK_M)
    b = block * BLOCK_M + row
    query = tl.minimum(b, B - 1)
    unit, half_k = tl.load(header_ptr), as_double(half_k)
    half_k_float = half_k.to(tl.float32)
    depth = -(log_count(N) + DEPTH).to(tl.float32)
    t = tl.load(t_ptr + query)
    error = (half_k * error_of_r(header_ptr, tl.load(squares_ptr + query))).to(tl.float32)
    if GAUSSIAN:
        offset = unit * unit * (0.5 / (t * t))  # in place of what is not needed
    else:
        offset = load_offset(header_ptr, squares_ptr, shared_ptr, query) + t * t / (unit * unit)
    first_b = split.to(tl.int64) * B + block * BLOCK_M
    inside = b < B

    width = tl.cast(SLICE * SLICES, tl.int64)
    sums = tl.tuple([])
    for _ in tl.static_range(SLICES):
        sums = sums + (tl.zeros((BLOCK_M, SLICE), tl.float32),)
    least = tl.full((BLOCK_M,), float("inf"), tl.float32)
    inverse = tl.zeros((BLOCK_M,), tl.float32)
    correction = tl.zeros((BLOCK_M,), tl.float32)
    nearest = tl.zeros((BLOCK_M,), tl.int32)
    count = tl.zeros((BLOCK_M,), tl.int32)
    light = tl.zeros((BLOCK_M,), tl.float64)
    taken = tl.zeros((BLOCK_M,), tl.float32)
    first_x = x_ptr + block * BLOCK_M * width
    x = load_slices(first_x, B * width, B - block * BLOCK_M, 3, BLOCK_M, SLICE, SLICES)
    for tile in range(split, tl.cdiv(N, BLOCK_N), splits):
        j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        first_y = y_ptr + tile * BLOCK_N * width
        rest = N - tile * BLOCK_N
        y = load_slices(first_y, y_plane, rest, Y_PARTS, BLOCK_N, SLICE, SLICES)
        r = dot_slices(x, y, Y_PARTS, SLICES)
        norms = tl.load(norms_ptr + j, mask=j < N, other=float("inf")).to(tl.float32)
        r = norms[None, :] - 2 * r

        lowest = tl.min(r, 1)
        moved = lowest < least
        if tl.max(moved.to(tl.int32), 0) > 0:
            at = tl.min(tl.where(r == lowest[:, None], j[None, :], N), 1)
            nearest = tl.where(moved, at, nearest)
            before, least = least, tl.minimum(least, lowest)
            exact = offset
            if not GAUSSIAN:
                exact = 1 / (least.to(tl.float64) + offset)
            inverse = exact.to(tl.float32)
            correction = (half_k * (exact / inverse) - half_k_float).to(tl.float32)
            u = tl.minimum((before - least) * inverse, 1e30)
            factor = tl.exp(logits_float(u, half_k_float, correction, GAUSSIAN))
            light *= factor.to(tl.float64)
            taken *= factor
            scaled = tl.tuple([])
            for c in tl.static_range(SLICES):
                scaled = scaled + (sums[c] * factor[:, None],)
            sums = scaled

        u = tl.minimum((r - least[:, None]) * inverse[:, None], 1e30)
        logits = logits_float(u, half_k_float, correction[:, None], GAUSSIAN)
        w = tl.where(logits >= depth, tl.exp(logits), 0.0)
        share = largest_share(error * inverse)
        limit = share * (light.to(tl.float32) + taken + tl.sum(w, 1))
        heaviest = tl.max(w, 1)
        if tl.max((heaviest > limit).to(tl.int32), 0) > 0:
            for _ in tl.static_range(ROUNDS):
                heavy = heaviest > limit
                at = tl.min(tl.where(w == heaviest[:, None], j[None, :], N), 1)
                mask = heavy & inside & (count < CAP)
                tl.store(list_ptr + first_b * CAP + row * CAP + count, at, mask=mask)
                count += heavy.to(tl.int32)
                taken += tl.where(heavy, heaviest, 0.0)
                w = tl.where((j[None, :] == at[:, None]) & heavy[:, None], 0.0, w)
                heaviest = tl.max(w, 1)
            count += tl.where(heaviest > limit, CAP + 1, 0)
            count = tl.minimum(count, CAP + 1)  # which would not hold the sum of all tiles'
        light += tl.sum(w, 1)
        if tl.max(heaviest, 0) > 0:
            weights = split_parts(w, x_ptr.dtype.element_ty)
            added = tl.tuple([])
            for c in tl.static_range(SLICES):
                part = dot_parts(weights, y[c][0], y[c][1], y[c][2], Y_PARTS)
                added = added + (sums[c] + part,)
            sums = added

    stride = splits.to(tl.int64) * B
    tl.store(counts_ptr + first_b + row, count, mask=inside)
    tl.store(nearest_ptr + first_b + row, nearest, mask=inside)
    tl.store(least_ptr + first_b + row, least, mask=inside)
    tl.store(mass_ptr + first_b + row, light, mask=inside)
    tl.store(mass_ptr + stride + first_b + row, taken.to(tl.float64), mask=inside)
    for c in tl.static_range(SLICES):
        column = c * SLICE + tl.arange(0, SLICE)
        to = sums_ptr + first_b * width + row[:, None] * (SLICE * SLICES) + column[None, :]
        tl.store(to, sums[c], mask=inside[:, None])


@Kernel
def finish_kernel(
    x_ptr,  # (B, d)
    t_ptr,  # (B,) float64
    half_k,
    values_ptr,  # (N, d)
    table_ptr,  # (256,) float32, for CODES
    header_ptr,  # (7,) float64
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
    t, half_k = tl.load(t_ptr + b), as_double(half_k)
    offset = load_offset(header_ptr, squares_ptr, shared_ptr, b)
    unit, crowded, radius = tl.load(header_ptr), tl.load(header_ptr + 2), tl.load(header_ptr + 3)
    square, offset_t, squared = unit * unit, s_offset(t, GAUSSIAN), tl.load(squares_ptr + b)

    ids = tl.arange(0, SPLITS)
    at = ids * B + b
    least = tl.load(least_ptr + at, mask=ids < splits, other=float("inf"))
    counts = tl.load(counts_ptr + at, mask=ids < splits, other=0)
    smallest = tl.min(least, 0)
    first = tl.min(tl.where(least == smallest, ids, splits - 1), 0)
    anchor = tl.load(nearest_ptr + first * B + b).to(tl.int64)
    base = (smallest.to(tl.float64) + offset) * square

    slope = half_k * square / (base + offset_t)
    if GAUSSIAN:
        slope = square * (0.5 / (t * t))
    error = slope * error_of_r(header_ptr, squared)
    fine = (error <= MOST_OFF) & (slope < 1e30) & (slope > 1e-30)
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
            lowest = tl.load(least_ptr + group * B + b, mask=group < splits, other=float("inf"))
            scale = (lowest.to(tl.float64) + offset) * square
            scale = unit * tl.exp(relative_logit(scale, base, half_k, t, GAUSSIAN))
            scale = tl.where(lowest == float("inf"), 0.0, scale)
            index = (group * B + b)[:, None] * width + column[None, :]
            mask = (group < splits)[:, None] & inside[None, :]
            sums = tl.load(sums_ptr + index, mask=mask, other=0.0).to(tl.float64)
            moved += tl.sum(scale[:, None] * sums, 0)
        away = x - origin
        products = tl.sum(away * (moved + light * away), 0) / square  # Σ w x'·y

        # What was listed in splits in which it counts.
        total = light
        meant = tl.where(factor * taken >= tl.exp(-log_count(N) - DEPTH), counts, 0)
        ends = tl.cumsum(meant, 0)
        count = tl.sum(meant, 0)
        start = 0
        while start < count:
            slots = start + tl.arange(0, GROUP)
            part = tl.sum((ends[None, :] <= slots[:, None]).to(tl.int32), 1)
            begin = tl.max(tl.where(ends[None, :] <= slots[:, None], ends[None, :], 0), 1)
            live = slots < count
            rows = tl.load(list_ptr + (part * B + b) * CAP + slots - begin, mask=live, other=0)
            mask = live[:, None] & inside[None, :]
            index = rows.to(tl.int64)[:, None] * d + column[None, :]
            y = load_values(values_ptr, table_ptr, index, mask, CODES)
            difference = tl.where(mask, y - x[None, :], 0.0)
            distance = tl.sum(difference * difference, 1)
            w = tl.where(live, tl.exp(relative_logit(distance, base, half_k, t, GAUSSIAN)), 0.0)
            total += tl.sum(w, 0)
            moved += tl.sum(w[:, None] * difference, 0)
            start += GROUP

        y = load_values(values_ptr, table_ptr, anchor * d + column, inside, CODES)
        distance = tl.sum(tl.where(inside, (y - x) * (y - x), 0.0), 0)
        anchor_logit = relative_logit(distance, base, half_k, t, GAUSSIAN)
        log_mass = logit_of(base, half_k, t, GAUSSIAN) + tl.log(total)
        moved /= total
        size = tl.sqrt(distance + tl.sum(moved * moved, 0))
        fine = precise_enough(error, light, total, anchor_logit, slope * products)
        # A sum of what is not listed must resolve the displacement.
        fine = fine & (unit * radius * light <= 4 * size * total)
        if fine & (tl.abs(log_mass) < float("inf")):
            tl.store(displacement_ptr + b * d + column, moved, mask=inside)
            tl.store(log_mass_ptr + b, log_mass)
            tl.store(anchor_ptr + b, anchor)
            tl.store(anchor_log_weight_ptr + b, anchor_logit - tl.log(total))
            tl.store(left_ptr + b, tl.full((), 0, tl.int8))


def fused_forward(
    call: Call, operands: Operands, out: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Split, Tensor]:
    """Writes displacement, log_mass, anchor and its log weight of the queries that this is precise
    enough for. Returns what was made of all queries, and which are left, (B,) int8.
    """
    device, B = call.x.device, call.B
    queries = split(call.x, call.table, operands, 3, 3)
    parts, squares, shared = queries.parts, queries.norms, queries.marks[1]
    width = parts.shape[2]
    sizes = blocks(f"fused {width}", device)
    query_blocks, tiles = triton.cdiv(B, sizes["BLOCK_M"]), triton.cdiv(call.N, sizes["BLOCK_N"])
    splits = triton.cdiv(2 * multiprocessors(device), query_blocks)
    splits = min(splits, triton.cdiv(tiles, FEWEST_TILES))

    state = (
        torch.empty(splits, B, CAP.value, dtype=torch.int32, device=device),
        torch.empty(splits, B, dtype=torch.int32, device=device),
        torch.empty(splits, B, dtype=torch.int32, device=device),
        torch.empty(splits, B, dtype=torch.float32, device=device),
        torch.empty(2, splits, B, dtype=torch.float64, device=device),
        torch.empty(splits, B, width, dtype=torch.float32, device=device),
    )
    fused_kernel[query_blocks, splits](
        call.t,
        call.half_k_bits,
        operands.header,
        squares,
        shared,
        parts,
        operands.parts,
        operands.norms,
        *state,
        B,
        call.N,
        operands.parts.stride(0),
        GAUSSIAN=call.gaussian,
        Y_PARTS=len(operands.parts),
        **sizes,
    )
    left = torch.empty(B, dtype=torch.int8, device=device)
    finish_kernel[B,](
        call.x,
        call.t,
        call.half_k_bits,
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
    return queries, left
