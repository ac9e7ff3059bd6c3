# SPDX-License-Identifier: Apache-2.0
"""Does the flux argument hold: does every data point get its equal share of the prior?"""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn.functional import pdist

from pfgm_kernels import ReferenceSet, poisson_displacement, poisson_field
from pfgm_kernels.flow import sample, sample_prior


def points(count: int, d: int) -> Tensor:
    """Centred, within 1 of the origin, no two nearer than 0.3: the widest apart of 200 sets."""
    generator = torch.Generator().manual_seed(8)
    candidates = torch.randn(200, count, d, dtype=torch.float64, generator=generator)
    candidates -= candidates.mean(1, keepdim=True)
    candidates /= candidates.norm(dim=2).amax(1)[:, None, None]
    x0 = max(candidates, key=lambda candidate: pdist(candidate).min().item())
    assert pdist(x0).min() > 0.3
    return x0


def closed_form(x0: Tensor):
    """The direction of Eq. (3) in float64, distances from a matrix product: for many queries."""

    def field(x: Tensor, t: Tensor) -> Tensor:
        s = torch.cdist(x, x0).square() + t[:, None].square()
        weights = (-(x.shape[1] + 1) / 2 * s.log()).softmax(1)
        return torch.cat([weights @ x0 - x, -t[:, None]], 1)

    return field


def kernels(x0: Tensor):
    references = ReferenceSet(x0)
    return lambda x, t: poisson_field(x, t, references)


def landings(field_of, x0: Tensor, count: int, T: float, steps: int) -> tuple[Tensor, Tensor]:
    """Distance to the nearest data point and its index, of `count` prior draws taken to t = 0."""
    generator = torch.Generator().manual_seed(8)
    x = sample_prior(count, x0.shape[1:], T=T, generator=generator, dtype=torch.float64)
    # A draw from the far tail stays t_min ‖x_T‖ / T short of its source before the final step.
    t_min = 1e-4 * T / x.norm(dim=1).max().item()
    ended = sample(field_of(x0), x, T=T, t_min=t_min, solver="heun", steps=steps).x
    nearest = torch.cdist(ended, x0, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    return nearest.values, nearest.indices


@pytest.mark.parametrize(
    ("count", "d", "steps"), [(7, 2, 160), pytest.param(10, 64, 40, marks=pytest.mark.exhaustive)]
)
def test_the_prior_lands_uniformly_on_the_data(count, d, steps):
    x0 = points(count, d)
    distance, landed = landings(closed_form, x0, 20_000, 50.0, steps)
    assert distance.max() < 1e-6
    assert stats.chisquare(torch.bincount(landed, minlength=count)).pvalue > 0.001


@pytest.mark.parametrize(("count", "d"), [(7, 2), (10, 64)])
def test_the_kernels_lead_to_the_same_points(count, d):
    x0 = points(count, d)
    distance, landed = landings(kernels, x0, 1_000, 50.0, 40)
    assert distance.max() < 1e-6
    expected = landings(closed_form, x0, 1_000, 50.0, 40)[1]
    assert (landed == expected).double().mean() > 0.995  # but for lines next to a separatrix
    assert stats.chisquare(torch.bincount(landed, minlength=count)).pvalue > 0.001


def test_a_plane_too_near_is_found_out():
    # The prior is the flux of the data seen as one charge: at T of the data's size it is not.
    x0 = points(7, 2)
    landed = landings(closed_form, x0, 20_000, 0.5, 40)[1]
    assert stats.chisquare(torch.bincount(landed, minlength=7)).pvalue < 1e-6


def shell(d: int) -> Tensor:
    """Points spread regularly over the unit sphere: a polygon, or a Fibonacci lattice."""
    if d == 2:
        angle = torch.arange(100, dtype=torch.float64) * (2 * math.pi / 100)
        return torch.stack([angle.cos(), angle.sin()], 1)
    index = torch.arange(2_000, dtype=torch.float64)
    height = 1 - (2 * index + 1) / 2_000
    angle = index * math.pi * (3 - math.sqrt(5))
    radius = (1 - height.square()).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin(), height], 1)


def magnitude(x: Tensor, t: float, x0: Tensor, D: float) -> Tensor:
    """‖(F_x, F_t)‖ of Eq. (3), or of Eq. (2) for D = 0 and t = 0, without the constant S."""
    v, log_mass = poisson_displacement(x, t, x0, D=D)
    return log_mass.exp() * (v.square().sum(1) + t * t).sqrt() / len(x0)


@pytest.mark.parametrize("d", [2, 3])
def test_only_the_extra_dimension_gives_a_field_inside_a_shell(d):
    # Without it nothing leads from a prior outside to the inside: Newton's shell theorem.
    generator = torch.Generator().manual_seed(8)
    direction = torch.randn(50, d, dtype=torch.float64, generator=generator)
    direction /= direction.norm(dim=1, keepdim=True)
    inside = direction * torch.linspace(0.05, 0.5, 50, dtype=torch.float64)[:, None]
    outside = 2 * direction
    x0 = shell(d)

    without_inside, without_outside = (magnitude(x, 0.0, x0, D=0) for x in (inside, outside))
    # Outside, the shell acts as one charge in its centre: r^(1−d).
    torch.testing.assert_close(
        without_outside, torch.full_like(without_outside, 2.0 ** (1 - d)), rtol=1e-3, atol=0
    )
    assert without_inside.max() <= 0.01 * without_outside.min()

    with_inside, with_outside = (magnitude(x, 0.2, x0, D=1) for x in (inside, outside))
    assert with_inside.min() > 0.5 * with_outside.max()
