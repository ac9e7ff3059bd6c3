# SPDX-License-Identifier: Apache-2.0
"""Which references of a query are taken how. With r_j and the offset of a query from

    ‖x − x0_j‖² / unit² = r_j + offset,   r_j = ‖y_j‖² − centre − 2 x'·y_j   (operands.py)

and r_j known to some error, a reference can carry weight only if r_j ≤ cut. Of those

    r_j ≤ limit           are taken by direct differences in float64 (exact.py),
    limit < r_j ≤ cut     by tensor cores (weights_kernel here, then products.sum_kernel).

Where few references can carry weight, or where the error of r is not certain to be small enough for
weights, limit = cut. Else the limit leaves to direct differences what holds more than 1/64 of the
weight, or less the larger that error is: of the others errors average out. Where float32 does not
hold the squares, or is not finite, limit is NaN: all references.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pfgm_kernels.backends.triton.digits import multiple
from pfgm_kernels.backends.triton.exact import sum_tiles, summed_factor
from pfgm_kernels.backends.triton.launch import Kernel
from pfgm_kernels.backends.triton.maths import (
    as_double,
    load_values,
    log_count,
    logits_float,
    pitch,
    place,
    round_to_bfloat16,
    s_offset,
)

FEW = tl.constexpr(64)  # candidates up to which a query is always finished by direct differences
HEAVY = tl.constexpr(64.0)  # one over the share of the weight that is left to these
LOGIT_ERROR = tl.constexpr(5e-6)  # of a dense sum's logits, root mean square, at that share
MOST_ERROR = tl.constexpr(2e-5)  # at a share (LOGIT_ERROR/MOST_ERROR)² as large
SCAN = tl.constexpr(512)  # tiles that are looked at together
DEPTH = tl.constexpr(16.0)  # weights below exp(−DEPTH)/N of the nearest's are not seen


@triton.jit
def load_within(r_ptr, minima_ptr, first, N, tiles, limit, TILE: tl.constexpr, GROUP: tl.constexpr):
    """r (GROUP, TILE) of a query and GROUP tiles, ∞ in those of which none is within the limit."""
    ids = first + tl.arange(0, GROUP)
    smallest = tl.load(minima_ptr + ids, mask=ids < tiles, other=float("inf"))
    j = ids[:, None] * TILE + tl.arange(0, TILE)[None, :]
    mask = (smallest <= limit)[:, None] & (j < N)
    return tl.load(r_ptr + j, mask=mask, other=float("inf"))


@Kernel
def route_kernel(
    x_ptr,  # (B, d)
    t_ptr,  # (B,) float64
    half_k,
    values_ptr,  # (N, d)
    table_ptr,  # (256,) float32, for CODES
    header_ptr,  # (7,) float64
    squares_ptr,  # (B,) float64 ‖x'‖²
    marks_ptr,  # (3, B) float64: what the products x'·y_j of a query all lack; see split_kernel
    steps_ptr,  # (B,) float64, of the digits of queries
    r_ptr,  # (B, pitch) float32
    minima_ptr,  # (B, tiles) float32
    wanted_ptr,  # (B,) int8: queries that are to be computed here; all of them for ALL
    base_ptr,  # (B,) float64 ‖x − x0_a‖²: for BACKWARD given, else written
    log_weight_ptr,  # (B,) float64 log w of the anchor, for BACKWARD
    anchor_ptr,  # (B,) int64, written but for BACKWARD
    limit_ptr,  # (B,) float32
    cut_ptr,  # (B,) float32, −∞ where there are no references between limit and cut
    scales_ptr,  # (4, B) float32: u = ((r − scales[0]) − scales[1]) scales[2]; see logits_float
    N,
    d,
    tiles,
    CODES: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    BACKWARD: tl.constexpr,
    ALL: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """limit and cut of one query, and what its logits are formed with."""
    b = tl.program_id(0).to(tl.int64)
    B = tl.num_programs(0).to(tl.int64)
    if not ALL:
        if tl.load(wanted_ptr + b) == 0:
            tl.store(limit_ptr + b, -float("inf"))
            tl.store(cut_ptr + b, -float("inf"))
            return
    t, half_k = tl.load(t_ptr + b), as_double(half_k)
    unit, deviation = tl.load(header_ptr), tl.load(header_ptr + 1)
    crowded, radius, centre = (
        tl.load(header_ptr + 2),
        tl.load(header_ptr + 3),
        tl.load(header_ptr + 4),
    )
    square, offset_t = unit * unit, s_offset(t, GAUSSIAN)
    squared = tl.load(squares_ptr + b)
    offset = squared + centre - 2 * tl.load(marks_ptr + b)
    length = tl.sqrt(squared)

    minima_ptr += b * tiles
    nearest, nearest_tile = tl.full((), float("inf"), tl.float32), 0
    for first in range(0, tiles, SCAN):
        ids = first + tl.arange(0, SCAN)
        minima = tl.load(minima_ptr + ids, mask=ids < tiles, other=float("inf"))
        smallest = tl.min(minima, 0)
        if smallest < nearest:
            nearest = smallest
            nearest_tile = tl.min(tl.where(minima == smallest, ids, tiles), 0)
    depth = log_count(N) + DEPTH
    if BACKWARD:
        base = tl.load(base_ptr + b)
        log_weight = tl.load(log_weight_ptr + b)
        depth += log_weight
    else:
        j = nearest_tile * TILE + tl.arange(0, TILE)
        near = tl.load(r_ptr + b * pitch(N) + j, mask=j < N, other=float("inf"))
        anchor = tl.minimum(tl.min(tl.where(near == nearest, j, N), 0), N - 1).to(tl.int64)
        base = 0 * t
        for first in range(0, d, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D)
            inside = column < d
            x = tl.load(x_ptr + b * d + column, mask=inside, other=0.0).to(tl.float64)
            y = load_values(values_ptr, table_ptr, anchor * d + column, inside, CODES)
            base += tl.sum(tl.where(inside, (y - x) * (y - x), 0.0), 0)
        tl.store(anchor_ptr + b, anchor)

    # What digits leave of x' and of y at most, and what products of low digits are: at most, and
    # root mean square, if these are like random ones.
    rest, rest_y = tl.load(marks_ptr + 2 * B + b), tl.load(header_ptr + 5)
    places = tl.load(steps_ptr + b) * tl.load(header_ptr + 6)
    error = rest * radius + rest_y * (length + rest) + places * (d + 2) * 8421376.0
    error += deviation * (radius + length)
    error = 2 * error + 1.2e-7 * radius * (radius + 2 * length)

    # The largest r that can carry weight.
    least = nearest + error + offset
    if BACKWARD:
        least = tl.minimum(base, 1e300) / square
    if GAUSSIAN:
        slope = 0.5 / (t * t)
        more = depth / (slope * square)
    else:
        slope = half_k / (base + offset_t)
        more = (tl.exp(depth / half_k) - 1) * (least + offset_t / square)
    cut = least + more - offset + error
    usable = (squared + offset_t / square < 1e30) & (radius < 1e15) & (cut == cut)
    # The error of r, root mean square, of which what rounds it to float32 is 3.5e-8.
    spread = rest * rest * radius * radius + rest_y * rest_y * squared
    spread = (spread + deviation * deviation * (radius + length) * (radius + length)) / d
    spread += places * places * d * 3.9e12
    rounding = 3.5e-8 * tl.maximum(tl.abs(nearest.to(tl.float64)), tl.abs(cut))
    noise = tl.sqrt(4 * spread + rounding * rounding)
    if not BACKWARD:
        noise = tl.maximum(noise, tl.abs(nearest + offset - base / square))  # the anchor shows one
    limit = tl.where(usable, cut, float("nan")).to(tl.float32)
    limit += tl.abs(limit) * 2e-7  # what rounding it took off
    r_ptr += b * pitch(N)
    found = tl.zeros((GROUP, TILE), tl.int32)
    for first in range(0, tiles, GROUP):
        group = load_within(r_ptr, minima_ptr, first, N, tiles, limit, TILE, GROUP)
        found += (group <= limit).to(tl.int32)
    count = tl.sum(tl.sum(found, 1), 0)

    distance = tl.sqrt(base)
    share = 64.0 if BACKWARD else 4.0
    logit_error = slope * square * noise
    dense = usable & (count > FEW) & (logit_error <= MOST_ERROR) & (crowded == 0)
    # The data's width must not hide the displacement, nor what y leaves of a reference.
    dense = dense & (distance >= unit * tl.maximum(radius / share, deviation * 1e6))
    cut_float = tl.full((), -float("inf"), tl.float32)
    if dense:
        exact = slope * square / half_k
        if GAUSSIAN:
            exact = slope * square
        inverse = exact.to(tl.float32)
        origin = base / square - offset
        origin_high = origin.to(tl.float32)
        origin_low = (origin - origin_high).to(tl.float32)
        half_k_float = half_k.to(tl.float32)
        correction = (half_k * (exact / inverse) - half_k_float).to(tl.float32)
        if GAUSSIAN:
            half_k_float = 1.0 + 0 * half_k_float
            correction = (exact / inverse - 1).to(tl.float32)
        tl.store(scales_ptr + b, origin_high)
        tl.store(scales_ptr + B + b, origin_low)
        tl.store(scales_ptr + 2 * B + b, inverse)
        tl.store(scales_ptr + 3 * B + b, correction)
        cut_float = limit
        worse = tl.maximum(logit_error / LOGIT_ERROR, 1)
        heavy = tl.log(worse * worse * HEAVY)
        if BACKWARD:
            heavy += log_weight
        else:
            total = 0 * depth
            for first in range(0, tiles, GROUP):
                group = load_within(r_ptr, minima_ptr, first, N, tiles, limit, TILE, GROUP)
                u = tl.minimum(((group - origin_high) - origin_low) * inverse, 1e30)
                w = tl.exp(logits_float(u, half_k_float, correction, GAUSSIAN))
                sums = tl.sum(tl.where(group <= cut_float, w, 0.0), 1)
                total += tl.sum(sums.to(tl.float64), 0)
            heavy -= tl.log(total)
        # logit(u) = −heavy
        if GAUSSIAN:
            limit = (origin + heavy / exact).to(tl.float32)
        else:
            limit = (origin + (tl.exp(heavy / half_k) - 1) / exact).to(tl.float32)
    if not BACKWARD:
        tl.store(base_ptr + b, base)
    tl.store(limit_ptr + b, limit)
    tl.store(cut_ptr + b, cut_float)


@Kernel
def weights_kernel(
    r_ptr,  # (B, pitch) float32
    half_k,
    pull_ptr,  # (B, pitch) float32 g·y_j, for BACKWARD
    constant_ptr,  # (2, B) float64, high and low parts of what a_j has besides, for BACKWARD
    log_weight_ptr,  # (B,) float64 log w of the anchor, for BACKWARD
    limit_ptr,  # (B,) float32
    cut_ptr,  # (B,) float32
    scales_ptr,  # (4, B) float32
    weights_ptr,  # (2, B, tiles · TILE) parts, not written for a query without a cut
    active_ptr,  # (B, tiles) int8, likewise as the sums
    sums_ptr,  # (2, B, tiles) float32: Σ w; Σ w u
    B,
    N,
    tiles,
    GAUSSIAN: tl.constexpr,
    BACKWARD: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Weights of limit < r ≤ cut of one query and GROUP tiles, as two parts; for BACKWARD instead
    w_j (g·y_j + constant) s_a/s_j, to which c_j is proportional.
    """
    query, group = place(B)
    b, B = query.to(tl.int64), tl.cast(B, tl.int64)
    tile = group * GROUP + tl.arange(0, GROUP)
    limit, cut = tl.load(limit_ptr + b), tl.load(cut_ptr + b)
    to = b * tiles + tile
    if cut == -float("inf"):
        return
    j = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    r = tl.load(r_ptr + b * pitch(N) + j, mask=j < N, other=float("inf"))
    u = ((r - tl.load(scales_ptr + b)) - tl.load(scales_ptr + B + b)) * tl.load(
        scales_ptr + 2 * B + b
    )
    u = tl.minimum(u, 1e30)
    half_k = as_double(half_k).to(tl.float32)
    logits = logits_float(u, half_k, tl.load(scales_ptr + 3 * B + b), GAUSSIAN)
    if BACKWARD:
        logits += tl.load(log_weight_ptr + b).to(tl.float32)
    w = tl.where((r > limit) & (r <= cut), tl.exp(logits), 0.0)
    if BACKWARD:
        pull = tl.load(pull_ptr + b * pitch(N) + j, mask=j < N, other=0.0)
        high, low = tl.load(constant_ptr + b), tl.load(constant_ptr + B + b)
        w *= (pull + high.to(tl.float32)) + low.to(tl.float32)
        if not GAUSSIAN:
            w /= 1 + u
    high = round_to_bfloat16(w)
    low = round_to_bfloat16(w - high)
    element = weights_ptr.dtype.element_ty
    active = tl.max((w != 0).to(tl.int32), 1)
    inside = (tile < tiles)[:, None]
    tl.store(weights_ptr + b * tiles * TILE + j, high.to(element), mask=inside)
    tl.store(weights_ptr + (B + b) * tiles * TILE + j, low.to(element), mask=inside)
    tl.store(active_ptr + to, active.to(tl.int8), mask=tile < tiles)
    tl.store(sums_ptr + to, tl.sum(w, 1), mask=tile < tiles)
    tl.store(sums_ptr + B * tiles + to, tl.sum(w * u, 1), mask=tile < tiles)


