# SPDX-License-Identifier: Apache-2.0
"""Steps of an ODE dx/dt = slope(x, t) between t = T and t_min, in either direction.

A state is a tensor (B, ...) of any meaning; a slope is called as slope(x, t, rows): states x
(b, ...), t (b,) float64, and which rows of the batch they are (b,), or None for all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

import torch
from torch import Tensor

from pfgm_kernels._checks import integer, positive
from pfgm_kernels.flow.grid import T_MIN, checked_times, grid, interval

SlopeFn = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Record = Callable[[float, Tensor | None], None]
"""Of t and the state there; None where samples are at different t, of which t is the last's."""
Kick = Callable[[Tensor, float], tuple[Tensor, float]]

SOLVERS = ("euler", "heun", "heun_euler", "rk45")
MAX_ADAPTIVE_STEPS = 10_000

# Dormand and Prince 1980: stages, the fifth-order weights being the last, and the error's weights.
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@dataclass(frozen=True)
class Method:
    """How to integrate, once its arguments have been checked (see `sample` for their meaning)."""

    solver: str
    times: Sequence[float]
    """From T down to t_min: the grid, or the ends alone for rk45."""
    rtol: float
    atol: float
    per_sample: bool

    def fraction(self, start: float, t: float) -> float:
        """How much of the way from `start`, one of the ends, is done at t, in log t."""
        if t == 0:
            return 1.0
        whole = math.log(self.times[0] / self.times[-1])
        return min(abs(math.log(t / start)) / whole, 1.0)


def chosen(
    T: float | None,
    t_min: float | None,
    solver: str | None,
    steps: int,
    times: object,
    rtol: float | None,
    atol: float | None,
    per_sample: bool,
) -> Method:
    """The method that arguments of `sample` ask for, or one sentence on what they expect."""
    if solver is None:
        solver = "heun" if rtol is None and atol is None and not per_sample else "rk45"
    if solver not in SOLVERS:
        raise ValueError(f"solver expects one of {', '.join(SOLVERS)}, got {solver!r}")
    if per_sample and solver != "rk45":
        raise ValueError(f"per_sample expects the solver rk45, got {solver!r}")
    rtol = 1e-4 if rtol is None else positive("rtol", rtol)
    atol = rtol if atol is None else positive("atol", atol)
    if times is not None:
        if solver == "rk45":
            raise ValueError("times expects a solver with a grid, euler or heun, got 'rk45'")
        return Method(solver, checked_times(times, T, t_min), rtol, atol, per_sample)
    if T is None:
        raise TypeError("T expects a real number, got NoneType and no times")
    T, t_min = interval(T, T_MIN if t_min is None else t_min)
    heights = [T, t_min]
    if solver != "rk45":
        heights = grid(T, t_min, integer("steps", steps) + 1).tolist()
    return Method(solver, heights, rtol, atol, per_sample)


def integrate(
    method: Method, slope: SlopeFn, x: Tensor, record: Record, *, up: bool, kick: Kick | None = None
) -> Tensor:
    """The state at the other end: down from T to t_min, or up. Records each t and its state."""
    times = method.times[::-1] if up else method.times
    if method.solver == "rk45":
        return _in_log_time(method, slope, x, record, times[0], times[-1])
    record(times[0], x)
    for place, (t, t_next) in enumerate(pairwise(times), 2):
        order = 1 if method.solver == "euler" else 2
        if method.solver == "heun_euler" and place == len(times):
            order = 1
        x = step(slope, x, t, t_next, order, kick)
        record(t_next, x)
    return x


def step(
    slope: SlopeFn, x: Tensor, t: float, t_next: float, order: int, kick: Kick | None = None
) -> Tensor:
    """One step of Euler (order 1) or Heun (order 2), from where `kick` takes the state before."""
    if kick is not None:
        x, t = kick(x, t)
    first = slope(x, _all_at(t, x), None)
    euler = x + (t_next - t) * first
    if order == 1:
        return euler
    return x + (t_next - t) / 2 * (first + slope(euler, _all_at(t_next, x), None))


def _all_at(t: float, x: Tensor) -> Tensor:
    return torch.full(x.shape[:1], t, dtype=torch.float64, device=x.device)


def _in_log_time(
    method: Method, slope: SlopeFn, x: Tensor, record: Record, start: float, stop: float
) -> Tensor:
    """Dormand–Prince in s = |log(t / start)|."""
    sign = 1 if stop > start else -1
    end = abs(math.log(stop / start))

    def of_log_time(x: Tensor, s: Tensor, rows: Tensor | None) -> Tensor:
        t = start * (sign * s).exp()
        return _rows(sign * t.to(x.dtype), x) * slope(x, t, rows)

    adaptive = _Adaptive(of_log_time, x, end, method)
    record(start, x)
    for steps in count(1):
        behind = adaptive.behind
        if steps > MAX_ADAPTIVE_STEPS or not adaptive.advance():
            t = start * math.exp(sign * behind)
            raise RuntimeError(
                f"rk45 does not get forward at t = {t:g}, after {steps} steps: the field is too "
                "rough for these tolerances; ask for a larger rtol and atol"
            )
        if adaptive.behind == end:
            break
        if adaptive.behind > behind:
            t = start * math.exp(sign * adaptive.behind)
            record(t, None if method.per_sample else adaptive.x)
    x = adaptive.result()
    record(stop, x)
    return x


