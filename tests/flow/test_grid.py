# SPDX-License-Identifier: Apache-2.0
"""Are heights those that were asked for, and does a sampler step between them?"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pfgm_kernels.flow import encode, grid, sample


@pytest.mark.parametrize(("T", "t_min"), [(40.0, 1e-3), (80 * 128**0.5, 0.002 * 128**0.5), (3, 2)])
@pytest.mark.parametrize("points", [2, 3, 18])
@pytest.mark.parametrize("rho", [None, 1, 7, 0.5])
def test_the_formulas(T, t_min, points, rho):
    found = grid(T, t_min, points, rho)
    assert found.dtype == torch.float64
    assert (found[0].item(), found[-1].item()) == (T, t_min)
    assert (found[1:] < found[:-1]).all()
    if rho is None:
        expected = np.geomspace(T, t_min, points)
    else:
        expected = np.linspace(T ** (1 / rho), t_min ** (1 / rho), points) ** rho
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_a_large_rho_is_the_geometric_grid():
    torch.testing.assert_close(grid(40, 1e-3, 9, 1e6), grid(40, 1e-3, 9), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, 1, 3), ValueError, "T expects a number > t_min = 1.0, got 1.0"),
        ((1, 0, 3), ValueError, "t_min expects a finite number > 0, got 0"),
        ((1, 0.5, 1), ValueError, "points expects an integer ≥ 2, got 1"),
        ((1, 0.5, 3, 0), ValueError, "rho expects a finite number > 0, got 0"),
        ((1, 0.5, 3, "7"), TypeError, "rho expects a real number, got str"),
    ],
)
def test_a_grid_checks_its_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        grid(*arguments)


def bent(x: Tensor, t: Tensor) -> Tensor:
    """dx/dt = x/t + t cos x."""
    t = t[:, None]
    return torch.cat([-(x + t * t * x.cos()), -t], 1)


X = torch.linspace(-2, 2, 6, dtype=torch.float64).view(3, 2)
TIMES = [2.0, 1.7, 0.9, 0.5]


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array, iter])
@pytest.mark.parametrize("solver", ["euler", "heun", "heun_euler"])
def test_times_are_stepped_through(kind, solver):
    options = {"solver": solver, "keep_path": True}
    down = sample(bent, X, times=kind(TIMES), **options)
    assert down.times == pytest.approx([*TIMES, 0.0], rel=1e-6)
    calls = {"euler": 3, "heun": 6, "heun_euler": 5}[solver]
    assert down.nfe == calls + 1
    up = encode(bent, X, times=kind(TIMES), **options)
    assert up.times == pytest.approx(TIMES[::-1], rel=1e-6)
    assert up.nfe == calls
    # By hand.
    x = X
    for place, (t, t_next) in enumerate([(2.0, 1.7), (1.7, 0.9), (0.9, 0.5)]):
        first = x / t + t * x.cos()
        euler = x + (t_next - t) * first
        second = euler / t_next + t_next * euler.cos()
        last = solver == "heun_euler" and place == 2
        x = euler if solver == "euler" or last else x + (t_next - t) / 2 * (first + second)
        torch.testing.assert_close(down.path[place + 1], x, rtol=1e-6, atol=1e-6)


def test_the_default_grid_is_geometric():
    for options in ({"solver": "heun"}, {"solver": "euler"}):
        given = sample(bent, X, times=grid(2, 0.5, 8), **options)
        steps = sample(bent, X, T=2, t_min=0.5, steps=7, **options)
        assert given.times == steps.times
        assert torch.equal(given.x, steps.x)


def test_times_say_where_to_start_and_to_end():
    expected = sample(bent, X, times=TIMES).x
    assert torch.equal(sample(bent, X, T=2, t_min=0.5, times=TIMES).x, expected)
    single = torch.tensor([0.1, 1e-3], dtype=torch.float32)  # as float64: not quite 0.1
    sample(bent, X, T=0.1, t_min=1e-3, times=single)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, TypeError, "T expects a real number, got NoneType and no times"),
        ({"times": [1, 0.5, 0]}, ValueError, "times expects a finite number > 0, got 0"),
        ({"times": [1, math.nan]}, ValueError, "times expects a real number, got NaN"),
        ({"times": [0.5, 1]}, ValueError, r"times expects two or more decreasing.*\[0.5, 1.0\]"),
        ({"times": [1, 1]}, ValueError, r"times expects two or more decreasing.*\[1.0, 1.0\]"),
        ({"times": [1]}, ValueError, r"times expects two or more decreasing numbers, got \[1.0\]"),
        ({"times": 5}, TypeError, "times expects a sequence of numbers, got int"),
        ({"times": torch.ones(2, 2)}, TypeError, "times expects a sequence of numbers, got Tensor"),
        ({"times": "51"}, TypeError, "times expects a real number, got str"),
        ({"times": [2, 1], "T": 3}, ValueError, "T expects that of times, 2.0, or None, got 3"),
        ({"times": [2, 1], "t_min": 3}, ValueError, "t_min expects that of times, 1.0, or None"),
        ({"times": [2, 1], "solver": "rk45"}, ValueError, "times expects a solver with a grid"),
        ({"times": [2, 1], "rtol": 1e-3}, ValueError, "times expects a solver with a grid"),
    ],
)
def test_bad_times_are_named(options, error, message):
    for integrate in (sample, encode):
        with pytest.raises(error, match=message):
            integrate(bent, X, **options)
