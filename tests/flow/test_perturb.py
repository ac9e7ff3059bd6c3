# SPDX-License-Identifier: Apache-2.0
"""Do the training queries follow Eq. (11)?"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pfgm_kernels.flow import PRESETS, perturb

COUNT = 20_000
SIGMA, TAU, M = 0.01, 0.03, 291


def queries(d: int, count: int = COUNT, **options) -> tuple[np.ndarray, np.ndarray]:
    """‖x − x0‖ and t of `count` queries in d dimensions, in float64."""
    generator = torch.Generator().manual_seed(11)
    x0 = torch.randn(count, d, dtype=torch.float64, generator=generator)
    x, t = perturb(x0, generator=generator, **options)
    return (x - x0).norm(dim=1).numpy(), t.numpy()


def eq_11(d: int, D: int, restrict: bool, count: int = COUNT) -> tuple[np.ndarray, np.ndarray]:
    """The same by Eq. (11) and the published rule for small t to the letter, with numpy."""
    rng = np.random.default_rng(5)
    norm_x = np.linalg.norm(SIGMA * rng.standard_normal((count, d)), axis=1)
    norm_t = np.linalg.norm(SIGMA * rng.standard_normal((count, D)), axis=1)
    m = rng.uniform(0, M, count)
    if restrict:
        low = norm_t < 0.005
        m[low] = rng.uniform(0, int(0.7 * M), low.sum())
    return norm_x * (1 + TAU) ** m, norm_t * (1 + TAU) ** m


@pytest.mark.parametrize("restrict", [True, False])
@pytest.mark.parametrize(("d", "D"), [(1, 1), (2, 1), (64, 1), (8, 2), (8, 5)])
def test_norms_and_heights_follow_eq_11(d, D, restrict):
    radius, t = queries(d, D=D, restrict_M=restrict)
    expected_radius, expected_t = eq_11(d, D, restrict)
    assert stats.ks_2samp(radius, expected_radius).pvalue > 0.001
    assert stats.ks_2samp(t, expected_t).pvalue > 0.001
    ratio, expected_ratio = t / radius, expected_t / expected_radius
    assert stats.ks_2samp(ratio, expected_ratio).pvalue > 0.001
    assert stats.ks_2samp(t * radius, expected_t * expected_radius).pvalue > 0.001


@pytest.mark.parametrize(("d", "D"), [(3, 1), (10, 0.3), (10, 2.5), (40, 128)])
def test_the_ratio_of_the_norms_is_f_distributed_for_real_d(d, D):
    radius, t = queries(d, D=D, restrict_M=False)
    law = stats.f(D, d)
    assert stats.kstest((t * t / D) / (radius * radius / d), law.cdf).pvalue > 0.001


def test_infinite_d_shows_m_uniform_and_real():
    # t is then the noise level itself, sigma (1+tau)^m.
    radius, t = queries(4, D=math.inf, sigma=0.5, tau=0.1, M=37.5)
    m = np.log(t / 0.5) / np.log(1.1)
    assert stats.kstest(m, stats.uniform(0, 37.5).cdf).pvalue > 0.001
    assert stats.kstest(radius / t, stats.chi(4).cdf).pvalue > 0.001


def test_m_is_restricted_exactly_where_the_published_rule_says():
    # At d = 5,000 the norm of the noise gives each query's level to 1 %, hence m to about 0.34.
    d = 5_000
    radius, t = queries(d, 2_000, M=M)
    level = radius / math.sqrt(d)
    m = np.log(level / SIGMA) / np.log(1 + TAU)
    low, high = t / (level / SIGMA) < 0.0048, t / (level / SIGMA) > 0.0052
    assert 0.33 < low.mean() < 0.40
    assert m[low].max() < 203 + 2
    assert stats.kstest(m[low], stats.uniform(0, 203).cdf).pvalue > 0.001
    assert stats.kstest(m[high], stats.uniform(0, 291).cdf).pvalue > 0.001


def test_the_displacement_is_isotropic_and_independent_of_the_point():
    generator = torch.Generator().manual_seed(2)
    x0 = torch.randn(COUNT, 3, dtype=torch.float64, generator=generator) + 10
    noise = perturb(x0, generator=generator)[0] - x0
    direction = noise / noise.norm(dim=1, keepdim=True)
    # In three dimensions each coordinate of a uniform direction is uniform on [-1, 1].
    for coordinate in direction.T:
        assert stats.kstest(coordinate.numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.001
    assert (direction.T @ (x0 - 10) / COUNT).abs().max() < 5 / math.sqrt(3 * COUNT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_dtypes_and_generator(dtype):
    x0 = torch.zeros(5, 2, 3, dtype=dtype)
    x, t = perturb(x0, generator=torch.Generator().manual_seed(0))
    again = perturb(x0, generator=torch.Generator().manual_seed(0))
    assert x.shape == (5, 2, 3)
    assert t.shape == (5,)
    assert x.dtype == t.dtype == dtype
    assert (t > 0).all()
    assert torch.equal(x, again[0])
    assert torch.equal(t, again[1])


def test_presets_name_the_published_constants():
    preset = PRESETS["cifar10"]
    radius, t = queries(3072, 400, **preset.noise)
    # Norms at m = 0 … M as tabulated for CIFAR-10: 0.554 … 3015, with a chi's 5 sigma around.
    assert 0.554 * 0.93 < radius.min() < 1
    assert 2000 < radius.max() < 3015 * 1.07
    assert t.max() < 6 * preset.sigma * (1 + preset.tau) ** preset.M


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sigma": 0}, ValueError, "sigma expects a finite number > 0, got 0"),
        ({"tau": -0.1}, ValueError, "tau expects a finite number > 0, got -0.1"),
        ({"M": math.inf}, ValueError, "M expects a finite number > 0, got inf"),
        ({"D": 0}, ValueError, "D expects a number > 0, got 0"),
        ({"D": True}, TypeError, "D expects a real number, got bool"),
        ({"x0": torch.zeros(3)}, ValueError, r"x0 expects shape \(B, \*event\)"),
        (
            {"x0": torch.zeros(3, 2, dtype=torch.uint8)},
            TypeError,
            "floating-point tensor .*, got torch.uint8",
        ),
        ({"x0": [[0.0]]}, TypeError, "x0 expects a tensor, got list"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        perturb(**{"x0": torch.zeros(3, 2), **options})
