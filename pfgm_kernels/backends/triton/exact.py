# SPDX-License-Identifier: Apache-2.0
"""Direct differences in float64: float64 input, whatever float32 is not certified for, and the few
references that hold much of a query's weight.

A query's `limit` says which references are meant: those whose r (route.py) is at most that; all of
them where it is NaN, none where it is −∞. Each step is a grid of its own:

    distances     ‖x − x0_j‖² of the references meant, and for the backward pass g·(x0_j − x)
    weigh         w_j relative to an anchor, and what sums of them give
    coefficients  c_j, and for the gradient of x0 the weights
    gather        Σ_j w_j (x0_j − x)
    references    Σ_b w_bj g_b + 2 c_bj (x_b − x0_j)

They are kept for tiles of TILE references. In a tile of which some references are meant the others
are at ∞; a tile of which none is, where `counts` is 0, is neither written nor read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pfgm_kernels.backends.triton.launch import Kernel
from pfgm_kernels.backends.triton.maths import (
    as_double,
    load_values,
    logit_of,
    pitch,
    place,
    relative_logit,
    s_offset,
)

SCAN = tl.constexpr(128)  # tiles that are looked at together


@triton.jit
def next_tile(counts_ptr, first, tiles):
    """The first tile from `first` on that has a count; `tiles` where there is none."""
    first, found = tl.cast(first, tl.int32), tl.cast(tiles, tl.int32)
    while (found == tiles) & (first < tiles):
        ids = first + tl.arange(0, SCAN)
        counts = tl.load(counts_ptr + ids, mask=ids < tiles, other=0)
        found = tl.min(tl.where(counts > 0, ids, tiles), 0)
        first += SCAN
    return found


@triton.jit
def sum_tiles(sums_ptr, b, tiles):
    """Σ over the tiles of a row of sums (rows, tiles), in float64."""
    total = tl.zeros((SCAN,), tl.float64)
    for first in range(0, tiles, SCAN):
        ids = first + tl.arange(0, SCAN)
        total += tl.load(sums_ptr + b * tiles + ids, mask=ids < tiles, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def summed_factor(header_ptr, base, half_k, t, GAUSSIAN: tl.constexpr):
    """c_j over what weights_kernel (route.py) has in its place."""
    if GAUSSIAN:
        return tl.load(header_ptr) * (0.5 / (t * t))
    else:
        return tl.load(header_ptr) * (half_k / (base + t * t))


@triton.jit
def is_meant(r_ptr, limit, ranges_ptr, b, j, N, SELECT: tl.constexpr, RANGED: tl.constexpr):
    """Which references j of a query are."""
    meant = j < tl.where(limit == -float("inf"), 0, N)
    if RANGED:
        meant = meant & (j >= tl.load(ranges_ptr + 2 * b)) & (j < tl.load(ranges_ptr + 2 * b + 1))
    if SELECT:
        r = tl.load(r_ptr + b * pitch(N) + j, mask=meant, other=0.0)
        meant = meant & ((r > limit) == 0)  # which NaN does not leave out
    return meant


@triton.jit
def members(chosen, rank, j, slots):
    """The values of j that are chosen, of the ranks `slots`; 0 beyond the last."""
    hit = (rank[None, :] == slots[:, None]) & chosen[None, :]
    return tl.max(tl.where(hit, j[None, :], 0), 1).to(tl.int64)


@Kernel
def distances_kernel(
    x_ptr,  # (B, d)
    t_ptr,  # (B,) float64
    g_ptr,  # (B, d) float64, for PROJECT
    values_ptr,  # (N, d)
    table_ptr,  # (256,) float32, for CODES
    r_ptr,  # (B, pitch) float32, for SELECT
    limit_ptr,  # (B,) float32
    ranges_ptr,  # (B, 2) int64, for RANGED: the only references that are meant
    squares_ptr,  # (B, N) float64
    projection_ptr,  # (B, N) float64, for PROJECT
    counts_ptr,  # (B, tiles) int32
    B,
    N,
    d,
    CODES: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    SELECT: tl.constexpr,
    PROJECT: tl.constexpr,
    RANGED: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """‖x − x0_j‖² of one query and TILES tiles, of which those without references meant cost what
    it takes to see that. References meant are taken GROUP at a time: the work follows their number.
    """
    query, first_tiles = place(B)
    b, tiles = query.to(tl.int64), tl.cdiv(N, TILE)
    limit = tl.load(limit_ptr + b)
    ids = first_tiles * TILES + tl.arange(0, TILES)
    each = ids[:, None] * TILE + tl.arange(0, TILE)[None, :]
    all_meant = is_meant(r_ptr, limit, ranges_ptr, b, each, N, SELECT, RANGED)
    counts = tl.sum(all_meant.to(tl.int32), 1)
    tl.store(counts_ptr + b * tiles + ids, counts, mask=ids < tiles)
    tile = tl.min(tl.where(counts > 0, ids, tiles), 0)
    while tile < tiles:
        count = tl.sum(tl.where(ids == tile, counts, 0), 0)
        j = tile * TILE + tl.arange(0, TILE)
        meant = is_meant(r_ptr, limit, ranges_ptr, b, j, N, SELECT, RANGED)
        tl.store(squares_ptr + b * N + j, float("inf"), mask=(j < N) & (meant == 0))
        offset = s_offset(tl.load(t_ptr + b), GAUSSIAN)
        rank = tl.cumsum(meant.to(tl.int32), 0) - 1
        start = 0
        while start < count:
            slots = start + tl.arange(0, GROUP)
            rows = members(meant, rank, j, slots)
            square = tl.zeros((GROUP,), tl.float64)
            projection = tl.zeros((GROUP,), tl.float64)
            for first in range(0, d, BLOCK_D):
                column = first + tl.arange(0, BLOCK_D)
                inside = column < d
                mask = (slots < count)[:, None] & inside[None, :]
                index = rows[:, None] * d + column[None, :]
                x = tl.load(x_ptr + b * d + column, mask=inside, other=0.0).to(tl.float64)
                y = load_values(values_ptr, table_ptr, index, mask, CODES)
                difference = tl.where(mask, y - x[None, :], 0.0)
                square += tl.sum(difference * difference, 1)
                if PROJECT:
                    g = tl.load(g_ptr + b * d + column, mask=inside, other=0.0)
                    projection += tl.sum(difference * g[None, :], 1)
            s = square + offset
            square += s - s  # NaN where s is infinite: it must not pass for a small weight
            tl.store(squares_ptr + b * N + rows, square, mask=slots < count)
            if PROJECT:
                tl.store(projection_ptr + b * N + rows, projection, mask=slots < count)
            start += GROUP
        tile = tl.min(tl.where((counts > 0) & (ids > tile), ids, tiles), 0)


@Kernel
def weigh_kernel(
    t_ptr,  # (B,) float64
    half_k,
    limit_ptr,  # (B,) float32
    counts_ptr,  # (B, tiles) int32
    squares_ptr,  # (B, N) float64; becomes the weights
    cut_ptr,  # (B,) float32, for SUMMED: −∞ where products summed no other references
    base_ptr,  # (B,) float64, for SUMMED: ‖x − x0_a‖² of queries with a cut
    sums_ptr,  # (B, dense_tiles) float32, for SUMMED: the weights of those others
    anchor_ptr,  # (B,) int64
    total_ptr,  # (B,) float64
    log_mass_ptr,  # (B,) float64
    anchor_log_weight_ptr,  # (B,) float64
    N,
    tiles,
    dense_tiles,
    GAUSSIAN: tl.constexpr,
    SUMMED: tl.constexpr,
    TILE: tl.constexpr,
):
    """w_j relative to the anchor's in place of ‖x − x0_j‖², and log_mass, for one query. The anchor
    is the nearest reference, except of queries with a cut.
    """
    b = tl.program_id(0).to(tl.int64)
    if tl.load(limit_ptr + b) == -float("inf"):
        return
    t, half_k = tl.load(t_ptr + b), as_double(half_k)
    anchor = tl.full((), 0, tl.int64)
    base = tl.full((), float("inf"), tl.float64)
    total = tl.full((), 0, tl.float64)
    chosen = False
    if SUMMED:
        chosen = tl.load(cut_ptr + b) != -float("inf")
        if chosen:
            base, anchor = tl.load(base_ptr + b), tl.load(anchor_ptr + b)
            total = sum_tiles(sums_ptr, b, dense_tiles)
    counts_ptr += b * tiles
    if not chosen:
        tile = next_tile(counts_ptr, 0, tiles)
        while tile < tiles:
            j = tile * TILE + tl.arange(0, TILE)
            squares = tl.load(squares_ptr + b * N + j, mask=j < N, other=float("inf"))
            nearest = tl.min(squares, 0)
            if nearest < base:
                base = nearest
                anchor = tl.min(tl.where(squares == nearest, j, N), 0).to(tl.int64)
            tile = next_tile(counts_ptr, tile + 1, tiles)
    tile = next_tile(counts_ptr, 0, tiles)
    while tile < tiles:
        j = tile * TILE + tl.arange(0, TILE)
        squares = tl.load(squares_ptr + b * N + j, mask=j < N, other=float("inf"))
        logit = relative_logit(squares, base, half_k, t, GAUSSIAN)
        weights = tl.where(squares == float("inf"), 0.0, tl.exp(logit))
        total += tl.sum(weights, 0)
        tl.store(squares_ptr + b * N + j, weights, mask=j < N)
        tile = next_tile(counts_ptr, tile + 1, tiles)
    tl.store(anchor_ptr + b, anchor)
    tl.store(total_ptr + b, total)
    tl.store(log_mass_ptr + b, logit_of(base, half_k, t, GAUSSIAN) + tl.log(total))
    tl.store(anchor_log_weight_ptr + b, -tl.log(total))


@Kernel
def coefficients_kernel(
    t_ptr,  # (B,) float64
    half_k,
    limit_ptr,  # (B,) float32
    counts_ptr,  # (B, tiles) int32
    squares_ptr,  # (B, N) float64; becomes the weights
    projection_ptr,  # (B, N) float64 g·(x0_j − x); becomes c_j
    base_ptr,  # (B,) float64, squared distance of the anchor
    log_weight_ptr,  # (B,) float64, log w of the anchor
    g_m_ptr,  # (B,) float64
    product_ptr,  # (B,) float64, g·v
    header_ptr,  # (7,) float64, for SUMMED
    cut_ptr,  # (B,) float32, for SUMMED: −∞ where products summed no other references
    sums_ptr,  # (2, B, dense_tiles) float32, for SUMMED: Σ c and Σ c u of those, over a factor
    dt_ptr,  # (B,) float64
    B,
    N,
    tiles,
    dense_tiles,
    GAUSSIAN: tl.constexpr,
    SUMMED: tl.constexpr,
    TILE: tl.constexpr,
):
    """c_j = (k/2) w_j (a_j + g_m)/s_j in place of the projections of one query, w_j in place of
    q_j = ‖x − x0_j‖², and adds to dt −2t Σ_j c_j (Gaussian: c_j = w_j (a_j + g_m)/(2t²) and (2/t)
    Σ_j c_j q_j).
    """
    b = tl.program_id(0).to(tl.int64)
    if tl.load(limit_ptr + b) == -float("inf"):
        return
    t, half_k = tl.load(t_ptr + b), as_double(half_k)
    base, log_weight = tl.load(base_ptr + b), tl.load(log_weight_ptr + b)
    constant = tl.load(g_m_ptr + b) - tl.load(product_ptr + b)
    counts_ptr += b * tiles
    dt = tl.load(dt_ptr + b)
    if SUMMED:
        if tl.load(cut_ptr + b) != -float("inf"):
            factor = summed_factor(header_ptr, base, half_k, t, GAUSSIAN)
            rest = sum_tiles(sums_ptr, b, dense_tiles)
            if GAUSSIAN:
                moment = sum_tiles(sums_ptr, b + B, dense_tiles)
                dt += (2 / t) * factor * (base * rest + 2 * t * t * moment)
            else:
                dt -= 2 * t * factor * rest
    tile = next_tile(counts_ptr, 0, tiles)
    while tile < tiles:
        j = tile * TILE + tl.arange(0, TILE)
        squares = tl.load(squares_ptr + b * N + j, mask=j < N, other=float("inf"))
        a = tl.load(projection_ptr + b * N + j, mask=squares < float("inf"), other=0.0) + constant
        weights = tl.exp(relative_logit(squares, base, half_k, t, GAUSSIAN) + log_weight)
        weights = tl.where(squares == float("inf"), 0.0, weights)
        if GAUSSIAN:
            c = weights * a * (0.5 / (t * t))
            dt += tl.sum(tl.where(weights == 0, 0.0, c * squares), 0) * 2 / t
        else:
            s = squares + t * t
            weights = tl.where(base + t * t == 0, 0.0, weights)  # singular: zero gradients
            c = tl.where(weights == 0, 0.0, weights * a * half_k / tl.where(s == 0, 1.0, s))
            dt -= 2 * t * tl.sum(c, 0)
        tl.store(squares_ptr + b * N + j, weights, mask=j < N)
        tl.store(projection_ptr + b * N + j, c, mask=j < N)
        tile = next_tile(counts_ptr, tile + 1, tiles)
    tl.store(dt_ptr + b, dt)


@Kernel
def gather_kernel(
    x_ptr,  # (B, d)
    values_ptr,  # (N, d)
    table_ptr,  # (256,) float32, for CODES
    limit_ptr,  # (B,) float32
    counts_ptr,  # (B, tiles) int32
    weights_ptr,  # (B, N) float64
    total_ptr,  # (B,) float64, but for BACKWARD
    out_ptr,  # (B, d) float64
    N,
    d,
    tiles,
    CODES: tl.constexpr,
    BACKWARD: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Σ_j w_j (x0_j − x) / total of one query over BLOCK_D columns; for BACKWARD adds twice the
    sum. Only references with weight are read.
    """
    b = tl.program_id(0).to(tl.int64)
    if tl.load(limit_ptr + b) == -float("inf"):
        return
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    x = tl.load(x_ptr + b * d + column, mask=inside, other=0.0).to(tl.float64)
    counts_ptr += b * tiles
    accumulator = tl.zeros((BLOCK_D,), tl.float64)
    tile = next_tile(counts_ptr, 0, tiles)
    while tile < tiles:
        j = tile * TILE + tl.arange(0, TILE)
        weights = tl.load(weights_ptr + b * N + j, mask=j < N, other=0.0)
        heavy = weights != 0
        rank = tl.cumsum(heavy.to(tl.int32), 0) - 1
        count = tl.sum(heavy.to(tl.int32), 0)
        start = 0
        while start < count:
            slots = start + tl.arange(0, GROUP)
            rows = members(heavy, rank, j, slots)
            mask = (slots < count)[:, None] & inside[None, :]
            index = rows[:, None] * d + column[None, :]
            y = load_values(values_ptr, table_ptr, index, mask, CODES)
            w = tl.load(weights_ptr + b * N + rows, mask=slots < count, other=0.0)
            term = tl.where(mask, w[:, None] * (y - x[None, :]), 0.0)
            accumulator += tl.sum(term, 0)
            start += GROUP
        tile = next_tile(counts_ptr, tile + 1, tiles)
    out_ptr += b * d + column
    if BACKWARD:
        accumulator = tl.load(out_ptr, mask=inside, other=0.0) + 2 * accumulator
    else:
        accumulator /= tl.load(total_ptr + b)
    tl.store(out_ptr, accumulator, mask=inside)


