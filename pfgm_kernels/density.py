# SPDX-License-Identifier: Apache-2.0
"""What the empirical flow has in closed form: its density, and the divergence of its velocity."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pfgm_kernels._checks import holds, positive
from pfgm_kernels._traced import traceable
from pfgm_kernels.autograd import apply_trace
from pfgm_kernels.field import expand_t, poisson_displacement, resolve, seen, told
from pfgm_kernels.references import ReferenceSet


def log_density(
    x: Tensor,
    t: Tensor | float,
    x0: Tensor | ReferenceSet,
    *,
    D: float = 1,
    labels: Tensor | int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The log density of the empirical flow at height t, exactly: log (1/N) Σ_j p_t(x | x0_j).

        p_t(x | y) = Γ((d+D)/2) / (Γ(D/2) π^(d/2)) · |t|^D · (‖x − y‖² + t²)^(−(d+D)/2)

    and N(y, t² I) for D = ∞. It is normalised over R^d: at t = T it is the prior seen from all the
    data (`flow.log_prior` has one reference at the origin), as t → 0 the data itself. This is the
    log mass of `poisson_displacement` plus a constant, as accurate (1e-6 in nats, beside some
    roundings of D log t), and differentiable in x, t and a tensor x0 as that is, in both modes.

    At t = 0 there is no density: it is +∞ on a reference, −∞ elsewhere, and NaN for D = ∞.

    With labels it is the density of the query's class, and N that class's number of references.

    Arguments and errors are those of `poisson_field`, but for D > 0: the field without the extra
    dimension (D = 0) has no normalised density.

    Returns:
        (B,) float64, in nats.
    """
    D = positive("D", D, finite=False)
    log_mass = poisson_displacement(x, t, x0, D=D, labels=labels, backend=backend)[1]
    d = math.prod(x.shape[1:])
    count = log_mass.new_zeros(()) + len(x0)
    if labels is not None:
        assert isinstance(x0, ReferenceSet)  # which the call above has looked at
        assert x0.classes is not None
        _, classes, missing = seen(labels, x0, x)
        count = x0.classes.counts[classes.masked_fill(missing, 0)].double()
    height = expand_t(t, x, D).double().abs()
    # The limit on a reference, and gradients that are not NaN there.
    singular = log_mass == math.inf
    log_height = height.masked_fill(singular, 1.0).log()
    power = D if holds(math.inf > D) else -d
    return log_mass - count.log() + log_normalizer(d, D, x.device) + power * log_height


def log_normalizer(d: int, D: float, device: torch.device) -> Tensor:
    """log Γ((d+D)/2) / (Γ(D/2) π^(d/2)), 0-dim float64: by how much |t|^D (‖x‖² + t²)^(−(d+D)/2)
    falls short of a density on R^d; for D = ∞ that of |t|^−d exp(−‖x‖²/2t²).
    """
    # Constants as tensors: torch.compile would trace every number of math's functions anew.
    zero = torch.zeros((), dtype=torch.float64, device=device)
    if not holds(math.inf > D):
        return zero - d / 2 * math.log(2 * math.pi)
    return (zero + (d + D) / 2).lgamma() - (zero + D / 2).lgamma() - d / 2 * math.log(math.pi)


def divergence(
    x: Tensor,
    t: Tensor | float,
    x0: Tensor | ReferenceSet,
    *,
    D: float = 1,
    labels: Tensor | int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The divergence by x of the flow's velocity v / (−t), exactly and without probes.

    With y_j = x0_j − x, k = d + D and w, s and v of `poisson_displacement`

        div_x(v / (−t)) = (d − tr)/t,   tr = Σ_j w_j (k/s_j) y_j·(y_j − v)

    (D = ∞: 1/t² for k/s_j), tr being the trace of the derivative of the posterior mean x + v. It
    costs about two calls of `poisson_displacement`, whatever d. Accurate to 1e-5 of the terms,
    (d + Σ_j w_j (k/s_j) ‖y_j‖ ‖y_j − v‖)/|t|, for float32 input, and to 1e-9 for float64. (On GPUs
    to 2e-5, for D = ∞ of (d + ‖v‖²/t²)/|t|; and there portable sums serve where D > 7d.)

    Differentiable in x, t and a tensor x0, backward and once. These gradients are derivatives of
    the field's own: portable sums in float64 compute them on every backend, an order of magnitude
    slower than the divergence.

    At t = 0 it is infinite, or NaN for D = ∞.

    Arguments and errors are those of `poisson_field`.

    Returns:
        (B,) float64.
    """
    with told(x0):
        call = resolve(x, t, x0, D, labels, backend, derivatives=True)
    trace = apply_trace(*call.inputs, *traceable(call.k), call.ranges, *call.ending)
    return call.restore((math.prod(x.shape[1:]) - trace) / call.inputs[1].double())
