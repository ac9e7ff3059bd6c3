# SPDX-License-Identifier: Apache-2.0
"""The ground truth: float64 direct differences, one query at a time; and the accuracy contract."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# The contract: error of a row divided by its condition number (of a gradient, by its terms).
FLOAT64 = 1e-10
LOG_MASS = 1e-6
GRADIENT = 1e-5

CUT = math.exp(-16)  # weights below CUT / N of the heaviest need not be summed
CHUNK = 1 << 17  # elements of a block of differences: they stay in cache


def float32_contract(backend: str, named: bool = True) -> float:
    """Error / condition number allowed for float32 input, before the output is rounded.

    named: the cases that the contract names: d ≤ 16, images, near-duplicates, data points.
    """
    if backend == "eager":
        return 1e-9
    return 1e-6 if named or backend == "cpu" else 5e-6


@dataclass(frozen=True)
class Truth:
    """All float64: v (B, d), log_mass (B,), weights (B, N), distances ‖x − x0‖ (B, N), t (B,)."""

    v: Tensor
    log_mass: Tensor
    weights: Tensor
    distances: Tensor
    t: Tensor

    @property
    def effective_sample_size(self) -> Tensor:
        """1 / Σ_j w_j² (B,): how many references share the weight."""
        return 1 / self.weights.square().sum(1)

    @property
    def norm(self) -> Tensor:
        """‖(v, −t)‖ (B,)."""
        return torch.cat([self.v, self.t[:, None]], 1).norm(dim=1)

    @property
    def term_norm(self) -> Tensor:
        """Σ_j w_j ‖(x0_j − x, −t)‖ (B,): the norm times the condition number κ."""
        return (self.weights * torch.hypot(self.distances, self.t[:, None])).sum(1)

    def term_weights(self, tolerance: float) -> Tensor:
        """Weights (B, N) for sums of terms that are then multiplied by a tolerance.

        Those that need not be summed count in full, and what may round when they are left out.
        """
        least = min(tolerance, CUT) / self.weights.shape[1] * self.weights.amax(1, keepdim=True)
        return self.weights * torch.where(self.weights < least, (1 + 1e-6) / tolerance, 1.0)

    def field(self, gamma: float = 0.0, scale: float = 1.0) -> Tensor:
        """(B, d + 1), Eq. (12)."""
        vector = torch.cat([self.v, -self.t[:, None]], 1)
        return scale * vector / (self.norm[:, None] + gamma)


@contextmanager
def one_thread() -> Iterator[None]:
    """Blocks this small are faster on one thread than on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@one_thread()
def solve(x: Tensor, t: Tensor | float, x0: Tensor, D: float = 1) -> Truth:
    """x (B, *event), t number or (B,), x0 (N, *event), any dtype."""
    x, t, x0 = _flat(x, t, x0)
    k = x.shape[1] + D
    v, log_mass = torch.empty_like(x), torch.empty_like(t)
    weights = x.new_empty(len(x), len(x0))
    squares = torch.empty_like(weights)
    for b in range(len(x)):
        for part, difference in _differences(x[b], x0):
            squares[b, part] = difference.square().sum(1)
        nearest = squares[b].min()
        # Without t², which cancels: its rounding would move the logits of a large D.
        excess, s = squares[b] - nearest, nearest + t[b] ** 2
        if math.isinf(D):
            logits, log_mass[b] = -excess / (2 * t[b] ** 2), -nearest / (2 * t[b] ** 2)
        elif s == 0:
            logits, log_mass[b] = torch.where(excess == 0, 0.0, -math.inf), math.inf
        else:
            logits, log_mass[b] = -(k / 2) * (excess / s).log1p(), -(k / 2) * s.log()
        log_mass[b] += logits.logsumexp(0)
        weights[b] = logits.softmax(0)
        v[b] = 0
        for part, difference in _differences(x[b], x0):
            v[b] += weights[b, part] @ difference
    return Truth(v, log_mass, weights, squares.sqrt(), t)


@dataclass(frozen=True)
class Gradients:
    """Gradients in float64 with, for each, the sum of the absolute values of its terms.

    The terms of weights that need not be summed count 1 / GRADIENT times. dx_size (B,) is
    ‖g_v‖ + 2 Σ_j |c_j| ‖x − x0_j‖, which leaves out what cancels within c_j: a stricter scale, by
    some √d, where c_j is not mostly cancellation.
    """

    dx: Tensor
    dt: Tensor
    dx0: Tensor
    dx_terms: Tensor
    dt_terms: Tensor
    dx0_terms: Tensor
    dx_size: Tensor