class _Adaptive:
    """Dormand–Prince from s = 0 to s = end, with step sizes by Hairer, Nørsett and Wanner, II.4.

    The samples share their steps, which the worst of them determines, or each has its own. Samples
    at the end leave the batch, so that their field is not evaluated any more.
    """

    def __init__(self, slope: SlopeFn, x: Tensor, end: float, method: Method) -> None:
        self.slope, self.x, self.end, self.method = slope, x, end, method
        self.rows: Tensor | None = None
        self.behind = 0.0
        self.s = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        self.first = slope(x, self.s, None)
        self.h = self._first_step()
        self.most = torch.full_like(self.h, 10.0)  # by which a step may grow: not after a refusal
        self._done: list[tuple[Tensor, Tensor]] = []

    def advance(self) -> bool:
        """Try one step of each sample that is not at the end; False if they cannot get forward."""
        beyond = self.s + self.h >= self.end
        s = torch.where(beyond, self.end, self.s + self.h)
        h = torch.where(beyond, self.end - self.s, self.h)
        stuck = (s == self.s).any()
        x, error, last = self._step(s, h)
        ratio = self._norm(error, self.x.abs().maximum(x.abs()))
        taken = ratio <= 1
        self.h = h * (0.9 / ratio**0.2).clamp(0.2, 10).minimum(self.most)
        self.most = torch.where(taken, 10.0, 1.0)
        self.s = torch.where(taken, s, self.s)
        self.x = torch.where(_rows(taken, x), x, self.x)
        self.first = torch.where(_rows(taken, x), last, self.first)
        at_end = self.s >= self.end
        # The one time in a step that the host waits. (NaN is for those who evaluate to tell.)
        state = torch.stack([stuck.double(), at_end.any().double(), self.s.amin()])
        was_stuck, some_at_end, self.behind = state.tolist()
        if some_at_end:
            self._leave(at_end)
        return not was_stuck

    def result(self) -> Tensor:
        rows, states = zip(*self._done, strict=True)
        return torch.cat(states)[torch.cat(rows).argsort()]

    def _leave(self, at_end: Tensor) -> None:
        rows = torch.arange(len(self.x), device=self.x.device) if self.rows is None else self.rows
        self._done.append((rows[at_end], self.x[at_end]))
        stay = ~at_end
        self.rows = rows[stay]
        self.s, self.h, self.most = self.s[stay], self.h[stay], self.most[stay]
        self.x, self.first = self.x[stay], self.first[stay]

    def _step(self, s_next: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The state at s_next, an estimate of its error, and its slope there."""
        x, slopes, size = self.x, [self.first], _rows(h.to(self.x.dtype), self.x)
        for node, weights in zip(NODES, STAGES, strict=True):
            x = self.x + size * _weighted(weights, slopes)
            s = s_next if node == 1 else self.s + node * h
            slopes.append(self.slope(x, s, self.rows))
        return x, size * _weighted(ERROR, slopes), slopes[-1]

    def _norm(self, value: Tensor, size: Tensor) -> Tensor:
        """(b,) float64: the root mean square over the event, of tolerances, or the largest."""
        relative = value.detach() / (self.method.atol + self.method.rtol * size.detach())
        norm = relative.flatten(1).square().mean(1).sqrt().double()
        return norm if self.method.per_sample else norm.amax().expand(len(norm))

    def _first_step(self) -> Tensor:
        size = self.x.abs()
        d0, d1 = self._norm(self.x, size), self._norm(self.first, size)
        probe = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp_max(self.end)
        there = self.slope(self.x + _rows(probe.to(self.x.dtype), self.x) * self.first, probe, None)
        d2 = self._norm(there - self.first, size) / probe
        steepest = d1.maximum(d2)
        h = torch.where(steepest <= 1e-15, (1e-3 * probe).clamp_min(1e-6), (0.01 / steepest) ** 0.2)
        return h.minimum(100 * probe).clamp_max(self.end)


def _weighted(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    terms = (w * slope for w, slope in zip(weights, slopes, strict=True) if w)
    return functools.reduce(torch.add, terms)


def _rows(values: Tensor, x: Tensor) -> Tensor:
    """`values` (b,), to be multiplied with states x (b, ...)."""
    return values.view(-1, *[1] * (x.dim() - 1))
