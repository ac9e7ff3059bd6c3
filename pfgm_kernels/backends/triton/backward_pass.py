# SPDX-License-Identifier: Apache-2.0
"""The gradients of one chunk, with cotangents g of the displacement v and g_m of the log mass:

    a_j = g·(x0_j − x − v),  c_j = (k/2) w_j (a_j + g_m)/s_j      (Gaussian: w_j (a_j + g_m)/(2t²))
    dx = −g − 2 Σ_j c_j (x − x0_j),  dt = −2t Σ_j c_j    (Gaussian: (2/t) Σ_j c_j ‖x − x0_j‖²)
    dx0_j = Σ_b w_j g + 2 c_j (x − x0_j)

Weights are recomputed from the squared distance and log w of the anchor.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from pfgm_kernels.backends.triton import exact
from pfgm_kernels.backends.triton.call import Call, Dense, Screen, compare
from pfgm_kernels.backends.triton.configurations import blocks
from pfgm_kernels.backends.triton.operands import Operands, split
from pfgm_kernels.rows import Cotangents


def exact_backward(
    call: Call,
    limit: Tensor,
    cotangents: Cotangents,
    log_weight: Tensor,
    r: Tensor | None = None,
    operands: Operands | None = None,
    dense: Dense | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds to dx, of the references within the limit (B,), and to dt, of those and of what products
    have summed. log_weight (B,) is of the anchors. Returns the weights and the coefficients of
    references within the limit, (B, N) each.
    """
    squares, counts, projection = call.distances(limit, r, cotangents.g)
    exact.coefficients_kernel[call.B,](
        call.t,
        call.half_k_bits,
        limit,
        counts,
        squares,
        projection,
        cotangents.anchor_square,
        log_weight,
        cotangents.g_m,
        cotangents.projection,
        limit if operands is None else operands.header,
        limit if dense is None else dense.cut,
        limit if dense is None else dense.sums,
        cotangents.dt,
        call.B,
        call.N,
        call.exact_tiles,
        0 if dense is None else dense.tiles,
        SUMMED=dense is not None,
        **call.row_options(),
    )
    call.gather(limit, counts, projection, None, cotangents.dx)
    return squares, projection


def two_pass_backward(
    call: Call, operands: Operands, cotangents: Cotangents, log_weight: Tensor
) -> None:
    """Adds to dx and dt, by products and direct differences (route.py)."""
    base = cotangents.anchor_square
    screen = Screen.make(call, operands, base=base, log_weight=log_weight)
    # a_j + g_m = unit (g·y_j + constant)
    given = call.x, cotangents.g_m, cotangents.projection
    rows = split(cotangents.g, call.table, operands, 2, 0, cotangents=given)
    pull = compare(call, operands, rows.parts)
    dense = screen.sum_dense(pull, rows.marks, log_weight)
    exact_backward(call, screen.limit, cotangents, log_weight, screen.r, operands, dense)
    screen.combine(dense, cotangents.dx)


def references_backward(call: Call, cotangents: Cotangents, log_weight: Tensor) -> Tensor:
    """dx0 (N, d), and adds to dx and dt, by direct differences throughout."""
    limit = call.rows(math.nan, torch.float32)
    weights, coefficients = exact_backward(call, limit, cotangents, log_weight)
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
