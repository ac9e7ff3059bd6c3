# SPDX-License-Identifier: Apache-2.0
"""The sampling ODE of Xu et al. 2022, Eq. (4): dx/dt = F_x / F_t between t = T and t = 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pfgm_kernels._checks import batch, integer, positive

FieldFn = Callable[[Tensor, Tensor], Tensor]
Record = Callable[[float, Tensor], None]

SOLVERS = ("euler", "heun", "rk45")
MAX_ADAPTIVE_STEPS = 10_000


@dataclass(frozen=True)
class Trajectory:
    """The result of `sample` or `encode`."""

    x: Tensor
    """(B, *event), where the ODE ended."""
    nfe: int
    """Number of function evaluations: calls of the field on the whole batch."""
    times: list[float]
    """t before each accepted step, then the t of `x`."""
    path: Tensor | None
    """(len(times), B, *event), the states at `times`, if asked for."""


@dataclass(frozen=True)
class Substitution:
    """The published substitution for the t-component of a trained network at small t.

    There F_t ≈ −t √d / (R + gamma) is too small for a network to get right, but R follows from
    F_x. With F = √d (v, −t) / (R + gamma), the target of `FieldLoss` with its default scale,
    n = ‖F_x‖ / √d and R² = ‖v‖² + t²:

        n = ‖v‖ / (R + gamma)   ⟺   R = (n² gamma + √(n² gamma² + (1 − n²) t²)) / (1 − n²)
        F_t := −√d t / (R + gamma)

    This is the exact inverse, so that the exact field is left as it is; Xu et al. 2022 approximate
    it by ‖v‖ ≈ n gamma / (1 − n). Where a network overshoots, R would be far too large (n just
    under 1) or not exist (n ≥ 1): R never exceeds √((‖x‖ + √d)² + t²), the distance at which
    the furthest corner of [-1, 1]^d may lie, so data is assumed to lie there.
    """

    gamma: float
    """> 0, that of the target, in the units of x."""
    below: float
    """> 0, the t below which the t-component is substituted (`Constants.t_substitution`)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", positive("gamma", self.gamma))
        object.__setattr__(self, "below", positive("below", self.below))

    def t_component(self, x: Tensor, t: float, field_x: Tensor) -> Tensor:
        """F_t (B,) of queries x (B, d) at t from F_x (B, d)."""
        root_d = math.sqrt(x.shape[1])
        n = field_x.norm(dim=1) / root_d
        gap = (1 - n * n).clamp_min(torch.finfo(n.dtype).tiny)
        n_gamma = n * self.gamma
        distance = (n * n_gamma + (n_gamma.square() + gap * t * t).sqrt()) / gap
        furthest = (x.norm(dim=1) + root_d).square().add(t * t).sqrt()
        return -root_d * t / (distance.minimum(furthest) + self.gamma)


