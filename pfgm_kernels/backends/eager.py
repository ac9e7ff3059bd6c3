# SPDX-License-Identifier: Apache-2.0
"""Portable PyTorch in float64, on any device: the fallback and the baseline."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pfgm_kernels.backends._values import decode


def unsupported_reason(
    device: torch.device | None = None, d: int | None = None, requires_grad: bool = False
) -> str | None:
    if device is not None and device.type == "mps":
        return "it computes in float64, which MPS devices do not have"
    return None


def chunk_shape(
    batch: int, count: int, d: int, workspace: int, prepared: bool, values_grad: bool
) -> tuple[int, int]:
    """Queries and references per chunk that keep the float64 temporaries within `workspace`.

    A reference costs two rows of d (and its decoding indices), a query five; a pair costs five
    matrix entries, in the backward pass.
    """
    rows = max(1, min(batch, workspace // 2 // (5 * 8 * d)))
    per_reference = 8 * (3 * d + 5 * rows)
    return rows, max(1, min(count, workspace // 2 // per_reference))


def prepare(values: Tensor, table: Tensor, workspace: int) -> list[Tensor]:
    return []


def operands_of(operands: list[Tensor], references: slice) -> list[Tensor]:
    return []


def forward(
    x: Tensor, t: Tensor, values: Tensor, table: Tensor, operands: list[Tensor], k: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Displacement and log mass of one chunk: Eqs. (3) and (12), as `ops` says."""
    x, rows = x.double(), decode(values, table)
    squares, offset = _squared_distances(x, rows), _offset(t, k)
    squares += (offset - offset)[:, None]  # NaN where s is infinite
    nearest, anchor = squares.min(1)
    weights = _relative_logits(squares, nearest, t, k).exp_()
    total = weights.sum(1)
    weights /= total[:, None]
    anchor_weight = weights.gather(1, anchor[:, None])
    weights.scatter_(1, anchor[:, None], 0.0 * anchor_weight)  # a NaN row stays NaN
    # v = (x0_a − x) + Σ_{j≠a} w_j (x0_j − x0_a): nothing cancels where one reference dominates.
    # The shift by a reference near the queries keeps data far from the origin exact.
    anchor_rows = rows[anchor]
    shift = anchor_rows[:1].sum(0)
    rows = rows - shift
    displacement = weights @ rows
    displacement -= weights.sum(1, keepdim=True) * (anchor_rows - shift)
    displacement += anchor_rows - x
    if math.isfinite(k):
        log_mass = -(k / 2) * (nearest + offset).log() + total.log()
    else:
        log_mass = -nearest / (2 * t * t) + total.log()
    return displacement, log_mass, anchor, -total.log()


def backward(
    x: Tensor,
    t: Tensor,
    values: Tensor,
    table: Tensor,
    operands: list[Tensor],
    k: float,
    displacement: Tensor,
    anchor_x0: Tensor,
    anchor_log_weight: Tensor,
    grad_displacement: Tensor,
    grad_log_mass: Tensor,
    values_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """This chunk's share of the gradients: 2 Σ_j c_j (x0_j − x), dt and, if asked for, dx0."""
    x, rows = x.double(), decode(values, table)
    to_anchor = anchor_x0 - x
    squares, nearest = _squared_distances(x, rows), to_anchor.square().sum(1)
    weights = _relative_logits(squares, nearest, t, k).add_(anchor_log_weight[:, None])
    weights = weights.clamp_(max=0).exp_()  # beside rounding, which a large slope multiplies

    # a_j = g·(x0_j − x − v) = g·(x0_j − x0_a) − g·(v − (x0_a − x))
    shift = anchor_x0[:1].sum(0)
    rows = rows - shift
    projection = (grad_displacement * (anchor_x0 - shift + (displacement - to_anchor))).sum(1)
    coefficients = grad_displacement @ rows.T
    coefficients += (grad_log_mass - projection)[:, None]
    coefficients *= weights
    if math.isfinite(k):
        offset = _offset(t, k)
        singular = (nearest + offset == 0)[:, None]
        weights.masked_fill_(singular, 0.0)
        coefficients *= (k / 2) / (squares + offset[:, None])
        coefficients.masked_fill_(singular, 0.0)
        dt = -2 * t * coefficients.sum(1)
    else:
        coefficients /= (2 * t * t)[:, None]
        dt = 2 / t * (coefficients * squares).sum(1)
    # A reference on the query itself pulls on nothing, but its coefficient may be huge.
    coefficients.masked_fill_(squares == 0, 0.0)
    x_shifted = x - shift
    total = coefficients.sum(1, keepdim=True)
    dx = 2 * (coefficients @ rows - total * x_shifted)
    if not values_grad:
        return dx, dt, None
    dvalues = weights.T @ grad_displacement + 2 * (coefficients.T @ x_shifted)
    dvalues -= 2 * coefficients.sum(0)[:, None] * rows
    return dx, dt, dvalues


def _squared_distances(x: Tensor, rows: Tensor) -> Tensor:
    """‖x_i − x0_j‖² (B, N) by direct differences; an infinite one is NaN, never a small weight."""
    distances = torch.cdist(x, rows, compute_mode="donot_use_mm_for_euclid_dist")
    squares = distances.square_()
    return squares.masked_fill_(squares.isinf(), math.nan)


def _offset(t: Tensor, k: float) -> Tensor:
    """What t adds to a squared distance in s (B,); NaN where t is infinite."""
    return t * t if math.isfinite(k) else t - t


def _relative_logits(squares: Tensor, nearest: Tensor, t: Tensor, k: float) -> Tensor:
    """Logits relative to that of a reference at the squared distance `nearest`, (B, N)."""
    difference = squares - nearest[:, None]
    if not math.isfinite(k):
        return difference.div_((-2 * t * t)[:, None])
    # Without t², which cancels: its rounding would move the logits of a large k. At the singular
    # point (s = 0) the coinciding references share all the weight.
    s = (nearest + _offset(t, k))[:, None]
    difference = torch.where((s == 0) & (squares > 0), math.inf, difference.div_(s))
    return torch.where((s == 0) & (squares == 0), 0.0, difference).log1p_().mul_(-k / 2)
