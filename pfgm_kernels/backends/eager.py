# SPDX-License-Identifier: Apache-2.0
"""Portable PyTorch in float64, on any device: the fallback and the baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pfgm_kernels.backends._values import decode
from pfgm_kernels.rows import Cotangents, Rows

WORK = 1 << 30
"""Columns of pairs in a chunk, so that an interrupt is noticed within about a second."""


MOST_AWAY = 1024
"""How many times as far as a sum's terms are long what they are relative to may lie: a sum in
float64 loses as many of its roundings."""


def unsupported_reason(device: torch.device | None = None) -> str | None:
    if device is not None and device.type == "mps":
        return "it computes in float64, which MPS devices do not have"
    return None


def chunk_shape(
    batch: int, count: int, d: int, workspace: int, prepared: bool, values_grad: bool
) -> tuple[int, int]:
    """Queries and references per chunk that keep the float64 temporaries within `workspace`, and a
    chunk to about a second.

    A reference costs two rows of d (and its decoding indices), a pair seven matrix entries, in the
    backward pass.
    """
    count = max(1, min(count, workspace // 2 // (3 * 8 * d)))
    pairs = max(1, min(workspace // 2 // (7 * 8), WORK // (d + 8)))
    rows = max(1, min(batch, pairs // min(count, 64)))
    return rows, max(1, min(count, pairs // rows))


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
    anchor_rows, shared = rows[anchor], weights.sum(1)
    displacement = anchor_rows - x
    for queries, shift in _regions(anchor_rows, shared, weights, squares):
        displacement[queries] += weights[queries] @ (rows - shift)
        displacement[queries] -= shared[queries, None] * (anchor_rows[queries] - shift)
    if math.isfinite(k):
        log_mass = -(k / 2) * (nearest + offset).log() + total.log()
    else:
        log_mass = -nearest / (2 * t * t) + total.log()
    return displacement, log_mass, anchor, -total.log()


def backward(
    rows: Rows,
    values: Tensor,
    table: Tensor,
    operands: list[Tensor],
    cotangents: Cotangents,
    values_grad: bool,
) -> Tensor | None:
    """Adds this chunk's share of the gradients, 2 Σ_j c_j (x0_j − x) and dt. Returns dx0."""
    pairs, g = _Pairs(rows, values, table), cotangents.g
    # a_j = g·(x0_j − x − v) = g·(x0_j − x0_a) − g·(v − (x0_a − x))
    pull = pairs.project(g)
    pull += (cotangents.g_m - (g * rows.residual).sum(1))[:, None]
    coefficients = pairs.coefficients(pull)
    cotangents.dt.add_(pairs.gradient_of_t(coefficients))
    cotangents.dx.add_(pairs.sum(coefficients))
    if not values_grad:
        return None
    return pairs.weights.T @ g + pairs.sum_over_queries(coefficients)


