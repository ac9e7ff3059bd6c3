# SPDX-License-Identifier: Apache-2.0
"""The heights between which a sampler steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from pfgm_kernels._checks import integer, positive

T_MIN = 1e-3


def grid(T: float, t_min: float, points: int, rho: float | None = None) -> Tensor:
    """Heights from T down to t_min, for `times` of `sample` and `encode`.

        t_i = T (t_min / T)^(i / (points − 1))                                    rho = None
        t_i = (T^(1/rho) + i / (points − 1) (t_min^(1/rho) − T^(1/rho)))^rho      Karras et al. 2022

    Both scale with their ends, so that a published grid of σ becomes one of t = σ√D by its ends
    alone. EDM's 18 steps (rho = 7) are 17 from σ_max to σ_min and the final one to 0:
    `grid(80 * D**0.5, 0.002 * D**0.5, 18, rho=7)`.

    Args:
        T: > t_min, the first.
        t_min: > 0, the last.
        points: ≥ 2, how many, both ends among them.
        rho: > 0, or None for equal ratios (the limit of a large rho).

    Returns:
        (points,) float64 on the CPU, strictly decreasing, T and t_min exactly at its ends.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """
    T, t_min = interval(T, t_min)
    last = integer("points", points, 2) - 1
    share = torch.arange(last + 1, dtype=torch.float64, device="cpu") / last
    if rho is None:
        result = T * (t_min / T) ** share
    else:
        root = 1 / positive("rho", rho)
        result = (T**root + share * (t_min**root - T**root)) ** (1 / root)
    result[0], result[-1] = T, t_min
    return result


def interval(T: float, t_min: float) -> tuple[float, float]:
    T, t_min = positive("T", T), positive("t_min", t_min)
    if t_min >= T:
        raise ValueError(f"T expects a number > t_min = {t_min}, got {T}")
    return T, t_min


def checked_times(times: object, T: float | None, t_min: float | None) -> list[float]:
    """`times` as floats, once they decrease and do not contradict T and t_min."""
    if not isinstance(times, Iterable) or getattr(times, "ndim", 1) != 1:
        raise TypeError(f"times expects a sequence of numbers, got {type(times).__name__}")
    heights = [positive("times", t) for t in times]
    if len(heights) < 2 or any(later >= t for t, later in pairwise(heights)):
        raise ValueError(f"times expects two or more decreasing numbers, got {heights}")
    for name, value, end in (("T", T, heights[0]), ("t_min", t_min, heights[-1])):
        if value is not None and not math.isclose(positive(name, value), end, rel_tol=1e-6):
            raise ValueError(f"{name} expects that of times, {end}, or None, got {value}")
    return heights