@one_thread()
def differentiate(
    truth: Truth, x: Tensor, x0: Tensor, g_v: Tensor, g_m: Tensor, D: float = 1
) -> Gradients:
    """Gradients of (g_v · v).sum() + (g_m · log_mass).sum(), flattened: (B, d), (B,), (N, d).

    With a_j = g_v·(x0_j − x − v) and c_j = (k/2) w_j (a_j + g_m) / s_j:

        dx = −g_v − 2 Σ_j c_j (x − x0_j),  dt = −2t Σ_j c_j,
        dx0_j = Σ_b (w_j g_v + 2 c_j (x − x0_j))

    and for D = ∞ c_j = w_j (a_j + g_m) / (2t²), dt = Σ_j w_j (a_j + g_m) ‖x − x0_j‖² / t³.
    """
    x, t, x0 = _flat(x, truth.t, x0)
    term_weights = truth.term_weights(GRADIENT)
    g_v = g_v.double().reshape(x.shape)
    dx, dx_terms, dx_size = -g_v, g_v.abs(), g_v.norm(dim=1)
    dt, dt_terms = torch.zeros_like(t), torch.zeros_like(t)
    dx0, dx0_terms = torch.zeros_like(x0), torch.zeros_like(x0)
    for b, g in enumerate(g_v):
        s = truth.distances[b].square() + (0 if math.isinf(D) else t[b] ** 2)
        if not math.isinf(D) and s.min() == 0:  # the singular point: zero by convention
            dx[b] = 0
            continue
        slope = (0.5 / t[b] ** 2).expand(len(x0)) if math.isinf(D) else (x.shape[1] + D) / 2 / s
        dt_factor = 2 * s / t[b] if math.isinf(D) else -2 * t[b]
        for part, difference in _differences(x[b], x0):
            size = difference.abs()
            weights, terms = truth.weights[b, part, None], term_weights[b, part, None]
            pull = difference @ g - truth.v[b] @ g + g_m[b]
            pull *= weights[:, 0] * slope[part]
            pull_terms = size @ g.abs() + truth.v[b].abs() @ g.abs() + g_m[b].abs()
            pull_terms *= terms[:, 0] * slope[part]
            factor = dt_factor[part] if math.isinf(D) else dt_factor
            dx[b] += 2 * (pull @ difference)
            dx_terms[b] += 2 * (pull_terms @ size)
            dx_size[b] += 2 * (pull.abs() @ truth.distances[b, part])
            dt[b] += (pull * factor).sum()
            dt_terms[b] += (pull_terms * factor).abs().sum()
            dx0[part] += weights * g - 2 * pull[:, None] * difference
            dx0_terms[part] += terms * g.abs() + 2 * pull_terms[:, None] * size
    return Gradients(dx, dt, dx0, dx_terms, dt_terms, dx0_terms, dx_size)


@dataclass(frozen=True)
class Tangents:
    """Tangents of v (B, d) and log_mass (B,) in float64.

    The `terms` (B,) are the sums of the absolute values of what is summed, with s = ‖x − x0‖² + t²
    and ‖ẋ − ẋ0_j‖ for ‖ẋ‖ where the references move:

        dlog_mass_terms = Σ_j w_j L_j,  L_j = (k/s_j) (‖ẋ‖ ‖x − x0_j‖ + |t ṫ|)
        dv_terms = Σ_j w_j ‖ẋ‖ + Σ_j w_j (L_j + dlog_mass_terms) ‖x − x0_j‖

    and for D = ∞ L_j = (‖ẋ‖ ‖x − x0_j‖ + ‖x − x0_j‖² |ṫ/t|) / t². The terms of weights that need
    not be summed count 1 / GRADIENT times. dv_size (B,) is dv_terms with |l̇_j − l̄| in the place
    of L_j + dlog_mass_terms: a stricter scale, which leaves out what cancels within l̇_j − l̄.
    """

    dv: Tensor
    dlog_mass: Tensor
    dv_terms: Tensor
    dlog_mass_terms: Tensor
    dv_size: Tensor