@Kernel
def references_kernel(
    x_ptr,  # (B, d)
    g_ptr,  # (B, d) float64
    values_ptr,  # (N, d) floats
    weights_ptr,  # (B, N) float64
    c_ptr,  # (B, N) float64
    out_ptr,  # (N, d)
    B,
    N,
    d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx0_j = Σ_b w_bj g_b + 2 c_bj (x_b − x0_j) over BLOCK_N references and BLOCK_D columns."""
    j = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (j < N)[:, None] & (column < d)[None, :]
    y = tl.load(values_ptr + j[:, None] * d + column[None, :], mask=mask, other=0.0).to(tl.float64)
    accumulator = tl.zeros((BLOCK_N, BLOCK_D), tl.float64)
    for b in range(0, B):
        row = tl.cast(b, tl.int64)
        weights = tl.load(weights_ptr + row * N + j, mask=j < N, other=0.0)
        if tl.sum((weights != 0).to(tl.int32), 0) > 0:
            c = tl.load(c_ptr + row * N + j, mask=j < N, other=0.0)
            x = tl.load(x_ptr + row * d + column, mask=column < d, other=0.0).to(tl.float64)
            g = tl.load(g_ptr + row * d + column, mask=column < d, other=0.0)
            accumulator += weights[:, None] * g[None, :] + 2 * c[:, None] * (x[None, :] - y)
    tl.store(out_ptr + j[:, None] * d + column[None, :], accumulator, mask=mask)
