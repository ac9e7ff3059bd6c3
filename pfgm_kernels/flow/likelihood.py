# SPDX-License-Identifier: Apache-2.0
"""Log densities under the flow of Eq. (4), by the instantaneous change of variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from pfgm_kernels._checks import integer, number, tensor
from pfgm_kernels.flow._queries import shaped
from pfgm_kernels.flow._slope import FieldFn, Slope
from pfgm_kernels.flow.ode import finite_batch
from pfgm_kernels.flow.prior import log_prior
from pfgm_kernels.flow.solvers import chosen, integrate
from pfgm_kernels.flow.substitution import Substitution

Divergence = Callable[..., Tensor]


class Likelihood(NamedTuple):
    """The result of `log_likelihood`."""

    log_p: Tensor
    """(B,) float64, in nats."""
    latent: Tensor
    """(B, *event), the states on the plane t = T."""
    nfe: int
    """Number of function evaluations: calls of the field."""


@torch.no_grad()
def log_likelihood(
    field_fn: FieldFn,
    x: Tensor,
    *,
    T: float | None = None,
    D: float = 1,
    t_min: float | None = None,
    solver: str | None = None,
    steps: int = 100,
    times: Iterable[float] | Tensor | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    per_sample: bool = False,
    divergence: str | Divergence = "hutchinson",
    probes: int = 1,
    generator: torch.Generator | None = None,
    substitution: Substitution | None = None,
    progress: Callable[[float], None] | None = None,
    **arguments: object,
) -> Likelihood:
    """The log density at t_min of what the field makes of the prior on the plane t = T.

    Along the lines of Eq. (4), d log p / dt = −div_x(F_x / F_t), so that

        log p(x, t_min) = log p_prior(x_T) + ∫ from t_min to T of div_x(F_x / F_t) dt

    with x_T the latent that `encode` finds: state and integral go through the solver together, in
    float64 (the field is asked in the dtype of x). Under the exact field of a data set this is
    `log_density` at t_min, but for the difference between the prior and the field's density on the
    plane t = T, which falls as T grows (digits of scikit-learn in [−1, 1], D = 1: 5e-3 bits per
    dimension at most at T = 40, 2e-4 at 1,000; 6e-5 at T = 40 where their mean is 0).

    Args:
        field_fn, x, T, t_min, solver, steps, times, rtol, atol, per_sample, substitution, progress,
            arguments: as for `encode`. A tolerance holds for the integral divided by d, too.
        D: > 0, of the prior; `math.inf` for N(0, T² I).
        divergence: "hutchinson" estimates it without bias as the mean over probes ε of
            ε·∂(ε·F_x / F_t)/∂x, at the cost of a backward pass each; "exact" takes d backward
            passes. Or a function (x (B, *event), t (B,), **arguments) -> (B,) of the divergence
            itself, as `pfgm_kernels.divergence` of a data set.
        probes: ≥ 1, how many of "hutchinson", of ±1 with equal chance; the same at all t.
        generator: of the probes, on any device.

    Returns:
        Likelihood (log_p (B,) float64 in nats, latent (B, *event), nfe). See `bits_per_dim`.

    Raises:
        TypeError, ValueError: an argument, or what a function returns, of the wrong type, shape or
            range; or a field without derivatives.
        FloatingPointError: dx/dt or its divergence is not finite.
        RuntimeError: rk45 does not get forward at these tolerances.
    """
    way = chosen(T, t_min, solver, steps, times, rtol, atol, per_sample)
    x = finite_batch(x)
    change = _Change(Slope(field_fn, x, substitution, arguments), x, divergence, probes, generator)

    def record(t: float, state: Tensor | None) -> None:
        if progress is not None:
            progress(way.fraction(way.times[-1], t))

    state = integrate(way, change, change.state(x), record, up=True)
    change.slope.check()
    latent, bent = change.parts(state)
    straight = change.d * math.log(way.times[0] / way.times[-1])
    # The prior's density at the latent in float64, before that is rounded.
    log_p = log_prior(latent, T=way.times[0], D=D) + straight + bent
    return Likelihood(log_p, latent.to(x.dtype), change.slope.nfe)


def bits_per_dim(log_p: Tensor, d: int, low: float, high: float) -> Tensor:
    """Bits per dimension of 8-bit data whose values 0 … 255 were scaled to low … high.

        bits = −log_p / (d log 2) − log2((high − low) / 255)

    The second term is the width of a value, by which a density becomes the probability of a cell:
    +6.994 for [−1, 1]. Where the data have uniform noise of that width added (dequantisation), the
    mean is an upper bound of the discrete code length. Xu et al. 2022 scale by 256 values instead,
    for an offset of 7: `high = low + 2 * 255 / 256`.

    Args:
        log_p: floating point of any shape, log densities in nats, of `log_likelihood`.
        d: ≥ 1, dimensions of one event.
        low, high: what 0 and 255 were scaled to, low < high.

    Returns:
        float64 of the shape of log_p.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """
    log_p = tensor("log_p", log_p, (torch.float32, torch.float64), "a float32 or float64 tensor")
    d, low, high = integer("d", d), number("low", low), number("high", high)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"bits_per_dim expects finite low < high, got {low} and {high}")
    return -log_p.double() / (d * math.log(2)) - math.log2((high - low) / 255)


class _Change:
    """The slope of states (B, d + 1) float64: x and, divided by √d, the integral of div − d / t.

    The divergence is d / t where lines are straight, whose integral d log(T / t_min) is known: what
    steps have to find is the rest. Divided by √d, its error in log p / d counts in the root mean
    square as that of one dimension of x.
    """

    def __init__(
        self,
        slope: Slope,
        x: Tensor,
        divergence: str | Divergence,
        probes: int,
        generator: torch.Generator | None,
    ) -> None:
        if not callable(divergence) and divergence not in ("hutchinson", "exact"):
            raise ValueError(
                f"divergence expects hutchinson, exact or a function, got {divergence!r}"
            )
        self.slope, self.divergence = slope, divergence
        self.dtype, self.event = x.dtype, x.shape[1:]
        self.d = self.event.numel()
        probes = integer("probes", probes)
        if divergence == "hutchinson":
            device = x.device if generator is None else generator.device
            shape = (probes, *x.shape)
            coins = torch.randint(0, 2, shape, generator=generator, device=device)
            self.probes = (2 * coins - 1).to(x)

    def state(self, x: Tensor) -> Tensor:
        return torch.cat([x.flatten(1).double(), x.new_zeros(len(x), 1, dtype=torch.float64)], 1)

    def parts(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return state[:, :-1].unflatten(1, self.event), state[:, -1] * math.sqrt(self.d)

    def __call__(self, state: Tensor, t: Tensor, rows: Tensor | None) -> Tensor:
        x = self.parts(state)[0].to(self.dtype)
        if callable(self.divergence):
            slope = self.slope(x, t, rows)
            divergence = self.divergence(x, t.to(x.dtype), **self.slope.arguments_of(rows))
            divergence = shaped("divergence's output", divergence, t.shape, "(B,)")
        else:
            slope, divergence = self._by_gradients(x, t, rows)
        self.slope.watch("div dx/dt", divergence[:, None], t)
        bent = (divergence.double() - self.d / t)[:, None] / math.sqrt(self.d)
        return torch.cat([slope.flatten(1).double(), bent], 1)

    def _by_gradients(self, x: Tensor, t: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            slope = self.slope(x, t, rows)
        if not slope.requires_grad:
            raise ValueError(
                f"divergence={self.divergence!r} expects a field_fn with gradients, got one without"
            )
        if self.divergence == "exact":
            units = torch.eye(slope[0].numel(), dtype=x.dtype, device=x.device)
            vectors = units.view(-1, 1, *self.event).expand(-1, *slope.shape)
        else:
            vectors = self.probes if rows is None else self.probes[:, rows]
        total = x.new_zeros(len(x), dtype=torch.float64)
        for place, vector in enumerate(vectors, 1):
            (pulled,) = torch.autograd.grad(slope, x, vector, retain_graph=place < len(vectors))
            total += (pulled * vector).flatten(1).sum(1, dtype=torch.float64)
        return slope.detach(), total if self.divergence == "exact" else total / len(vectors)
