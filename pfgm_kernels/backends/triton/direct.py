# SPDX-License-Identifier: Apache-2.0
"""Few dimensions: direct differences in float32. Eqs. (3) and (12) and their gradients,

    v = Σ_j w_j (x0_j − x),  w = softmax_j(logit_j),  log_mass = logsumexp_j(logit_j)
    c_j = (k/2) w_j (g·(x0_j − x) + constant)/s_j,  dx = 2 Σ_j c_j (x0_j − x),  dt = −2t Σ_j c_j

The nearest reference is found first. Then all are weighed relative to where it lies, so that sums
over parts of the references simply add up. Only squared distances are formed in float32, never s:

    1 + u = s/scale,  u = (‖x − x0‖² − origin)/scale,  scale = origin + t²

holds relative to u however large t is (Gaussian: u = (‖x − x0‖² − origin)/(2t²) is the logit's
size, and scale = origin). The nearest reference is left out and weighed in float64.

A thread owns a few queries and goes over all references of its part: nothing is exchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from pfgm_kernels.backends._values import decode
from pfgm_kernels.backends.triton.backward_pass import exact_backward
from pfgm_kernels.backends.triton.call import Call
from pfgm_kernels.backends.triton.configurations import Blocks, blocks, multiprocessors
from pfgm_kernels.backends.triton.copies import CROWD, count_equal
from pfgm_kernels.backends.triton.forward_pass import Outputs, exact_forward
from pfgm_kernels.backends.triton.launch import Kernel
from pfgm_kernels.backends.triton.maths import as_double, bits_of, logits_float
from pfgm_kernels.rows import Cotangents

MAX_DIM = 32
MAX_POWER = 40  # of 1/√(1 + u): the rounding of higher ones exceeds that of logarithms

# Whether float32 does. Let ρ = 2⁻²⁴. A squared distance is off by δ ≈ 1.5 ρ/√d of itself (root mean
# square, and no more than ρ): 0.9 ρ/√d by its terms, 1.2 ρ/√d by their sums in groups of GROUP, and
# nothing by the sum of these, which is compensated. That moves a logit by δ (k/2) ‖x − x0_j‖²/s_j,
# which is at most δ k/2, and with the nearest reference, a, and logits relative to it at most
#
#   δ (reach + |logit_j|),  reach = (k/2) ‖x − x0_a‖²/s_a     (Gaussian: ‖x − x0_a‖²/(2t²)).
#
# u and logit are rounded by another 1.3 ρ |logit_j|; powers by 0.7 ρ min(k/2, |logit_j|) and, for
# k = 9, by 2 ρ. log_mass is off by Σ_j w_j times these. The nearest's weight is exact and no other
# is larger, so that the worst are two references that share the weight: δ reach/2, which is 2e-7, a
# fifth of what the contract allows, at a reach of SMALL_REACH and of ROOT_REACH √d; D = 1 stays
# below. Equal references err alike, as one that may hold all weight: where there are any, half
# that reach is the most; of many the other errors are alike, too. The mean |logit| is at most
# log(N/Σ_j exp(logit_j)), by Jensen's inequality: that is added to the reach twice, for the other
# errors too, and at CROWD_REACH they are a quarter of the contract. Gradients may be off by 1e-5
# of their terms: at GRADIENT_REACH they are by 2e-6 in a crowd. On a reference v is of the others
# alone: where they have less than FAINT of the weight, 1.3 ρ |logit_j| may be 1e-6 of it.
SMALL_REACH, ROOT_REACH, CROWD_REACH, GRADIENT_REACH, FAINT = 7.0, 4.6, 5.0, 50.0, 1e-3
NARROW = 16  # columns up to which a block of references is larger
GROUP = tl.constexpr(4)
RUN = tl.constexpr(16)


@triton.jit
def load_columns(ptr, row, DIM: tl.constexpr):
    """Columns of rows (…, DIM) as a tuple."""
    columns = tl.tuple([])
    for c in tl.static_range(DIM):
        columns += (tl.load(ptr + row.to(tl.int64) * DIM + c),)
    return columns


@triton.jit
def compare(x, g, y_ptr, offset, PULL: tl.constexpr, DIM: tl.constexpr):
    """‖x − y‖² (BLOCK_N, BLOCK_M) of rows at y_ptr + offset (BLOCK_N,), the sum of two numbers, and
    for PULL g·(y − x); x and g as tuples.
    """
    total = 0.0
    low = 0.0
    pull = 0.0
    for first in tl.static_range(0, DIM, GROUP):
        part = 0.0
        for c in tl.static_range(first, min(first + GROUP, DIM)):
            difference = tl.load(y_ptr + offset + c)[:, None] - x[c][None, :]
            part += difference * difference
            if PULL:
                pull += g[c][None, :] * difference
        if first == 0:
            total = part
        else:
            grown = total + part
            rest = grown - total
            low += (total - (grown - rest)) + (part - rest)
            total = grown
    return total, low, pull


@triton.jit
def weigh(u, half_k, half_k_low, POWER: tl.constexpr, GAUSSIAN: tl.constexpr):
    """(1 + u)^(−k/2), with k = POWER where that is not 0; Gaussian: exp(−u)."""
    if POWER == 0:
        return tl.exp(logits_float(u, half_k, half_k_low, GAUSSIAN))
    else:
        # With e = 1 − (1 + u) y² the power is y^k (1 − e)^(−k/2): e is the error of the root y.
        ratio = 1.0 + u
        root = tl.rsqrt(ratio)
        square = root * root
        lost = u - (ratio - 1.0)
        e = tl.fma(-ratio, square, 1.0) - lost * square
        power = 1.0 + e * half_k
        if POWER % 2 == 1:
            power = root + root * (e * half_k)
        for bit in tl.static_range(1, 6):  # of k up to MAX_POWER
            if (POWER >> bit) % 2 == 1:
                power *= square
            square *= square
        return power


@triton.jit
def sum_runs(v, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Σ_n v (BLOCK_N, BLOCK_M) in float64 of the sums of RUN terms in float32."""
    if BLOCK_N <= RUN:
        return tl.sum(v, 0).to(tl.float64)
    else:
        return tl.sum(tl.sum(tl.reshape(v, (BLOCK_N // RUN, RUN, BLOCK_M)), 1).to(tl.float64), 0)


@Kernel
def nearest_kernel(
    x_ptr,  # (B, DIM) float32
    values_ptr,  # (N, DIM) float32
    distance_ptr,  # (splits, B) float32
    block_ptr,  # (splits, B) int32
    B,
    N,
    per_split,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The smallest ‖x − x0‖² over per_split blocks of BLOCK_N references, and its block."""
    b = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    x = load_columns(x_ptr, tl.minimum(b, B - 1), DIM)
    smallest = tl.full((BLOCK_M,), float("inf"), tl.float32)
    nearest = tl.zeros((BLOCK_M,), tl.int32)
    for block in range(split * per_split, tl.minimum((split + 1) * per_split, tl.cdiv(N, BLOCK_N))):
        first = tl.cast(block, tl.int64) * BLOCK_N
        row = tl.minimum(tl.arange(0, BLOCK_N), (N - 1 - first).to(tl.int32))
        high, low, _ = compare(x, x, values_ptr + first * DIM, row * DIM, False, DIM)
        distance = tl.min(high + low, 0)
        nearest = tl.where(distance < smallest, block, nearest)
        smallest = tl.minimum(distance, smallest)
    to = split.to(tl.int64) * B + b
    tl.store(distance_ptr + to, smallest, mask=b < B)
    tl.store(block_ptr + to, nearest, mask=b < B)


@Kernel
def sum_kernel(
    x_ptr,  # (B, DIM) float32
    values_ptr,  # (N, DIM) float32
    half_k,
    scales_ptr,  # (3, B) float32: origin; 1/scale and what its rounding takes off, relatively
    without_ptr,  # (B,) int64: a reference that is left out
    g_ptr,  # (B, DIM) float32, for BACKWARD
    constant_ptr,  # (2, B) float32, high and low parts, for BACKWARD
    out_ptr,  # (splits, DIM + 1, B) float64
    B,
    N,
    per_split,
    POWER: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    BACKWARD: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Σ_j w_j and Σ_j w_j (x0_j − x) over per_split blocks of references; for BACKWARD of
    w_j (g·(x0_j − x) + constant) in place of w_j, and for the Gaussian kernel then, in place of the
    first sum, of that times ‖x − x0_j‖².
    """
    b = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    query = tl.minimum(b, B - 1)
    x = load_columns(x_ptr, query, DIM)
    origin, inverse = tl.load(scales_ptr + query), tl.load(scales_ptr + B + query)
    inverse_low = tl.load(scales_ptr + 2 * B + query)
    anchor = tl.load(without_ptr + query)
    exact_half_k = as_double(half_k)
    half_k = exact_half_k.to(tl.float32)
    half_k_low = (exact_half_k - half_k).to(tl.float32)
    g = x
    if BACKWARD:
        g = load_columns(g_ptr, query, DIM)
        high_part, low_part = tl.load(constant_ptr + query), tl.load(constant_ptr + B + query)
    total = tl.zeros((BLOCK_M,), tl.float64)
    sums = tl.tuple([])
    for _ in tl.static_range(DIM):
        sums += (total,)
    for block in range(split * per_split, tl.minimum((split + 1) * per_split, tl.cdiv(N, BLOCK_N))):
        first = tl.cast(block, tl.int64) * BLOCK_N
        last = (N - 1 - first).to(tl.int32)
        row = tl.arange(0, BLOCK_N)
        offset = tl.minimum(row, last) * DIM
        y_ptr = values_ptr + first * DIM
        high, low, pull = compare(x, g, y_ptr, offset, BACKWARD, DIM)
        u = ((high - origin[None, :]) + low) * inverse[None, :]
        u += u * inverse_low[None, :]
        u += u - u  # an infinite u becomes NaN: it must not pass for a small weight
        w = weigh(u, half_k, half_k_low, POWER, GAUSSIAN)
        counts = (row <= last)[:, None] & (row[:, None] != (anchor - first)[None, :])
        w = tl.where(counts, w, 0.0)
        if BACKWARD:
            w *= (pull + high_part[None, :]) + low_part[None, :]
        counted = w
        if BACKWARD and GAUSSIAN:
            counted = w * high
        total += sum_runs(counted, BLOCK_N, BLOCK_M)
        added = tl.tuple([])
        for c in tl.static_range(DIM):
            # Loaded again: with all columns in registers there were none left.
            y = tl.load(y_ptr + offset + c, eviction_policy="evict_last")
            moved = w * (y[:, None] - x[c][None, :])
            added += (sums[c] + sum_runs(moved, BLOCK_N, BLOCK_M),)
        sums = added
    to = out_ptr + split.to(tl.int64) * (DIM + 1) * B + b
    tl.store(to, total, mask=b < B)
    for c in tl.static_range(DIM):
        to += B
        tl.store(to, sums[c], mask=b < B)


@dataclass(frozen=True)
class Scale:
    """What the weights of B queries are relative to. (B,) float64 but for `parts`."""

    call: Call
    offset: Tensor
    """what t adds to s"""
    rate: Tensor
    """1/(2t²)"""
    origin: Tensor
    s: Tensor
    parts: Tensor
    """(3, B) float32, see sum_kernel"""

    @staticmethod
    def make(call: Call, distance: Tensor) -> Scale:
        """Near this squared distance (B,)."""
        origin, rate = distance.float().double(), 0.5 / (call.t * call.t)
        offset = torch.zeros_like(rate) if call.gaussian else call.t * call.t
        s = origin + offset
        exact = rate if call.gaussian else 1 / s
        inverse = exact.float().double()
        parts = torch.stack([origin, inverse, exact / inverse - 1]).float()
        return Scale(call, offset, rate, origin, s, parts)

    def logit(self, distance: Tensor) -> Tensor:
        """Of this squared distance (B,), relative to the scale."""
        if self.call.gaussian:
            return (self.s - distance) * self.rate
        return -self.call.half_k * ((distance - self.origin) / self.s).log1p()

    def own_logit(self) -> Tensor:
        return -self.s * self.rate if self.call.gaussian else -self.call.half_k * self.s.log()

    def reach(self, distance: Tensor) -> Tensor:
        """How far a relative error of the nearest's squared distance (B,) moves its logit; NaN
        where float32 does not hold what is formed.
        """
        s = distance + self.offset
        slope = self.rate if self.call.gaussian else self.call.half_k / s
        size = 1 / slope if self.call.gaussian else s
        held = (size > 1e-25) & (size < 1e25) & (distance < 1e25)
        return torch.where(held, distance * slope, math.nan)


def _grid(call: Call) -> tuple[Blocks, tuple[int, int], int]:
    """Launch options; blocks of queries and parts of the references; how many blocks each has."""
    sizes = blocks("direct" if call.d <= NARROW else "direct wide", call.x.device)
    programs = triton.cdiv(call.B, sizes["BLOCK_M"])
    tiles = triton.cdiv(call.N, sizes["BLOCK_N"])
    per_split = triton.cdiv(tiles, triton.cdiv(16 * multiprocessors(call.x.device), programs))
    return sizes | {"DIM": call.d}, (programs, triton.cdiv(tiles, per_split)), per_split


def _nearest(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest reference's index (B,), and x0 − x (B, d) and its square (B,) in float64."""
    options, grid, per_split = _grid(call)
    distances = torch.empty(grid[1], call.B, dtype=torch.float32, device=call.x.device)
    found = torch.empty_like(distances, dtype=torch.int32)
    nearest_kernel[grid](
        call.x, call.values, distances, found, call.B, call.N, per_split, **options
    )
    block = found.gather(0, distances.min(0).indices[None])[0].long()
    inside = torch.arange(options["BLOCK_N"], device=block.device)
    rows = (block[:, None] * options["BLOCK_N"] + inside).clamp_(max=call.N - 1)
    differences = call.values[rows].double() - call.x[:, None].double()
    distance, best = differences.square().sum(2).min(1)
    each = torch.arange(call.B, device=block.device)
    return rows[each, best], differences[each, best], distance


def _sum(
    scale: Scale, half_k: float, without: Tensor, g: Tensor | None, constant: Tensor | None
) -> Tensor:
    """(d + 1, B), see sum_kernel; g (B, d) and constant (2, B) for the backward pass."""
    call = scale.call
    options, grid, per_split = _grid(call)
    out = torch.empty(grid[1], call.d + 1, call.B, dtype=torch.float64, device=call.x.device)
    k = call.k if g is None else call.k + 2
    sum_kernel[grid](
        call.x,
        call.values,
        bits_of(half_k),
        scale.parts,
        without,
        call.x if g is None else g,
        scale.parts if constant is None else constant,
        out,
        call.B,
        call.N,
        per_split,
        POWER=int(k) if _is_power(k) else 0,
        GAUSSIAN=call.gaussian,
        BACKWARD=g is not None,
        **options,
    )
    return out.sum(0)


def _is_power(k: float) -> bool:
    return k <= MAX_POWER and k == int(k)


def _in_float32(call: Call) -> Call:
    """The call with decoded references."""
    return replace(call, values=decode(call.values, call.table).float()) if call.codes else call


def _limits(sure: Tensor, sums: Tensor) -> Tensor:
    """(B,) float32 as exact.py has it: all references for the queries that are not sure or whose
    sums (d + 1, B) are not finite, none for the others.
    """
    return torch.where(sure & sums.isfinite().all(0), -math.inf, math.nan).float()


def direct_forward(call: Call, out: Outputs) -> None:
    """Displacement, log_mass, anchor and its log weight of float32 queries."""
    call = _in_float32(call)
    anchor, difference, distance = _nearest(call)
    scale = Scale.make(call, distance)
    sums = _sum(scale, call.half_k, anchor, None, None)
    logit = scale.logit(distance)
    weight = logit.exp()
    total = sums[0] + weight
    displacement, log_mass, anchors, anchor_log_weight = out
    displacement.copy_((sums[1:].T + weight[:, None] * difference) / total[:, None])
    log_mass.copy_(scale.own_logit() + total.log())
    anchors.copy_(anchor)
    anchor_log_weight.copy_(logit - total.log())

    reach, half_k = scale.reach(distance), call.k / 2
    faint = (sums[0] < FAINT * total) & (distance < FAINT * displacement.square().sum(1))
    far, sure = max(SMALL_REACH, ROOT_REACH * math.sqrt(call.d)), ~faint
    if not _is_power(call.k) or half_k > min(CROWD_REACH, far / 2):
        equal = count_equal(call.values)
        most = reach + 2 * (anchor_log_weight + math.log(call.N))
        most = most.clamp(max=half_k if _is_power(call.k) else math.inf)
        sure &= (equal < CROWD.value) | (most <= CROWD_REACH)
        reach = torch.where(equal > 0, 2 * reach, reach)
    exact_forward(call, _limits(sure & (reach <= far), sums), out)


def direct_backward(call: Call, cotangents: Cotangents, log_weight: Tensor) -> None:
    """Adds to dx and dt of float32 queries.

    Weights only occur divided by s, and (1 + u)^(−k/2 − 1) is that quotient up to a factor of the
    query. Cotangents are scaled to what float32 holds.
    """
    call = _in_float32(call)
    g, distance = cotangents.g, cotangents.anchor_square
    scale, constant = Scale.make(call, distance), cotangents.g_m - cotangents.projection
    unit = (g.square().sum(1) * (distance + scale.offset)).sqrt() + constant.abs()
    unit = torch.where(unit > 0, unit, 1.0)
    constant = constant / unit
    parts = torch.stack([constant, constant - constant.float()]).float()
    half_k, none = call.half_k + (not call.gaussian), call.rows(-1, torch.int64)
    sums = _sum(scale, half_k, none, (g / unit[:, None]).float(), parts)

    factor = unit * (log_weight - scale.logit(distance)).exp()
    factor *= scale.rate if call.gaussian else call.half_k / scale.s
    limits = _limits((scale.reach(distance) <= GRADIENT_REACH) & factor.isfinite(), sums)
    factor, done = factor[:, None], limits[:, None].isinf()
    cotangents.dx.add_(torch.where(done, 2 * factor * sums[1:].T, 0.0))
    dt = (2 / call.t if call.gaussian else -2 * call.t)[:, None] * factor * sums[0, :, None]
    cotangents.dt.add_(torch.where(done, dt, 0.0)[:, 0])
    exact_backward(call, limits, cotangents, log_weight)