@torch.no_grad()
def sample(
    field_fn: FieldFn,
    x: Tensor,
    *,
    T: float,
    t_min: float = 1e-3,
    solver: str | None = None,
    steps: int = 100,
    rtol: float | None = None,
    atol: float | None = None,
    final_step: bool = True,
    substitution: Substitution | None = None,
    keep_path: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Trajectory:
    """Integrate Eq. (4), dx/dt = F_x / F_t, from t = T down to the data.

    `euler` and `heun` step in t on a grid of equal ratios from T to t_min (exact for the field of
    one source, whose lines are straight); `rk45` is Dormand–Prince in log t with adaptive steps,
    the error of a step being the largest over the samples of its root mean square over the event,
    relative to atol + rtol |x|.

    Evaluations: `steps` (euler), 2 `steps` (heun), as needed (rk45), and one for the final step.

    Args:
        field_fn: (x (B, *event), t (B,)) -> (B, d + 1), the t-component last: `poisson_field` on a
            data set, or a trained network. Only the ratio of the components matters.
        x: (B, *event) float32 or float64, finite: the states at T, from `sample_prior`.
        T: > t_min, where to start, in the units of x.
        t_min: > 0, where the solver ends.
        solver: "euler", "heun" or "rk45" (needs torchdiffeq, of the extra `train`); None is rk45
            where a tolerance is given, else heun.
        steps: of euler and heun.
        rtol, atol: tolerances of rk45; None is 1e-4 for rtol and, in the units of x, rtol's number
            for atol.
        final_step: end with one Euler step from t_min to t = 0. With the exact field this is the
            step to the posterior mean. Without it a draw from the far tail of the prior stays
            t_min ‖x_T‖ / T short of its source.
        substitution: how to replace the t-component of a network at small t; None leaves it.
        keep_path: also return the states at all times.
        progress: called with the fraction done, from 0 to 1, as the integration advances in log t.

    Returns:
        Trajectory, `x` at t = 0 (at t_min without the final step).

    Raises:
        TypeError, ValueError: an argument, or what field_fn returns, of the wrong type, shape or
            range.
        FloatingPointError: dx/dt is not finite, because the field is not or F_t is 0.
        RuntimeError: rk45 does not get forward at these tolerances.
        ImportError: rk45 without torchdiffeq.
    """
    T, t_min = _interval(T, t_min)
    run = _Integration(field_fn, x, T, t_min, substitution, keep_path, progress)
    run.solve(solver, steps, rtol, atol)
    if final_step:
        run.step_to_zero()
    return run.trajectory()


@torch.no_grad()
def encode(
    field_fn: FieldFn,
    x: Tensor,
    *,
    T: float,
    t_min: float = 1e-3,
    solver: str | None = None,
    steps: int = 100,
    rtol: float | None = None,
    atol: float | None = None,
    substitution: Substitution | None = None,
    keep_path: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Trajectory:
    """Integrate Eq. (4) backward, from data at t = t_min up to its latent on the plane t = T.

    The inverse of `sample` without its final step. x (B, *event) is taken as the state at t_min.
    Field lines spread by about T / t_min on the way up, and errors with them: ask for tolerances
    that much smaller than the accuracy wanted of the latent, relative to T.

    Arguments and errors are those of `sample`.

    Returns:
        Trajectory, `x` (B, *event) being the latent at t = T.
    """
    T, t_min = _interval(T, t_min)
    run = _Integration(field_fn, x, t_min, T, substitution, keep_path, progress)
    run.solve(solver, steps, rtol, atol)
    return run.trajectory()


def _interval(T: float, t_min: float) -> tuple[float, float]:
    T, t_min = positive("T", T), positive("t_min", t_min)
    if t_min >= T:
        raise ValueError(f"T expects a number > t_min = {t_min}, got {T}")
    return T, t_min


class _Integration:
    """One run between t = start and t = stop: the state, what has been counted and recorded."""

    def __init__(
        self,
        field_fn: FieldFn,
        x: Tensor,
        start: float,
        stop: float,
        substitution: Substitution | None,
        keep_path: bool,
        progress: Callable[[float], None] | None,
    ) -> None:
        self.x = batch("x", x).detach()
        if not torch.isfinite(x).all():
            raise ValueError("x expects finite values, got NaN or Inf")
        if not (substitution is None or isinstance(substitution, Substitution)):
            raise TypeError(
                f"substitution expects a Substitution or None, got {type(substitution).__name__}"
            )
        self.field_fn = field_fn
        self.start, self.stop = start, stop
        self.substitution = substitution
        self.progress = progress
        self.nfe = 0
        self.times: list[float] = []
        self.states: list[Tensor] | None = [] if keep_path else None

    def solve(self, solver: str | None, steps: int, rtol: float | None, atol: float | None) -> None:
        """Advance x from start to stop."""
        if solver is None:
            solver = "heun" if rtol is None and atol is None else "rk45"
        if solver not in SOLVERS:
            raise ValueError(f"solver expects one of {', '.join(SOLVERS)}, got {solver!r}")
        if solver == "rk45":
            rtol = 1e-4 if rtol is None else positive("rtol", rtol)
            self._rk45(rtol, rtol if atol is None else positive("atol", atol))
        else:
            step = self._euler if solver == "euler" else self._heun
            ratio = self.stop / self.start
            steps = integer("steps", steps)
            grid = [self.start * ratio ** (i / steps) for i in range(steps)]
            for t, t_next in pairwise([*grid, self.stop]):
                self.record(t, self.x)
                self.x = step(self.x, t, t_next)
        self.record(self.stop, self.x)

    def step_to_zero(self) -> None:
        self.x = self._euler(self.x, self.stop, 0.0)
        self.record(0.0, self.x)

    def trajectory(self) -> Trajectory:
        path = None if self.states is None else torch.stack(self.states)
        return Trajectory(self.x, self.nfe, self.times, path)

    def record(self, t: float, x: Tensor) -> None:
        """Note the state at t and report the progress."""
        self.times.append(t)
        if self.states is not None:
            self.states.append(x)
        if self.progress is not None:
            whole = math.log(self.stop / self.start)
            self.progress(min(math.log(t / self.start) / whole, 1.0) if t > 0 else 1.0)

    def slope(self, x: Tensor, t: float) -> Tensor:
        """dx/dt = F_x / F_t at states x (B, *event) and one t."""
        field = self.field_fn(x, torch.full(x.shape[:1], t, dtype=x.dtype, device=x.device))
        self.nfe += 1
        flat = x.flatten(1)
        wanted = (flat.shape[0], flat.shape[1] + 1)
        if not isinstance(field, Tensor) or field.shape != wanted:
            got = tuple(field.shape) if isinstance(field, Tensor) else type(field).__name__
            raise ValueError(f"field_fn expects to return shape (B, d + 1) = {wanted}, got {got}")
        field = field.to(x.dtype)
        field_x, field_t = field[:, :-1], field[:, -1]
        if self.substitution is not None and t < self.substitution.below:
            field_t = self.substitution.t_component(flat, t, field_x)
        slope = field_x / field_t[:, None]
        finite = torch.isfinite(slope).all(1)
        if not finite.all():
            field_finite = torch.isfinite(field).all()
            reason = "F_t is 0, or nearly" if field_finite else "the field is NaN or Inf"
            raise FloatingPointError(
                f"dx/dt = F_x / F_t is not finite at t = {t:g} for {int((~finite).sum())} of "
                f"{len(x)} samples: {reason} there"
            )
        return slope.view(x.shape)

    def _euler(self, x: Tensor, t: float, t_next: float) -> Tensor:
        return x + (t_next - t) * self.slope(x, t)

    def _heun(self, x: Tensor, t: float, t_next: float) -> Tensor:
        first = self.slope(x, t)
        second = self.slope(x + (t_next - t) * first, t_next)
        return x + (t_next - t) / 2 * (first + second)

    def _rk45(self, rtol: float, atol: float) -> None:
        try:
            with torch.device("cpu"):  # it makes tensors while it is imported
                from torchdiffeq import odeint
        except ImportError as error:
            raise ImportError(
                "solver 'rk45' needs torchdiffeq: pip install -e '.[train]' in the project's folder"
            ) from error
        flow = _LogTimeFlow(self)
        span = torch.tensor([0.0, flow.end], dtype=torch.float64, device=self.x.device)
        # step_t: the last step stops at the end, instead of interpolating back to it.
        options = {"norm": _largest_rms, "step_t": span[1:]}
        with self.x.device:  # where it makes its own
            states = odeint(
                flow, self.x, span, rtol=rtol, atol=atol, method="dopri5", options=options
            )
        self.x = states[-1]


class _LogTimeFlow:
    """The ODE in s = |log(t / start)|, with the callbacks that torchdiffeq looks for."""

    def __init__(self, run: _Integration) -> None:
        self.run = run
        self.sign = 1 if run.stop > run.start else -1
        self.end = abs(math.log(run.stop / run.start))
        self.steps = 0

    def time(self, s: Tensor) -> float:
        # torchdiffeq's probe for a first step knows no end: on a data point it goes far beyond.
        return self.run.start * math.exp(self.sign * min(s.item(), self.end))

    def __call__(self, s: Tensor, x: Tensor) -> Tensor:
        t = self.time(s)
        return self.sign * t * self.run.slope(x, t)

    def callback_step(self, s: Tensor, x: Tensor, ds: Tensor) -> None:
        """Stop what would go on for ever (torchdiffeq's own assertions vanish under -O)."""
        self.steps += 1
        if self.steps > MAX_ADAPTIVE_STEPS or s + ds == s:
            raise RuntimeError(
                f"rk45 does not get forward at t = {self.time(s):g}, after {self.steps} steps: the "
                "field is too rough for these tolerances; ask for a larger rtol and atol"
            )

    def callback_accept_step(self, s: Tensor, x: Tensor, ds: Tensor) -> None:
        self.run.record(self.time(s), x)


def _largest_rms(error: Tensor) -> Tensor:
    """The largest over the samples of the root mean square over the event."""
    return error.flatten(1).square().mean(1).sqrt().max()
