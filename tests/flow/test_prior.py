# SPDX-License-Identifier: Apache-2.0
"""Is the prior the density of Eqs. (5)–(7), and is log_prior its logarithm?"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from pfgm_kernels.flow import log_prior, sample_prior

COUNT = 20_000


def draws(d: int, T: float, D: float, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return sample_prior(COUNT, (d,), T=T, D=D, generator=generator, dtype=torch.float64, **options)


@pytest.mark.parametrize(
    ("d", "T", "D"),
    [(1, 1.0, 1), (2, 40.0, 1), (3, 0.01, 2.5), (64, 60.0, 1), (64, 3.0, 0.5), (300, 5.0, 128)],
)
def test_the_radius_follows_eq_5(d, T, D):
    # p(r) ∝ r^(d−1) (r² + T²)^(−(d+D)/2)  ⟺  r² / (r² + T²) ~ Beta(d/2, D/2)
    squared = draws(d, T, D).square().sum(1).numpy()
    assert stats.kstest(squared / (squared + T * T), stats.beta(d / 2, D / 2).cdf).pvalue > 0.001


def test_the_radius_follows_eq_5_in_a_quadrature_of_the_density():
    d, T = 3, 40.0
    radii = draws(d, T, 1).norm(dim=1).numpy()
    edges = T * np.tan(np.linspace(0, math.pi / 2, 13)[:-1])
    shares = [
        integrate.quad(lambda r: r ** (d - 1) * (r * r + T * T) ** (-(d + 1) / 2), low, high)[0]
        for low, high in zip(edges, [*edges[1:], math.inf], strict=True)
    ]
    observed, _ = np.histogram(radii, [*edges, math.inf])
    expected = COUNT * np.array(shares) / sum(shares)
    assert expected.min() > 5
    assert stats.chisquare(observed, expected).pvalue > 0.001


@pytest.mark.parametrize("d", [2, 5, 64])
def test_the_direction_is_uniform(d):
    x = draws(d, 2.0, 1)
    first = (x[:, 0] / x.norm(dim=1)).numpy()
    # A coordinate u of a uniform direction: (u + 1)/2 ~ Beta((d−1)/2, (d−1)/2).
    law = stats.beta((d - 1) / 2, (d - 1) / 2)
    assert stats.kstest((first + 1) / 2, law.cdf).pvalue > 0.001


def test_infinite_d_gives_a_gaussian():
    x = draws(4, 3.0, math.inf)
    assert stats.kstest(x.flatten().numpy() / 3.0, "norm").pvalue > 0.001


def test_no_draw_is_infinite():
    generator = torch.Generator().manual_seed(0)
    x = sample_prior(1_000_000, (2,), T=40, generator=generator)
    assert x.dtype == torch.float32
    assert torch.isfinite(x).all()
    # P(r > q) = 1/√(1 + (q/T)²): a million draws reach beyond 10⁴ T with certainty e⁻¹⁰⁰.
    assert x.norm(dim=1).max() > 40e4


def test_only_radii_above_max_radius_are_clipped():
    free, clipped = draws(3, 1.0, 1), draws(3, 1.0, 1, max_radius=5.0)
    inside = free.norm(dim=1) <= 5
    assert 0.5 < inside.double().mean() < 0.95
    torch.testing.assert_close(clipped[inside], free[inside], rtol=1e-15, atol=0)
    torch.testing.assert_close(
        clipped[~inside], 5 * free[~inside] / free[~inside].norm(dim=1, keepdim=True)
    )


def test_shape_dtype_and_generator():
    first = sample_prior(3, (2, 5), T=1, generator=torch.Generator().manual_seed(1))
    again = sample_prior(3, (2, 5), T=1, generator=torch.Generator().manual_seed(1))
    other = sample_prior(3, (2, 5), T=1, generator=torch.Generator().manual_seed(2))
    assert first.shape == (3, 2, 5)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("T", [0.3, 40.0])
@pytest.mark.parametrize("D", [0.7, 1, 3, math.inf])
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5])
def test_the_density_integrates_to_one(d, D, T):
    area = 2 * math.pi ** (d / 2) / math.gamma(d / 2)

    def shell(angle: float) -> float:
        radius = T * math.tan(angle)
        point = torch.zeros(1, d, dtype=torch.float64)
        point[0, 0] = radius
        density = math.exp(log_prior(point, T=T, D=D).item())
        return density * area * radius ** (d - 1) * T / math.cos(angle) ** 2

    total, error = integrate.quad(shell, 0, math.pi / 2, limit=200, epsabs=1e-7)
    assert abs(total - 1) < 1e-5
    assert error < 1e-5


@pytest.mark.parametrize(
    ("d", "D", "T"), [(1, 1, 2.0), (7, 2.5, 0.1), (64, 1, 40.0), (3, 100, 9.0)]
)
def test_the_density_is_the_student_t_of_d_degrees(d, D, T):
    x = draws(d, T, D)[:50]
    expected = stats.multivariate_t(shape=np.eye(d) * T * T / D, df=D).logpdf(x.numpy())
    np.testing.assert_allclose(log_prior(x, T=T, D=D).numpy(), expected, rtol=1e-12, atol=1e-10)


def test_the_density_of_infinite_d_is_gaussian():
    x = draws(5, 2.0, math.inf)[:50]
    expected = stats.multivariate_normal(cov=4 * np.eye(5)).logpdf(x.numpy())
    np.testing.assert_allclose(log_prior(x, T=2, D=math.inf).numpy(), expected, rtol=1e-12)


def test_the_constant_at_the_size_of_cifar10():
    # log 2T − log S_{d+1}(1) − (d+1)/2 · log(‖x‖² + T²), with the sphere in d + 1 dimensions.
    d, T = 3072, 40.0
    x = sample_prior(4, (3, 32, 32), T=T, generator=torch.Generator().manual_seed(3))
    log_area = math.log(2) + (d + 1) / 2 * math.log(math.pi) - math.lgamma((d + 1) / 2)
    squared = x.double().flatten(1).square().sum(1)
    expected = math.log(2 * T) - log_area - (d + 1) / 2 * (squared + T * T).log()
    result = log_prior(x, T=T)
    assert result.shape == (4,)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"T": 0.0}, ValueError, "T expects a finite number > 0, got 0"),
        ({"T": math.inf}, ValueError, "T expects a finite number > 0, got inf"),
        ({"T": 1.0, "D": 0}, ValueError, "D expects a number > 0, got 0"),
        ({"T": 1.0, "D": math.nan}, ValueError, "D expects a real number, got NaN"),
        ({"T": "40"}, TypeError, "T expects a real number, got str"),
    ],
)
def test_bad_scalars_are_named(options, error, message):
    with pytest.raises(error, match=message):
        sample_prior(2, (3,), **options)
    with pytest.raises(error, match=message):
        log_prior(torch.zeros(2, 3), **options)


@pytest.mark.parametrize(
    ("event", "shape"),
    [
        (784, (784,)),
        (1, (1,)),
        ([2, 3], (2, 3)),
        (torch.Size([5]), (5,)),
        (np.array([2, 3]), (2, 3)),
    ],
)
def test_a_number_is_an_event_of_one_axis(event, shape):
    x = sample_prior(4, event, T=40.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        x, sample_prior(4, shape, T=40.0, generator=torch.Generator().manual_seed(1))
    )
    assert x.shape == (4, *shape)


def test_bad_shapes_are_named():
    with pytest.raises(TypeError, match="event_shape expects an integer, got NoneType"):
        sample_prior(1, None, T=1)
    with pytest.raises(TypeError, match="event_shape expects an integer, got str"):
        sample_prior(1, "34", T=1)
    with pytest.raises(TypeError, match=r"dtype expects a floating-point type .*complex64"):
        sample_prior(1, 3, T=1, dtype=torch.complex64)
    with pytest.raises(ValueError, match="count expects an integer ≥ 1, got 0"):
        sample_prior(0, (3,), T=1)
    with pytest.raises(TypeError, match="count expects an integer, got float"):
        sample_prior(1.5, (3,), T=1)
    with pytest.raises(ValueError, match="event_shape expects an integer ≥ 1, got -1"):
        sample_prior(1, (3, -1), T=1)
    with pytest.raises(ValueError, match="max_radius expects a finite number > 0, got -1"):
        sample_prior(1, (3,), T=1, max_radius=-1)
    with pytest.raises(ValueError, match=r"x expects shape \(B, \*event\).*got \(3,\)"):
        log_prior(torch.zeros(3), T=1)
    with pytest.raises(TypeError, match=r"x expects a float32 or float64 tensor, got torch\.int64"):
        log_prior(torch.zeros(3, 2, dtype=torch.int64), T=1)
