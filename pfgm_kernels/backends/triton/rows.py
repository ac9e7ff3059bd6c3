# SPDX-License-Identifier: Apache-2.0
"""What is done of each query before and after the sums over references. With the norm n of (v, −t),

    finish   result = v,  x + v  or  scale · (v, −t)/(n + gamma), Eq. (12), and the residual
             v − (x0_a − x)
    begin    the cotangents g of v and g_m of the log mass from those of the result, and what
             reaches x and t not by way of the weights:  −g, for x + v 0;  0, for a field g_t

of which g = f · (a − u (u·(a, b)) n/(n + gamma)), (a, b) the cotangents of a field, u = (v, −t)/n
and f = scale/(n + gamma). At the singular point, t = 0 on a reference, all are 0.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pfgm_kernels.backends.triton.launch import Kernel
from pfgm_kernels.backends.triton.maths import as_double, bits_of, load_values
from pfgm_kernels.outputs import Output
from pfgm_kernels.rows import Cotangents, Rows, Stored

MOST_COLUMNS = 1024  # of a query that are taken at a time


@triton.jit
def to_anchor(values_ptr, table_ptr, anchor, x, column, inside, d, CODES: tl.constexpr):
    """x0_a − x in some columns, 0 where not inside."""
    y = load_values(values_ptr, table_ptr, anchor * d + column, inside, CODES)
    return tl.where(inside, y - x, 0.0)


@triton.jit
def field_factor(length, t, gamma, scale):
    """scale/(n + gamma), 0 where n is 0, and n, of ‖v‖²."""
    norm = tl.sqrt(length + t * t)
    return tl.where(norm == 0, 0.0, scale / (norm + gamma)), norm


@Kernel
def finish_kernel(
    v_ptr,  # (B, d) float64
    x_ptr,  # (B, d)
    t_ptr,  # (B,) float64
    values_ptr,  # (M, d)
    table_ptr,  # (256,) float32, for CODES
    anchor_ptr,  # (B,) int64, of M
    result_ptr,  # (B, d), for FIELD (B, d + 1)
    residual_ptr,  # (B, d), for SAVE
    d,
    gamma,
    scale,
    FIELD: tl.constexpr,
    MEAN: tl.constexpr,
    SAVE: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    t, factor = tl.load(t_ptr + b), 1.0
    columns = d
    if FIELD:
        length = 0 * t
        for first in range(0, d, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D)
            v = tl.load(v_ptr + b * d + column, mask=column < d, other=0.0)
            length += tl.sum(v * v, 0)
        factor, _ = field_factor(length, t, as_double(gamma), as_double(scale))
        columns = d + 1
        tl.store(result_ptr + b * columns + d, (-t * factor).to(result_ptr.dtype.element_ty))
    anchor = tl.load(anchor_ptr + b)
    for first in range(0, d, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = column < d
        v = tl.load(v_ptr + b * d + column, mask=inside, other=0.0)
        x = tl.load(x_ptr + b * d + column, mask=inside, other=0.0).to(tl.float64)
        value = v
        if FIELD:
            value = v * factor
        if MEAN:
            value = x + v
        to = result_ptr + b * columns + column
        tl.store(to, value.to(result_ptr.dtype.element_ty), mask=inside)
        if SAVE:
            rest = v - to_anchor(values_ptr, table_ptr, anchor, x, column, inside, d, CODES)
            to = residual_ptr + b * d + column
            tl.store(to, rest.to(residual_ptr.dtype.element_ty), mask=inside)


@Kernel
def begin_kernel(
    x_ptr,  # (B, d)
    t_ptr,  # (B,) float64
    values_ptr,  # (M, d)
    table_ptr,  # (256,) float32, for CODES
    anchor_ptr,  # (B,) int64, of M
    residual_ptr,  # (B, d)
    result_ptr,  # (B, d), for FIELD (B, d + 1): cotangents of the result, for PULLED
    log_mass_ptr,  # (B,) float64, those of the log mass, for MASS
    g_ptr,  # this and all below are written: see rows.Cotangents; float64
    g_m_ptr,
    projection_ptr,
    square_ptr,
    dx_ptr,
    dt_ptr,
    d,
    gamma,
    scale,
    FIELD: tl.constexpr,
    MEAN: tl.constexpr,
    PULLED: tl.constexpr,
    MASS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    t, anchor = tl.load(t_ptr + b), tl.load(anchor_ptr + b)
    zero = 0 * t
    square, length, along, projection = zero, zero, zero, zero
    apart = 0
    columns = d
    if FIELD:
        columns = d + 1
    for first in range(0, d, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = column < d
        x = tl.load(x_ptr + b * d + column, mask=inside, other=0.0).to(tl.float64)
        difference = to_anchor(values_ptr, table_ptr, anchor, x, column, inside, d, CODES)
        v = difference + tl.load(residual_ptr + b * d + column, mask=inside, other=0.0)
        square += tl.sum(difference * difference, 0)
        apart += tl.sum((difference != 0).to(tl.int32), 0)
        if FIELD and PULLED:
            length += tl.sum(v * v, 0)
            a = tl.load(result_ptr + b * columns + column, mask=inside, other=0.0).to(tl.float64)
            along += tl.sum(a * v, 0)
    singular = (t == 0) & (apart == 0)
    if GAUSSIAN:
        singular = t != t
    factor = tl.where(singular, 0.0, 1.0 + zero)
    dt = zero
    if FIELD and PULLED:
        own, norm = field_factor(length, t, as_double(gamma), as_double(scale))
        factor = tl.where(singular, 0.0, own)
        last = tl.load(result_ptr + b * columns + d).to(tl.float64)
        along = (along - last * t) / norm / (norm + as_double(gamma))
        along = tl.where(norm == 0, 0.0, along)
        dt = -factor * (last + t * along)
    for first in range(0, d, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = column < d
        g = tl.zeros((BLOCK_D,), tl.float64)
        if PULLED:
            x = tl.load(x_ptr + b * d + column, mask=inside, other=0.0).to(tl.float64)
            difference = to_anchor(values_ptr, table_ptr, anchor, x, column, inside, d, CODES)
            v = difference + tl.load(residual_ptr + b * d + column, mask=inside, other=0.0)
            g = tl.load(result_ptr + b * columns + column, mask=inside, other=0.0).to(tl.float64)
            if FIELD:
                g -= v * along
            g = tl.where(factor == 0, 0.0, factor * g)
            projection += tl.sum(g * v, 0)
        tl.store(g_ptr + b * d + column, g, mask=inside)
        tl.store(dx_ptr + b * d + column, 0 * g if MEAN else -g, mask=inside)
    g_m = zero
    if MASS:
        g_m = tl.where(singular, 0.0, tl.load(log_mass_ptr + b))
    tl.store(g_m_ptr + b, g_m)
    tl.store(projection_ptr + b, projection)
    tl.store(square_ptr + b, square)
    tl.store(dt_ptr + b, dt)


def finish(rows: Rows, output: Output, v: Tensor, result: Tensor) -> None:
    if len(rows.x) == 0:
        return
    finish_kernel[len(rows.x),](
        v,
        rows.x,
        rows.t,
        rows.anchor.values,
        rows.anchor.table,
        rows.anchor.index,
        result,
        rows.residual,
        rows.x.shape[1],
        SAVE=len(rows.residual) > 0,
        **_options(output, rows.anchor),
    )


def begin(rows: Rows, output: Output, g: Tensor | None, g_m: Tensor | None) -> Cotangents:
    anchor, x, found = rows.anchor, rows.x, Cotangents.empty(rows)
    if len(x) == 0:
        return found
    begin_kernel[len(x),](
        x,
        rows.t,
        anchor.values,
        anchor.table,
        anchor.index,
        rows.residual,
        rows.t if g is None else g,
        rows.t if g_m is None else g_m,
        *found,
        x.shape[1],
        PULLED=g is not None,
        MASS=g_m is not None,
        GAUSSIAN=math.isinf(rows.k),
        **_options(output, anchor),
    )
    return found


def _options(output: Output, anchor: Stored) -> dict[str, int | bool]:
    return {
        "gamma": bits_of(output.gamma),
        "scale": bits_of(output.scale),
        "FIELD": output.name == "field",
        "MEAN": output.name == "mean",
        "CODES": anchor.values.dtype == torch.uint8,
        "BLOCK_D": min(MOST_COLUMNS, triton.next_power_of_2(anchor.values.shape[1])),
    }
