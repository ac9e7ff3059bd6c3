# SPDX-License-Identifier: Apache-2.0
"""Displacement and log mass of one chunk, Eqs. (3) and (12)."""

from __future__ import annotations

import torch
from torch import Tensor

from pfgm_kernels.backends.triton import exact
from pfgm_kernels.backends.triton.call import Call, Dense, Screen
from pfgm_kernels.backends.triton.operands import Operands, Split

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
    _finish(call, limit, None, None, out)


def two_pass_forward(
    call: Call,
    operands: Operands,
    out: Outputs,
    queries: Split | None = None,
    wanted: Tensor | None = None,
) -> None:
    """All queries, or those that are wanted (B,) int8, by products and direct differences
    (route.py).
    """
    screen = Screen.make(call, operands, queries, wanted, out[2])
    dense = screen.sum_dense()
    total = _finish(call, screen.limit, screen.r, dense, out)
    screen.combine(dense, out[0], (total, out[1], out[3]))


def _finish(
    call: Call, limit: Tensor, r: Tensor | None, dense: Dense | None, out: Outputs
) -> Tensor:
    """Everything but what products add to the displacement. Returns the sum of all weights (B,)."""
    displacement, log_mass, anchor, anchor_log_weight = out
    total = torch.empty_like(call.t)
    squares, counts, _ = call.distances(limit, r)
    exact.weigh_kernel[call.B,](
        call.t,
        call.half_k_bits,
        limit,
        counts,
        squares,
        limit if dense is None else dense.cut,
        total if dense is None else dense.base,
        total if dense is None else dense.sums,
        anchor,
        total,
        log_mass,
        anchor_log_weight,
        call.N,
        call.exact_tiles,
        0 if dense is None else dense.tiles,
        SUMMED=dense is not None,
        **call.row_options(),
    )
    call.gather(limit, counts, squares, total, displacement)
    return total