@one_thread()
def jvp(
    truth: Truth,
    x: Tensor,
    x0: Tensor,
    x_dot: Tensor,
    t_dot: Tensor,
    x0_dot: Tensor | None = None,
    D: float = 1,
) -> Tangents:
    """Tangents of v and log_mass for those of x (B, *event), t (B,) and x0 (N, *event):

        ṡ_j = 2 (x − x0_j)·(ẋ − ẋ0_j) + 2 t ṫ,  l̇_j = −(k/2) ṡ_j / s_j,  l̄ = Σ_j w_j l̇_j
        d log_mass = l̄,  dv = Σ_j w_j (ẋ0_j − ẋ) + Σ_j w_j (l̇_j − l̄) (x0_j − x)

    and for D = ∞ l̇_j = −(x − x0_j)·(ẋ − ẋ0_j) / t² + ‖x − x0_j‖² ṫ / t³.
    """
    x, t, x0 = _flat(x, truth.t, x0)
    x_dot, t_dot, x0_dot = _flat(x_dot, t_dot, torch.zeros_like(x0) if x0_dot is None else x0_dot)
    weights, distances = truth.weights, truth.distances
    dlogits, speeds, sizes = (torch.zeros_like(weights) for _ in range(3))
    for b in range(len(x)):
        s = distances[b].square() + (0 if math.isinf(D) else t[b] ** 2)
        if s.min() == 0 and not math.isinf(D):  # the singular point: zero by convention
            continue
        slope = 1 / t[b] ** 2 if math.isinf(D) else (x.shape[1] + D) / s
        stretch = -s * t_dot[b] / t[b] if math.isinf(D) else t[b] * t_dot[b]
        for part, difference in _differences(x[b], x0):
            speeds[b, part] = (x_dot[b] - x0_dot[part]).norm(dim=1)
            dlogits[b, part] = (difference * (x_dot[b] - x0_dot[part])).sum(1)
        dlogits[b] = slope * (dlogits[b] - stretch)
        sizes[b] = slope * (speeds[b] * distances[b] + stretch.abs())
    dlog_mass = (weights * dlogits).sum(1)
    excess = dlogits - dlog_mass[:, None]
    dv = torch.zeros_like(x)
    for b in torch.nonzero(speeds.amax(1) + sizes.amax(1))[:, 0]:
        for part, difference in _differences(x[b], x0):
            dv[b] += weights[b, part] @ (x0_dot[part] - x_dot[b])
            dv[b] += (weights[b, part] * excess[b, part]) @ difference
    terms = truth.term_weights(GRADIENT)
    dlog_mass_terms = (terms * sizes).sum(1)
    dv_terms, dv_size = (
        (terms * (speeds + size * distances)).sum(1)
        for size in (sizes + dlog_mass_terms[:, None], excess.abs())
    )
    return Tangents(dv, dlog_mass, dv_terms, dlog_mass_terms, dv_size)


@one_thread()
def trace(truth: Truth, x: Tensor, x0: Tensor, D: float = 1) -> tuple[Tensor, Tensor]:
    """Of the derivative of x + v by x (B,), with y_j = x0_j − x, and the sum of its terms' sizes:

        tr = Σ_j w_j (k/s_j) y_j·(y_j − v),  Σ_j w_j (k/s_j) ‖y_j‖ ‖y_j − v‖    (D = ∞: 1/t²)

    The terms of weights that need not be summed count 1 / GRADIENT times.
    """
    x, t, x0 = _flat(x, truth.t, x0)
    k, term_weights = x.shape[1] + D, truth.term_weights(GRADIENT)
    value, terms = torch.zeros_like(t), torch.zeros_like(t)
    for b in range(len(x)):
        s = truth.distances[b].square() + t[b] ** 2
        if not math.isinf(D) and s.min() == 0:  # the singular point: zero by convention
            continue
        slope = t[b] ** -2 * torch.ones_like(s) if math.isinf(D) else k / s
        for part, difference in _differences(x[b], x0):
            rest = difference - truth.v[b]
            value[b] += (truth.weights[b, part] * slope[part]) @ (difference * rest).sum(1)
            sizes = difference.norm(dim=1) * rest.norm(dim=1)
            terms[b] += (term_weights[b, part] * slope[part]) @ sizes
    return value, terms


def assert_displacement(v: Tensor, truth: Truth, tolerance: float) -> None:
    """v (B, *event) within the contract, on top of the rounding of its dtype.

    Relative to Σ_j w_j ‖x0_j − x‖, stricter than the contract's Σ_j w_j ‖(x0_j − x, −t)‖ where t
    is large.
    """
    scale = (truth.term_weights(tolerance) * truth.distances).sum(1)
    _assert_rows(v.reshape(truth.v.shape), truth.v, tolerance * scale, "displacement")