@Kernel
def combine_kernel(
    x_ptr,  # (B, d)
    t_ptr,  # (B,) float64
    half_k,
    base_ptr,  # (B,) float64 ‖x − x0_a‖²
    header_ptr,  # (7,) float64
    origin_ptr,  # (d,) float64
    mean_ptr,  # (d,) float64
    steps_ptr,  # (B,) float64, but for BACKWARD as the next three
    cut_ptr,  # (B,) float32
    total_ptr,  # (B,) float64
    log_mass_ptr,  # (B,) float64
    log_weight_ptr,  # (B,) float64
    rest_ptr,  # (B, tiles) float32 Σ w
    sums_ptr,  # (splits, B, width) float32 Σ w y
    out_ptr,  # (B, d) float64
    d,
    width,
    tiles,
    GAUSSIAN: tl.constexpr,
    BACKWARD: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds Σ_j w_j (x0_j − x) / total, for BACKWARD twice Σ_j c_j (x0_j − x), of a query whose
    weights were summed. What its digits left, e, moved all logits by slope · 2 e·(y_j − mean), and
    so the log mass by the mean of that, which is known now.
    """
    b = tl.program_id(0).to(tl.int64)
    B = tl.num_programs(0).to(tl.int64)
    if tl.load(cut_ptr + b) == -float("inf"):
        return
    t, base, half_k = tl.load(t_ptr + b), tl.load(base_ptr + b), as_double(half_k)
    unit, rest = tl.load(header_ptr), sum_tiles(rest_ptr, b, tiles)
    slope = summed_factor(header_ptr, base, half_k, t, GAUSSIAN)
    if BACKWARD:
        factor = 2 * slope
    else:
        factor = 1 / tl.load(total_ptr + b)
    moved = 0 * t
    for first in range(0, d, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = column < d
        sums = tl.zeros((BLOCK_D,), tl.float64)
        for split in tl.static_range(SPLITS):
            part = tl.load(sums_ptr + (B * split + b) * width + column, mask=inside, other=0.0)
            sums += part.to(tl.float64)
        x = tl.load(x_ptr + b * d + column, mask=inside, other=0.0).to(tl.float64)
        origin = tl.load(origin_ptr + column, mask=inside, other=0.0)
        before = tl.load(out_ptr + b * d + column, mask=inside, other=0.0)
        after = before + factor * (unit * sums + rest * (origin - x))
        tl.store(out_ptr + b * d + column, after, mask=inside)
        if not BACKWARD:
            scaled, step = (x - origin) / unit, tl.load(steps_ptr + b)
            left = tl.where(inside, scaled - multiple(scaled, step) * step, 0.0)
            mean = tl.load(mean_ptr + column, mask=inside, other=0.0)
            moved += tl.sum(left * (sums - rest * mean), 0)
    if not BACKWARD:
        moved *= 2 * slope * unit * factor
        tl.store(log_mass_ptr + b, tl.load(log_mass_ptr + b) + moved)
        tl.store(log_weight_ptr + b, tl.load(log_weight_ptr + b) - moved)
