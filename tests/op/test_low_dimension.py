# SPDX-License-Identifier: Apache-2.0
"""Is the field of few dimensions right at small t and far from the origin?

There the expanded form ‖x‖² − 2x·x0 + ‖x0‖² loses everything: an error of 0.18 at t = 1e-3.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import seeded
from oracle import (
    FLOAT64,
    assert_displacement,
    assert_field,
    assert_gradients,
    assert_log_mass,
    differentiate,
    float32_contract,
    solve,
)
from torch import Tensor


def spiral(d: int, offset: float, t: float) -> tuple[Tensor, Tensor]:
    """1,500 float32 points along a curve in d dimensions, and 20 queries about t away from it."""
    angle = torch.linspace(0, 12, 1500)
    rates = torch.linspace(0.5, 1.5, d)
    x0 = offset + angle[:, None] / 12 * torch.cos(angle[:, None] * rates)
    generator = seeded(d)
    index = torch.randint(1500, (20,), generator=generator)
    return x0[index] + t / math.sqrt(d) * torch.randn(20, d, generator=generator), x0


@pytest.mark.parametrize("height", [1e-5, 1e-3, 0.03, 1.0])
@pytest.mark.parametrize("offset", [0, 10, 1000])
@pytest.mark.parametrize("d", [1, 2, 3, 16])
def test_a_curve(backend, d, offset, height):
    x, x0 = spiral(d, offset, height)
    x, t = x.requires_grad_(), torch.full((20,), height, requires_grad=True)
    truth = solve(x, t, x0)
    if height == 0.03:
        assert truth.effective_sample_size.max() > 2
    v, log_mass = backend.displacement(x, t, x0)
    tolerance = float32_contract(backend.name)
    assert_displacement(v, truth, tolerance)
    assert_field(backend.field(x, t, x0), truth, tolerance)
    g_v, g_m = torch.randn(20, d, generator=seeded()), torch.ones(20, dtype=torch.float64)
    expected = differentiate(truth, x, x0, g_v, g_m)
    assert_gradients(expected, *torch.autograd.grad([v, log_mass], [x, t], [g_v, g_m]))


@pytest.mark.parametrize("N", [1, 17, 600])
@pytest.mark.parametrize(
    ("d", "D"), [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 2), (3, 0), (3, 1)]
)
def test_low_powers(backend, d, D, N):
    generator = seeded(10 * d + D)
    x, x0 = (torch.randn(n, d, generator=generator) for n in (33, N))
    t = torch.randn(33, generator=generator).abs()
    truth = solve(x, t, x0, D)
    v, log_mass = backend.displacement(x, t, x0, D=D)
    assert_displacement(v, truth, float32_contract(backend.name))
    assert_log_mass(log_mass, truth)


@pytest.mark.parametrize("distance", [1e4, 1e9, 1e15])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_first_references_may_be_far_off(backend, d, distance):
    generator = seeded(d)
    x, x0 = (torch.randn(n, d, generator=generator) for n in (20, 300))
    x0[:20] += distance
    truth = solve(x, 1e-3, x0)
    v, log_mass = backend.displacement(x, 1e-3, x0)
    assert_displacement(v, truth, float32_contract(backend.name))
    assert_log_mass(log_mass, truth)


@pytest.mark.parametrize("D", [1, 3.5, 8])
@pytest.mark.parametrize("d", [1, 2, 4, 8, 16, 24])
def test_a_crowd_among_others(backend, d, D):
    """Copies of one reference err alike."""
    generator = seeded(d)
    crowd, others = (torch.randn(n, d, generator=generator) for n in (1, 10))
    x0 = torch.cat([crowd.expand(500, d), others])[torch.randperm(510, generator=generator)]
    # Far off, where roundings of the squared distance move the logits most.
    x, t = 3 * torch.randn(48, d, generator=generator), torch.linspace(0.01, 1, 48)
    truth = solve(x, t, x0, D)
    v, log_mass = backend.displacement(x, t, x0, D=D)
    assert_displacement(v, truth, float32_contract(backend.name))
    assert_log_mass(log_mass, truth)


@pytest.mark.parametrize("d", [1, 2, 3, 16])
def test_moving_everything_changes_nothing(backend, d):
    """On a grid that float32 holds with the offset too, the displacements are the same."""
    generator = seeded(d)
    x, x0 = (torch.randint(-256, 256, (n, d), generator=generator) / 1024 for n in (20, 600))
    v, log_mass = backend.displacement(x.double(), 1e-3, x0.double())
    moved, moved_mass = backend.displacement((x + 4096).double(), 1e-3, (x0 + 4096).double())
    assert solve(x, 1e-3, x0).effective_sample_size.max() > 1.5
    torch.testing.assert_close(moved, v, rtol=FLOAT64, atol=1e-16)
    torch.testing.assert_close(moved_mass, log_mass, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("d", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_scaling_everything_scales_the_displacement(backend, d, factor):
    generator = seeded(d)
    x, x0 = (torch.randn(n, d, generator=generator) for n in (20, 300))
    t = torch.linspace(0.5, 2, 20, dtype=torch.float64) * math.sqrt(d)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        x, x0 = x.to(dtype), x0.to(dtype)
        v, log_mass = backend.displacement(x, t, x0)
        scaled, scaled_mass = backend.displacement(factor * x, factor * t, factor * x0)
        error = (scaled / factor - v).norm(dim=1) / v.norm(dim=1)
        assert error.max() <= tolerance
        expected = log_mass - (d + 1) * math.log(factor)
        torch.testing.assert_close(scaled_mass, expected, rtol=1e-13, atol=max(tolerance, 1e-11))


@pytest.mark.parametrize("d", [1, 2, 3, 17, 64])
def test_negative_t_is_the_mirror_image(backend, d):
    generator = seeded(d)
    x, x0 = (torch.randn(n, d, generator=generator) for n in (9, 300))
    t = torch.linspace(0.1, 3, 9, requires_grad=True)
    v, log_mass = backend.displacement(x, t, x0)
    mirrored, mirrored_mass = backend.displacement(x, -t, x0)
    assert torch.equal(mirrored, v)
    assert torch.equal(mirrored_mass, log_mass)
    field, mirrored_field = backend.field(x, t, x0, gamma=0.5), backend.field(x, -t, x0, gamma=0.5)
    assert torch.equal(mirrored_field[:, :d], field[:, :d])
    assert torch.equal(mirrored_field[:, d], -field[:, d])
    assert (field[:, d] < 0).all()  # the field points toward the plane of the data
    (plus,) = torch.autograd.grad(v.sum() + log_mass.sum(), t)
    (minus,) = torch.autograd.grad(mirrored.sum() + mirrored_mass.sum(), t)
    assert torch.equal(minus, plus)  # both with respect to t, through −t