def assert_field(
    field: Tensor, truth: Truth, tolerance: float, gamma: float = 0.0, scale: float = 1.0
) -> None:
    """field (B, d + 1): the relative error of each row, divided by κ, within the contract."""
    expected = truth.field(gamma, scale)
    kappa = truth.term_norm / truth.norm
    _assert_rows(field, expected, tolerance * kappa * expected.norm(dim=1), "field")


def assert_log_mass(log_mass: Tensor, truth: Truth) -> None:
    """Within 1e-6, or a few units in the last place where float64 has no such digits."""
    assert log_mass.dtype == torch.float64
    allowed = LOG_MASS + 8 * torch.finfo(torch.float64).eps * truth.log_mass.abs()
    error = (log_mass - truth.log_mass).abs()
    assert (error <= allowed).all(), f"log_mass is off by {error.max():.2e}"


def assert_gradients(
    truth: Gradients, dx: Tensor | None = None, dt: Tensor | None = None, dx0: Tensor | None = None
) -> None:
    """Each row within 1e-5 of the sum of the absolute values of its terms."""
    if dx is not None:
        allowed = GRADIENT * truth.dx_terms.norm(dim=1)
        _assert_rows(dx.reshape(truth.dx.shape), truth.dx, allowed, "gradient of x")
    if dt is not None:
        _assert_rows(dt[:, None], truth.dt[:, None], GRADIENT * truth.dt_terms, "gradient of t")
    if dx0 is not None:
        allowed = GRADIENT * truth.dx0_terms.norm(dim=1)
        _assert_rows(dx0.reshape(truth.dx0.shape), truth.dx0, allowed, "gradient of x0")


def assert_tangents(truth: Tangents, dv: Tensor, dlog_mass: Tensor, tolerance: float) -> None:
    """Each row within the tolerance times the sum of the absolute values of its terms."""
    _assert_rows(dv.reshape(truth.dv.shape), truth.dv, tolerance * truth.dv_terms, "tangent of v")
    allowed = tolerance * truth.dlog_mass_terms
    _assert_rows(dlog_mass[:, None], truth.dlog_mass[:, None], allowed, "tangent of log_mass")


def assert_tangent_of_v(truth: Tangents, dv: Tensor, tolerance: float) -> None:
    """Each row within the tolerance times the stricter scale."""
    allowed = tolerance * truth.dv_size
    _assert_rows(dv.reshape(truth.dv.shape), truth.dv, allowed, "tangent of v, strictly")


def assert_gradient_of_x(truth: Gradients, dx: Tensor) -> None:
    """Each row within 1e-5 of the stricter scale, for cases that plain float32 code gets wrong."""
    allowed = GRADIENT * truth.dx_size
    _assert_rows(dx.reshape(truth.dx.shape), truth.dx, allowed, "gradient of x, strictly")


def _assert_rows(actual: Tensor, expected: Tensor, allowed: Tensor, name: str) -> None:
    assert actual.shape == expected.shape
    rounding: Tensor | float = 0.0
    if actual.dtype != torch.float64:
        info = torch.finfo(actual.dtype)
        actual, expected = actual.clamp(-info.max, info.max), expected.clamp(-info.max, info.max)
        rounding = expected.abs() * (info.eps / 2) + info.smallest_normal * info.eps
    error = ((actual.double() - expected).abs() - rounding).clamp(min=0).norm(dim=1)
    bad = ~(error <= allowed)  # NaN is bad
    worst = (error / allowed).nan_to_num(nan=math.inf).argmax() if bad.any() else None
    assert not bad.any(), (
        f"{name}: {int(bad.sum())} of {len(bad)} rows are off, row {worst} by {error[worst]:.3e} "
        f"where {allowed[worst]:.3e} is allowed"
    )


def _flat(x: Tensor, t: Tensor | float, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().double().reshape(len(x), -1)
    t = torch.as_tensor(t, dtype=torch.float64).detach().expand(len(x))
    return x, t, x0.detach().double().reshape(len(x0), -1)


def _differences(x: Tensor, x0: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of x0 − x (n, d) for one query x (d,)."""
    rows = max(1, CHUNK // x0.shape[1])
    for start in range(0, len(x0), rows):
        yield slice(start, start + rows), x0[start : start + rows] - x
