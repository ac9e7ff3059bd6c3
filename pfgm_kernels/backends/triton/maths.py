# SPDX-License-Identifier: Apache-2.0
"""Mathematics of the field that the Triton kernels share.

    s_j = ‖x − x0_j‖² + t²,  logit_j = −(k/2) log s_j      (Eqs. 3 and 12, k = d + D)
    s_j = ‖x − x0_j‖²,       logit_j = −s_j / (2t²)        (k = ∞, GAUSSIAN)

Logits are only ever formed relative to a reference near the nearest one.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl


def bits_of(value: float) -> int:
    """A number as kernels take it: Triton would round a float to float32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@triton.jit
def as_double(bits):
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def log_count(N):
    """log N, of a million at least: these may be a chunk of a call's references, whose weights are
    cut as all of them together would have them cut.
    """
    return tl.log(tl.cast(tl.maximum(N, 1048576), tl.float64))


@triton.jit
def log1p_float(u):
    """log(1 + u) in float32 to about one unit in the last place, for 0 ≥ u > −1 or u ≤ 1e30.

    The hardware's logarithm is off by 2⁻²² absolutely, which a logit multiplies by (d + D)/2. Here
    1 + u = 2^e (1 + f) with |f| ≤ 0.42, what the sum lost is put back, and log(1 + f) is a series.
    """
    w = 1.0 + u
    lost = u - (w - 1.0)
    bits = w.to(tl.int32, bitcast=True)
    high = (bits - 0x3F3504F3) & -0x800000  # exponent << 23
    unit = (0x3F800000 - high).to(tl.float32, bitcast=True)  # 2^−exponent
    f = ((bits - high).to(tl.float32, bitcast=True) - 1.0) + lost * unit
    e = high.to(tl.float32) * 1.1920928955078125e-07
    series = -0.07646101489 * f + 0.12779113629
    series = series * f - 0.13164186427
    series = series * f + 0.14199695852
    series = series * f - 0.16622764905
    series = series * f + 0.20001292692
    series = series * f - 0.25000837961
    series = series * f + 0.33333331197
    tail = (f * f) * (f * series - 0.5) + e * -2.12194440e-4
    return e * 0.693359375 + (f + tail)


@triton.jit
def logits_float(u, half_k, correction, GAUSSIAN: tl.constexpr):
    """Relative logits in float32 of u = (s_j − s_a)/s_a (Gaussian: (s_j − s_a)/(2t²)).

    correction makes up for the rounding of k/2 and, to first order, of what scaled u: either would
    move all logits the same way.
    """
    if GAUSSIAN:
        log = u
    else:
        log = log1p_float(u)
    return -(log * half_k) - log * correction


@triton.jit
def relative_logit(square, base, half_k, t, GAUSSIAN: tl.constexpr):
    """Logit at a squared distance minus that at base, in float64: t² cancels, whose rounding would
    move the logits of a large k. Where s is 0 at base (the query is a reference and t = 0) that
    leaves 0 for the references that coincide with the query and −∞ for all others.
    """
    if GAUSSIAN:
        logit = (base - square) * (0.5 / (t * t))
    else:
        s = base + t * t
        v = (square - base) / tl.where(s == 0, 1.0, s)
        w = 1.0 + v
        log = tl.log(w) + (v - (w - 1.0)) / w
        singular = tl.where(square == 0, 0.0, square * 0.0 - float("inf"))
        logit = tl.where(s == 0, singular, -half_k * log)
    return logit


@triton.jit
def logit_of(square, half_k, t, GAUSSIAN: tl.constexpr):
    if GAUSSIAN:
        return -square * (0.5 / (t * t))
    else:
        return -half_k * tl.log(square + t * t)


@triton.jit
def s_offset(t, GAUSSIAN: tl.constexpr):
    """What t adds to ‖x − x0‖² in s: nothing for the Gaussian kernel, or NaN where t is 0."""
    if GAUSSIAN:
        return (t - t) * (0.5 / (t * t))
    else:
        return t * t


@triton.jit
def place(inner):
    """Where a program is in a grid of two axes, of which the first has so many. Launched along one:
    others than the first end at 65,535.
    """
    program = tl.program_id(0)
    return program % inner, program // inner


PITCH = tl.constexpr(16)


@triton.jit
def pitch(N):
    """From one row of r (B, N) to the next: a multiple of PITCH, so that accesses are wide."""
    return tl.cdiv(N, PITCH) * PITCH


@triton.jit
def load_values(values_ptr, table_ptr, index, mask, CODES: tl.constexpr):
    """Stored reference values, 8-bit codes into the table or floats, as float64; 0 where masked."""
    stored = tl.load(values_ptr + index, mask=mask, other=0)
    if CODES:
        return tl.load(table_ptr + stored.to(tl.int32), mask=mask, other=0.0).to(tl.float64)
    else:
        return stored.to(tl.float64)


@triton.jit
def round_to_bfloat16(v):
    """v rounded to the nearest bfloat16, ties to even, in float32. The interpreter truncates where
    it converts.
    """
    bits = v.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(v == v, rounded.to(tl.float32, bitcast=True), v)
