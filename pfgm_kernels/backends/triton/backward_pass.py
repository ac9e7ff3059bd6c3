# SPDX-License-Identifier: Apache-2.0
"""The gradients of one chunk, with cotangents g of the displacement v and g_m of the log mass:

    a_j = g·(x0_j − x − v),  c_j = (k/2) w_j (a_j + g_m)/s_j      (Gaussian: w_j (a_j + g_m)/(2t²))
    dx = −g − 2 Σ_j c_j (x − x0_j),  dt = −2t Σ_j c_j    (Gaussian: (2/t) Σ_j c_j ‖x − x0_j‖²)
    dx0_j = Σ_b w_j g + 2 c_j (x − x0_j)

Weights are recomputed from the squared distance and log w of the anchor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from pfgm_kernels.backends.triton import exact
from pfgm_kernels.backends.triton.call import Call, Screen, compare
from pfgm_kernels.backends.triton.configurations import blocks
from pfgm_kernels.backends.triton.operands import Operands, split


@dataclass(frozen=True)
class Cotangents:
    """g (B, d), constant (B,) = g_m − g·v, and squared distances and log w (B,) of the anchors; all
    float64.
    """

    g: Tensor
    constant: Tensor
    base: Tensor
    log_weight: Tensor


def exact_backward(
    call: Call, limit: Tensor, cotangents: Cotangents, dx: Tensor, dt: Tensor, r: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dx (B, d) and dt (B,) of the queries that have a limit (B,), of the references within it.
    Returns the weights and the coefficients of these, (B, N) each.
    """
    squares, counts, projection = call.distances(limit, r, cotangents.g)
    exact.coefficients_kernel[call.B,](
        call.t,
        call.half_k,
        limit,
        counts,
        squares,
        projection,
        cotangents.base,
        cotangents.log_weight,
        cotangents.constant,
        dt,
        call.N,
        call.exact_tiles,
        **call.row_options(),
    )
    call.gather(limit, counts, projection, call.rows(2.0), dx)
    return squares, projection


def two_pass_backward(
    call: Call, operands: Operands, wanted: Tensor, cotangents: Cotangents, dx: Tensor, dt: Tensor
) -> None:
    """dx (B, d) and dt (B,) of the queries that are wanted, by products and direct differences."""
    base, log_weight = cotangents.base, cotangents.log_weight
    screen = Screen.make(call, operands, wanted, wanted, base, log_weight)
    unit = screen.unit
    # a_j + g_m = unit (g·y_j + constant)
    zero, one = torch.zeros_like(operands.origin), torch.ones_like(operands.header[:1])
    parts, _, shared = split(cotangents.g, call.table, zero, one, 2, operands.mean)
    pull, _ = compare(call, operands, parts, wanted, distances=False)
    shift = (cotangents.g * (operands.origin - call.x)).sum(1)
    constant = (cotangents.constant + shift) / unit + shared
    high = constant.float()
    halves = torch.stack([high, (constant - high).float()])
    dense, rest, moment = screen.sum_dense(pull, halves, log_weight)

    exact_backward(call, screen.limit, cotangents, dx, dt, screen.r)
    t = call.t
    if call.gaussian:
        factor = unit * (0.5 / (t * t))
        light = (2 / t) * factor * (base * rest + 2 * t * t * moment)
    else:
        factor = unit * (call.half_k / (base + t * t))
        light = -2 * t * factor * rest
    summed = screen.cut != -math.inf
    dt += torch.where(summed, light, 0.0)
    screen.combine(dense, rest, 2 * factor, dx)


def references_backward(call: Call, cotangents: Cotangents, dx: Tensor, dt: Tensor) -> Tensor:
    """dx0 (N, d), dx (B, d) and dt (B,) by direct differences throughout."""
    limit = call.rows(math.nan, torch.float32)
    weights, coefficients = exact_backward(call, limit, cotangents, dx, dt, None)
    out = torch.empty_like(call.values)
    sizes = blocks("references", call.x.device)
    grid = triton.cdiv(call.N, sizes["BLOCK_N"]), triton.cdiv(call.d, sizes["BLOCK_D"])
    exact.references_kernel[grid](
        call.x,
        cotangents.g,
        call.values,
        weights,
        coefficients,
        out,
        call.B,
        call.N,
        call.d,
        **sizes,
    )
    return out