def jvp(
    rows: Rows,
    values: Tensor,
    table: Tensor,
    operands: list[Tensor],
    x_tangent: Tensor,
    t_tangent: Tensor,
    centre: Tensor,
    values_tangent: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """This chunk's share of Σ_j w_j ((l̇_j − l̇)(x0_j − x) + ẋ0_j) and of Σ_j w_j (l̇_j − l̇).

    With l̇ the centre, p_j = (x0_j − x)·(ẋ − ẋ0_j), q = (x0_a − x)·ẋ, u_j the relative excess of
    s_j over s_a and κ = l̇ s_a/k,

        l̇_j − l̇ = (k/s_j) (p_j − q + (q − t ṫ − κ) − κ u_j)

    and for D = ∞ (p_j − q)/t² + (‖x − x0_j‖² − ‖x − x0_a‖²) ṫ/t³ + (q + ‖x − x0_a‖² ṫ/t)/t² − l̇.
    """
    pairs, t, k = _Pairs(rows, values, table), rows.t, rows.k
    pull = pairs.project(x_tangent, values_tangent)
    anchor_pull = (pairs.to_anchor * x_tangent).sum(1)
    if math.isfinite(k):
        tilt = centre * (pairs.nearest + t * t) / k
        pull += (anchor_pull - t * t_tangent - tilt)[:, None]
    else:
        tilt = -t_tangent / t
        pull += (anchor_pull + pairs.nearest * t_tangent / t - centre * t * t)[:, None]
    pull -= tilt[:, None] * pairs.excess()
    coefficients = pairs.coefficients(pull)
    slope, moved = 2 * coefficients.sum(1), pairs.sum(coefficients)
    if values_tangent is not None:
        moved += pairs.weights @ values_tangent
    return moved, slope


def trace(rows: Rows, values: Tensor, table: Tensor, operands: list[Tensor]) -> Tensor:
    """This chunk's share of Σ_j w_j (k/s_j) y_j·(y_j − v) (n,), y_j = x0_j − x (D = ∞: 1/t²)."""
    pairs = _Pairs(rows, values, table)
    return 2 * pairs.coefficients(pairs.spread(rows)).sum(1)


def trace_sums(rows: Rows, values: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`trace` (n,), Σ_j w_j k/s_j (n,) and Σ_j w_j (k/s_j) y_j (n, d)."""
    pairs = _Pairs(rows, values, table)
    trace = 2 * pairs.coefficients(pairs.spread(rows)).sum(1)
    slopes = pairs.coefficients(torch.ones_like(pairs.weights))
    return trace, 2 * slopes.sum(1), pairs.sum(slopes)


def trace_gradients(
    rows: Rows,
    values: Tensor,
    table: Tensor,
    g: Tensor,
    trace: Tensor,
    pull: Tensor,
    values_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """This chunk's share of 2 g Σ_j C_j y_j (n, d) and of what they give for t (n,), and dx0, for
    the cotangent g (n,) of the trace; pull is P (`trace.field_trace_backward`).
    """
    pairs, t, k = _Pairs(rows, values, table), rows.t, rows.k
    spread = pairs.spread(rows)
    # (k/s_j) y_j·(y_j − v) without the weight, of which some are 0.
    slope = k / (pairs.squares + (t * t)[:, None]) if math.isfinite(k) else (1 / (t * t))[:, None]
    excess = slope * spread - trace[:, None]
    excess -= pairs.project(pull) - (pull * rows.residual).sum(1)[:, None]
    excess /= 2
    if math.isfinite(k):
        excess += spread * slope / k
    coefficients = pairs.coefficients(2 * g[:, None] * excess)
    gradient_x, gradient_t = pairs.sum(coefficients), pairs.gradient_of_t(coefficients)
    if not values_grad:
        return gradient_x, gradient_t, None
    slopes = pairs.coefficients(2 * g[:, None].expand_as(spread).clone())
    gradient = pairs.sum_over_queries(coefficients - slopes)
    gradient -= slopes.T @ rows.v + (pairs.weights * g[:, None]).T @ pull
    return gradient_x, gradient_t, gradient


class _Pairs:
    """Queries (n, d) and references (m, d) of a chunk with the weights (n, m), recomputed from
    those of the anchors.
    """

    def __init__(self, queries: Rows, values: Tensor, table: Tensor) -> None:
        self.x, self.rows = queries.x.double(), decode(values, table)
        self.t, self.k = t, k = queries.t, queries.k
        self.anchor_x0, self.to_anchor = queries.anchor_x0, queries.anchor_x0 - self.x
        self.squares = _squared_distances(self.x, self.rows)
        self.nearest = self.to_anchor.square().sum(1)
        logits = _relative_logits(self.squares, self.nearest, t, k)
        logits += queries.anchor_log_weight[:, None]
        # At most 1 beside rounding, which a large slope multiplies.
        self.weights = logits.clamp_(max=0).exp_()
        if math.isfinite(k):
            self.singular = (self.nearest + _offset(t, k) == 0)[:, None]
        counted = self._apart(self.weights).sum(1)
        self.regions = list(_regions(self.anchor_x0, counted, self.weights, self.squares))

    def project(self, g: Tensor, moving: Tensor | None = None) -> Tensor:
        """g·(x0_j − x0_a) (n, m), where references move less ẋ0_j·(x0_j − x).

        What may be rounding alone is 0: then the anchor's is, whose s may be next to nothing.
        """
        projections = torch.empty_like(self.weights)
        for queries, shift in self.regions:
            rows, anchors = self.rows - shift, self.anchor_x0[queries] - shift
            directions, row_sizes = g[queries], rows.norm(dim=1)
            projection = (directions @ rows.T).sub_((directions * anchors).sum(1)[:, None])
            noise = row_sizes + anchors.norm(dim=1)[:, None]
            noise *= directions.norm(dim=1)[:, None]
            if moving is not None:
                x = self.x[queries] - shift
                projection += x @ moving.T - (rows * moving).sum(1)
                noise += (row_sizes + x.norm(dim=1)[:, None]) * moving.norm(dim=1)
            noise *= 8 * torch.finfo(noise.dtype).eps
            projections[queries] = projection.masked_fill_(projection.abs() <= noise, 0.0)
        return projections

    def excess(self) -> Tensor:
        """(s_j − s_a)/s_a (n, m), or ‖x − x0_j‖² − ‖x − x0_a‖² for D = ∞."""
        excess = self.squares - self.nearest[:, None]
        if math.isfinite(self.k):
            excess /= (self.nearest + _offset(self.t, self.k))[:, None]
        return excess

    def spread(self, queries: Rows) -> Tensor:
        """y_j·(y_j − v) (n, m), y_j = x0_j − x: ‖y_j‖² − ‖y_a‖² − v·(y_j − y_a) − y_a·(v − y_a)."""
        spread = self.squares - self.nearest[:, None]
        spread -= self.project(queries.v)
        return spread.sub_((self.to_anchor * queries.residual).sum(1)[:, None])

    def coefficients(self, pull: Tensor) -> Tensor:
        """(k/2) w_j pull_j/s_j, or w_j pull_j/(2t²) for D = ∞ (n, m), in place of pull."""
        pull *= self.weights
        if not math.isfinite(self.k):
            return pull.div_((2 * self.t * self.t)[:, None])
        pull *= (self.k / 2) / (self.squares + _offset(self.t, self.k)[:, None])
        return pull.masked_fill_(self.singular, 0.0)

    def gradient_of_t(self, coefficients: Tensor) -> Tensor:
        """−2t Σ_j c_j (n,), or (2/t) Σ_j c_j ‖x − x0_j‖² for D = ∞."""
        if math.isfinite(self.k):
            return -2 * self.t * coefficients.sum(1)
        return 2 / self.t * (coefficients * self.squares).sum(1)

    def sum(self, coefficients: Tensor) -> Tensor:
        """2 Σ_j c_j (x0_j − x) (n, d)."""
        apart, sums = self._apart(coefficients), torch.empty_like(self.x)
        for queries, shift in self.regions:
            part = apart[queries]
            sums[queries] = part @ (self.rows - shift)
            sums[queries] -= part.sum(1, keepdim=True) * (self.x[queries] - shift)
        return sums.mul_(2)

    def sum_over_queries(self, coefficients: Tensor) -> Tensor:
        """2 Σ_i c_i (x_i − x0) (m, d)."""
        apart, sums = self._apart(coefficients), torch.zeros_like(self.rows)
        for queries, shift in self.regions:
            part = apart[queries]
            sums += part.T @ (self.x[queries] - shift)
            sums -= part.sum(0)[:, None] * (self.rows - shift)
        return sums.mul_(2)

    def _apart(self, coefficients: Tensor) -> Tensor:
        # A reference on the query itself pulls on nothing, but its coefficient may be huge.
        return coefficients.masked_fill(self.squares == 0, 0.0)


def _regions(
    anchors: Tensor, counted: Tensor, weights: Tensor, squares: Tensor
) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """Which queries, and a reference (d,) relative to which their sums lose no digits.

    All at once, unless their anchors (n, d) lie very much farther apart than the references that
    have their weights (n, m). counted: the weight of those that are summed so (n,). On a GPU always
    at once, whatever digits that loses: the host must not wait for values.
    """
    if anchors.device.type != "cpu":
        yield slice(None), anchors[:1].sum(0)
        return
    reach = (weights * squares.sqrt()).sum(1)
    left = torch.arange(len(anchors), device=anchors.device)
    while len(left):
        shift = anchors[left[0]]
        away = (anchors[left] - shift).norm(dim=1) * counted[left]
        far = away > MOST_AWAY * reach[left]
        here = left[~far]
        yield (slice(None) if len(here) == len(anchors) else here), shift
        left = left[far]


def _squared_distances(x: Tensor, rows: Tensor) -> Tensor:
    """‖x_i − x0_j‖² (B, N) by direct differences; an infinite one is NaN, never a small weight."""
    distances = torch.cdist(x, rows, compute_mode="donot_use_mm_for_euclid_dist")
    squares = distances.square_()
    return squares.add_(squares - squares)


def _offset(t: Tensor, k: float) -> Tensor:
    """What t adds to a squared distance in s (B,); NaN where t is infinite."""
    return t * t if math.isfinite(k) else t - t


def _relative_logits(squares: Tensor, nearest: Tensor, t: Tensor, k: float) -> Tensor:
    """Logits relative to that of a reference at the squared distance `nearest`, (B, N)."""
    difference = squares - nearest[:, None]
    if not math.isfinite(k):
        return difference.div_((-2 * t * t)[:, None])
    # Without t², which cancels: its rounding would move the logits of a large k. At the singular
    # point (s = 0) references that coincide share all the weight: what others get is infinite.
    s = (nearest + _offset(t, k))[:, None]
    difference.div_(s).masked_fill_((s == 0) & (squares == 0), 0.0)
    return difference.log1p_().mul_(-k / 2)
