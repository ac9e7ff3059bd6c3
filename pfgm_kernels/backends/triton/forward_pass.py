# SPDX-License-Identifier: Apache-2.0
"""Displacement and log mass of one chunk, Eqs. (3) and (12)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pfgm_kernels.backends.triton import exact
from pfgm_kernels.backends.triton.call import Call, Screen
from pfgm_kernels.backends.triton.operands import Operands

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def empty_outputs(call: Call) -> Outputs:
    """displacement (B, d), log_mass (B,), anchor (B,) int64 and its log weight (B,)."""
    displacement = torch.empty(call.B, call.d, dtype=torch.float64, device=call.x.device)
    log_mass = displacement.new_empty(call.B)
    anchor = torch.empty(call.B, dtype=torch.int64, device=call.x.device)
    return displacement, log_mass, anchor, torch.empty_like(log_mass)


def exact_forward(call: Call, limit: Tensor, out: Outputs) -> None:
    """Queries whose limit (B,) is NaN by direct differences with all references; those whose limit
    is −∞ are left as they are.
    """
    _finish(call, limit, None, call.rows(math.nan), call.rows(), out)


def two_pass_forward(call: Call, operands: Operands, wanted: Tensor, out: Outputs) -> None:
    """Queries that are wanted (B,) int8, by products and direct differences (route.py)."""
    screen = Screen.make(call, operands, wanted, out[2])
    dense, rest, _ = screen.sum_dense()
    total = _finish(call, screen.limit, screen.r, screen.base, rest, out)
    screen.combine(dense, rest, 1 / total, out[0])


def _finish(
    call: Call, limit: Tensor, r: Tensor | None, base: Tensor, rest: Tensor, out: Outputs
) -> Tensor:
    """Everything but what products add to the displacement. base and rest (B,) are the squared
    distance of the anchor and the weight of the references beyond the limit, where there are any.
    Returns the sum of all weights (B,).
    """
    displacement, log_mass, anchor, anchor_log_weight = out
    total = call.rows(1.0)
    squares, counts, _ = call.distances(limit, r)
    exact.weigh_kernel[call.B,](
        call.t,
        call.half_k,
        limit,
        counts,
        squares,
        base,
        anchor,
        rest,
        total,
        log_mass,
        anchor_log_weight,
        call.N,
        call.exact_tiles,
        **call.row_options(),
    )
    call.gather(limit, counts, squares, 1 / total, displacement)
    return total
