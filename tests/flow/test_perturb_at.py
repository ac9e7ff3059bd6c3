# SPDX-License-Identifier: Apache-2.0
"""Are draws at given heights those of the kernel, and are the heights log-normal?"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pfgm_kernels.flow import heights, log_prior, perturb, perturb_at

D_OF_PAPERS = [1, 2, 8, 128, 2048, math.inf]


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_at(d: int, count: int, D: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x − x0 (count, d) and t (count,) of draws at heights of all levels, in float64."""
    generator = seeded(seed)
    t = heights(count, D=D, generator=generator, dtype=torch.float64)
    x0 = torch.randn(count, d, dtype=torch.float64, generator=generator)
    return perturb_at(x0, t, D=D, generator=generator) - x0, t


@pytest.mark.parametrize("D", D_OF_PAPERS)
def test_radius_and_angle_follow_the_kernel(D):
    """r² / t² is F-distributed, D/d times; a coordinate of a uniform direction is of a beta law."""
    d = 192
    radius_law = stats.chi2(d) if math.isinf(D) else stats.f(d, D)
    angle_law = stats.beta((d - 1) / 2, (d - 1) / 2)
    for seed in range(20):
        noise, t = noise_at(d, 1500, D, seed)
        radius = noise.norm(dim=1)
        squared = (radius / t).square() * (1 if math.isinf(D) else D / d)
        assert stats.kstest(squared.numpy(), radius_law.cdf).pvalue > 0.001
        cosine = (noise[:, 5] / radius).numpy()
        assert stats.kstest((cosine + 1) / 2, angle_law.cdf).pvalue > 0.001


@pytest.mark.parametrize(("d", "D"), [(1, 1), (2, 2.5), (3, math.inf)])
def test_few_dimensions(d, D):
    noise, t = noise_at(d, 20_000, D, 1)
    squared = (noise.norm(dim=1) / t).square() * (1 if math.isinf(D) else D)
    law = stats.chi2(d) if math.isinf(D) else stats.f(d, D)
    assert stats.kstest((squared / (1 if math.isinf(D) else d)).numpy(), law.cdf).pvalue > 0.001


def test_nothing_is_clipped():
    """The published code draws no radius beyond 31.607 t: a third of these are."""
    d, count = 192, 20_000
    noise, t = noise_at(d, count, 1, 7)
    beyond = (noise.norm(dim=1) > 31.607 * t).double().mean().item()
    expected = stats.f(d, 1).sf(31.607**2 / d)
    assert expected > 0.3
    assert abs(beyond - expected) < 5 * math.sqrt(expected * (1 - expected) / count)
    # P(r > q t) ≈ √(2d/π) / q: eight of 20,000 are expected there.
    assert (noise.norm(dim=1) / t).max() > 28_000
    x = perturb_at(torch.zeros(count, d), t, D=1, generator=seeded())
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("D", [0.5, 1, 3, math.inf])
def test_the_density_is_that_of_the_prior(D):
    """By the mean of a bounded function under both: log_prior is tested on its own."""
    t, d = 0.7, 2
    edges = np.linspace(-8, 8, 801)
    cells = torch.from_numpy((edges[1:] + edges[:-1]) / 2)
    grid = torch.cartesian_prod(cells, cells)
    density = log_prior(grid, T=t, D=D).exp() * 0.02**2

    def bump(x: torch.Tensor) -> torch.Tensor:
        return (-(x - torch.tensor([0.5, -0.3])).square().sum(1)).exp()

    x = perturb_at(torch.zeros(40_000, d, dtype=torch.float64), t, D=D, generator=seeded())
    values = bump(x)
    error = values.std() / math.sqrt(len(values))
    assert (values.mean() - (bump(grid) * density).sum()).abs() < 4 * error + 1e-6


def test_a_number_stands_for_all():
    x0 = torch.randn(5, 2, 3, generator=seeded())
    one, each, scalar = (
        perturb_at(x0, t, D=2, generator=seeded())
        for t in (0.25, torch.full((5,), 0.25), torch.tensor(0.25))
    )
    assert torch.equal(one, each)
    assert torch.equal(one, scalar)
    assert not torch.equal(one, perturb_at(x0, 0.25, D=3, generator=seeded()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [lambda x, **o: perturb_at(x, 1.0, **o), perturb])
def test_points_of_16_bits_are_perturbed_in_float32(dtype, function):
    x0 = torch.randn(5, 4, generator=seeded()).to(dtype)
    found, expected = (function(each, generator=seeded()) for each in (x0, x0.float()))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_gradients_reach_points_and_heights():
    x0 = torch.randn(4, 3, dtype=torch.float64, generator=seeded()).requires_grad_()
    t = torch.rand(4, dtype=torch.float64, generator=seeded()).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x0, t: perturb_at(x0, t, D=3, generator=seeded()), (x0, t)
    )


@pytest.mark.parametrize("D", [*D_OF_PAPERS, 2.5])
def test_heights_are_log_normal(D):
    t = heights(20_000, D=D, generator=seeded(), dtype=torch.float64)
    sigma = t / (1 if math.isinf(D) else math.sqrt(D))
    assert stats.kstest(sigma.log().numpy(), stats.norm(-1.2, 1.2).cdf).pvalue > 0.001
    other = heights(20_000, D=D, mean=0.5, std=0.3, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(((t / sigma).log() + (sigma.log() + 1.2) / 4 + 0.5).exp(), other)


def test_heights_are_of_the_dtype_asked_for():
    assert heights(3, D=2).dtype == torch.float32
    assert heights(3, D=2, dtype=torch.float64).shape == (3,)
    assert torch.equal(heights(3, D=2, generator=seeded()), heights(3, D=2, generator=seeded()))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"t": 0}, ValueError, "t expects a finite number > 0, got 0"),
        ({"t": math.inf}, ValueError, "t expects a finite number > 0, got inf"),
        ({"t": torch.ones(2)}, ValueError, r"t expects .* or shape \(3,\), got \(2,\)"),
        ({"t": torch.ones(3, 1)}, ValueError, r"t expects .* or shape \(3,\), got \(3, 1\)"),
        ({"t": torch.ones(3, dtype=torch.bool)}, TypeError, "t expects real numbers, got"),
        ({"t": [1.0]}, TypeError, "t expects a real number, got list"),
        ({"D": 0}, ValueError, "D expects a number > 0, got 0"),
        ({"x0": torch.zeros(3)}, ValueError, r"x0 expects shape \(B, \*event\)"),
        ({"x0": torch.zeros(3, 2).int()}, TypeError, "x0 expects a floating-point tensor"),
    ],
)
def test_bad_arguments_of_perturb_at(options, error, message):
    arguments = {"x0": torch.zeros(3, 2), "t": 1.0} | options
    with pytest.raises(error, match=message):
        perturb_at(arguments.pop("x0"), arguments.pop("t"), **arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 0}, ValueError, "count expects an integer ≥ 1, got 0"),
        ({"D": -1}, ValueError, "D expects a number > 0, got -1"),
        ({"mean": math.inf}, ValueError, "mean expects a finite number, got inf"),
        ({"std": 0}, ValueError, "std expects a finite number > 0, got 0"),
        ({"dtype": torch.int64}, TypeError, "dtype expects a floating-point type"),
    ],
)
def test_bad_arguments_of_heights(options, error, message):
    with pytest.raises(error, match=message):
        heights(**{"count": 3, "D": 1} | options)
