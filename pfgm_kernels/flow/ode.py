# SPDX-License-Identifier: Apache-2.0
"""The sampling ODE of Xu et al. 2022, Eq. (4): dx/dt = F_x / F_t between t = T and t = 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pfgm_kernels._checks import batch
from pfgm_kernels.flow._slope import FieldFn, Slope
from pfgm_kernels.flow.churn import Churn, Noise
from pfgm_kernels.flow.solvers import Method, chosen, integrate, step
from pfgm_kernels.flow.substitution import Substitution


@dataclass(frozen=True)
class Trajectory:
    """The result of `sample` or `encode`."""

    x: Tensor
    """(B, *event), where the ODE ended."""
    nfe: int
    """Number of function evaluations: calls of the field, on the whole batch or what is left."""
    times: list[float]
    """t before each accepted step, then the t of `x`; only the ends for steps per sample."""
    path: Tensor | None
    """(len(times), B, *event), the states at `times`, if asked for."""
    evaluations: Tensor | None = None
    """(B,) int64, in how many of the calls each sample was, where steps are per sample."""


def sample(
    field_fn: FieldFn,
    x: Tensor,
    *,
    T: float | None = None,
    t_min: float | None = None,
    solver: str | None = None,
    steps: int = 100,
    times: Iterable[float] | Tensor | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    per_sample: bool = False,
    final_step: bool = True,
    churn: Churn | None = None,
    generator: torch.Generator | None = None,
    seeds: Iterable[int] | None = None,
    substitution: Substitution | None = None,
    differentiable: bool = False,
    keep_path: bool = False,
    progress: Callable[[float], None] | None = None,
    **arguments: object,
) -> Trajectory:
    """Integrate Eq. (4), dx/dt = F_x / F_t, from t = T down to the data.

    `euler`, `heun` and `heun_euler` step in t on a grid, of equal ratios from T to t_min unless
    `times` gives another (exact for the field of one source, whose lines are straight); `rk45` is
    Dormand–Prince in log t with adaptive steps. The error of a step is the root mean square over
    the event, relative to atol + rtol |x|; the largest over the samples decides, or with
    `per_sample` each sample has its own steps, and is not evaluated any more once it is there.

    Evaluations: `steps` (euler), 2 `steps` (heun), 2 `steps` − 1 (heun_euler), as needed (rk45),
    and one for the final step. Published counts: EDM's n steps are n − 1 of heun and the final
    one, `times=grid(T, t_min, n, rho=7)`, 2n − 1 evaluations; PFGM's "improved Euler" of n steps is
    `solver="heun_euler", steps=n, final_step=False`, 2n − 1 as well.

    Args:
        field_fn: (x (B, *event), t (B,), **arguments) -> (B, d + 1), the t-component last:
            `poisson_field` on a data set, or a trained network. Only the ratio of the components
            matters.
        x: (B, *event) float32 or float64, finite: the states at T, from `sample_prior`.
        T: > t_min, where to start, in the units of x; may be left out where `times` says it.
        t_min: > 0, where the solver ends; None is 1e-3, or the last of `times`.
        solver: "euler", "heun", "heun_euler" (whose last step, the one to t_min, is Euler's) or
            "rk45"; None is rk45 where a tolerance or `per_sample` is given, else heun.
        steps: of solvers with a grid.
        times: two or more decreasing numbers > 0 from T to t_min (see `grid`), in place of `steps`.
        rtol, atol: tolerances of rk45; None is 1e-4 for rtol and, in the units of x, rtol's number
            for atol.
        per_sample: let each sample have its own steps of rk45, so that one that is hard does not
            hold the others, and a sample does not depend on its batch.
        final_step: end with one Euler step from t_min to t = 0. With the exact field this is the
            step to the posterior mean. Without it a draw from the far tail of the prior stays
            t_min ‖x_T‖ / T short of its source.
        churn: noise before each step of a solver with a grid; None is the ODE itself.
        generator: source of the noise, on any device.
        seeds: B integers ≥ 0 instead, one a sample: its noise is then the same in any batch, and so
            is the result, to the bit where that of field_fn is. On the CPU `poisson_field` is so up
            to d = 24 and, once rounded, of float64 queries (`poisson_field(x.double(), t, x0)`); of
            float32 queries beyond, last bits depend on which are computed together.
        substitution: how to replace the t-component of a network at small t; None leaves it.
        differentiable: keep what gradients of the result with respect to x, to the arguments and
            to the field's parameters need. Memory then grows with the evaluations: each keeps what
            the field's backward does. Through `poisson_field` there are first derivatives.
        keep_path: also return the states at all times; not where steps are per sample.
        progress: called with the fraction done, from 0 to 1, as the integration advances in log t.
        **arguments: for field_fn, at each call: labels, the strength of guidance. Where samples
            have their own steps, tensors among them with a first axis of B go with the samples.

    Returns:
        Trajectory, `x` at t = 0 (at t_min without the final step).

    Raises:
        TypeError, ValueError: an argument, or what field_fn returns, of the wrong type, shape or
            range.
        FloatingPointError: dx/dt is not finite, because the field is not or F_t is 0.
        RuntimeError: rk45 does not get forward at these tolerances.
    """
    way = chosen(T, t_min, solver, steps, times, rtol, atol, per_sample)
    with nullcontext() if differentiable else torch.no_grad():
        run = _Run(field_fn, x, way, substitution, keep_path, progress, arguments)
        kick = _kick(churn, Noise(run.x, generator, seeds), way, final_step)
        run.x = integrate(way, run.slope, run.x, run.record, up=False, kick=kick)
        if final_step:
            run.x = step(run.slope, run.x, way.times[-1], 0.0, 1, kick)
            run.record(0.0, run.x)
        return run.trajectory()


def encode(
    field_fn: FieldFn,
    x: Tensor,
    *,
    T: float | None = None,
    t_min: float | None = None,
    solver: str | None = None,
    steps: int = 100,
    times: Iterable[float] | Tensor | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    per_sample: bool = False,
    substitution: Substitution | None = None,
    differentiable: bool = False,
    keep_path: bool = False,
    progress: Callable[[float], None] | None = None,
    **arguments: object,
) -> Trajectory:
    """Integrate Eq. (4) backward, from data at t = t_min up to its latent on the plane t = T.

    The inverse of `sample` without its final step. x (B, *event) is taken as the state at t_min.
    Field lines spread by about T / t_min on the way up, and errors with them: ask for tolerances
    that much smaller than the accuracy wanted of the latent, relative to T.

    How well it is undone, measured: 64 digits of scikit-learn in [−1, 1], encoded from t_min =
    1e-3 … 0.1 and sampled back without the final step, in float32 (float64 is no better). The
    largest difference of a pixel, in the median image and in the worst:

        through the demo's network (T = 18)     heun, 100 steps   1e-5 … 8e-5     2e-3
                                                rk45, rtol 1e-4   4e-4 … 6e-4     1e-2
                                                rk45, rtol 1e-6   2e-6 … 4e-6     5e-5
        the exact field of all, from its own    heun, 100 steps   5e-7 … 1e-5     1e-3
        points and t_min of noise (T = 40)      rk45, rtol 1e-4   2e-5 … 8e-5     3e-3
                                                rk45, rtol 1e-6   5e-7 … 1e-6     2e-6
        the exact field, from other digits      rk45, rtol 1e-6   3e-2            7e-1

    Points that the exact field has no reference for do not come back: they are carried far out
    (norms of 500 at t_min = 0.1, of 98,000 at 1e-3), and what separates their lines is lost.

    Arguments and errors are those of `sample`; `times` decreases here too, and is gone through from
    its end.

    Returns:
        Trajectory, `x` (B, *event) being the latent at t = T.
    """
    way = chosen(T, t_min, solver, steps, times, rtol, atol, per_sample)
    with nullcontext() if differentiable else torch.no_grad():
        run = _Run(field_fn, x, way, substitution, keep_path, progress, arguments)
        run.x = integrate(way, run.slope, run.x, run.record, up=True)
        return run.trajectory()


class _Run:
    """The state, what has been counted and recorded."""

    def __init__(
        self,
        field_fn: FieldFn,
        x: Tensor,
        way: Method,
        substitution: Substitution | None,
        keep_path: bool,
        progress: Callable[[float], None] | None,
        arguments: dict[str, object],
    ) -> None:
        self.x = finite_batch(x)
        self.way = way
        self.slope = Slope(field_fn, self.x, substitution, arguments)
        self.progress = progress
        self.times: list[float] = []
        self.states: list[Tensor] | None = [] if keep_path else None
        if keep_path and way.per_sample:
            raise ValueError("keep_path expects steps that samples share, got per_sample=True")

    def record(self, t: float, x: Tensor | None) -> None:
        if x is not None:
            self.times.append(t)
            if self.states is not None:
                self.states.append(x)
        if self.progress is not None:
            self.progress(self.way.fraction(self.times[0], t))

    def trajectory(self) -> Trajectory:
        self.slope.check()
        path = None if self.states is None else torch.stack(self.states)
        evaluations = self.slope.evaluations if self.way.per_sample else None
        return Trajectory(self.x, self.slope.nfe, self.times, path, evaluations)


def finite_batch(x: Tensor) -> Tensor:
    """x (B, *event), checked; without its history where gradients are off."""
    x = batch("x", x)
    if not torch.isfinite(x).all():
        raise ValueError("x expects finite values, got NaN or Inf")
    return x if torch.is_grad_enabled() else x.detach()


def _kick(
    churn: Churn | None, noise: Noise, way: Method, final_step: bool
) -> Callable[[Tensor, float], tuple[Tensor, float]] | None:
    if churn is None:
        return None
    if not isinstance(churn, Churn):
        raise TypeError(f"churn expects a Churn or None, got {type(churn).__name__}")
    if way.solver == "rk45":
        raise ValueError("churn expects a solver with a grid, euler or heun, got 'rk45'")
    steps = len(way.times) - 1 + final_step

    def kick(x: Tensor, t: float) -> tuple[Tensor, float]:
        t_hat, std = churn.raised(t, steps)
        return (x if t_hat == t else x + std * noise.like(x)), t_hat

    return kick
