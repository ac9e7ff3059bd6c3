# SPDX-License-Identifier: Apache-2.0
"""Are the singular point, t = 0 elsewhere and fields of zero norm what the design says?"""

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
    solve,
)

from pfgm_kernels import ReferenceSet, merge


@pytest.mark.parametrize("d", [1, 3, 16, 40, 100, 300])
@pytest.mark.parametrize("D", [0, 1, 2.5])
@pytest.mark.parametrize("copies", [1, 3])
def test_on_a_reference_at_t_0(backend, d, D, copies):
    x0 = torch.randn(70, d, generator=seeded(d))
    x0[60 : 60 + copies] = x0[3]
    x = torch.stack([x0[0], x0[3], x0[3] + 1])
    t = torch.tensor([0.0, 0.0, 0.5])
    x, t, x0 = x.requires_grad_(), t.requires_grad_(), x0.requires_grad_()

    v, log_mass = backend.displacement(x, t, x0, D=D)
    assert not v[:2].any()
    assert (log_mass[:2] == math.inf).all()
    field = backend.field(x, t, x0, D=D)
    assert not field[:2].any()

    # Neither row has a gradient, nor passes one on to the references; the regular row does.
    g_v, g_m = torch.ones(3, d), torch.ones(3, dtype=torch.float64)
    dx, dt, dx0 = torch.autograd.grad([v, log_mass], [x, t, x0], [g_v, g_m])
    assert not dx[:2].any()
    assert not dt[:2].any()
    regular = solve(x[2:], t[2:], x0, D)
    expected = differentiate(regular, x[2:], x0, g_v[2:], g_m[2:], D)
    assert_gradients(expected, dx[2:], dt[2:], dx0)

    dx, dt, dx0 = torch.autograd.grad(field, [x, t, x0], torch.ones_like(field))
    assert not dx[:2].any()
    assert not dt[:2].any()
    assert dx0.isfinite().all()


@pytest.mark.parametrize("d", [2, 40])
@pytest.mark.parametrize("D", [0, 1])
def test_t_0_off_the_references_is_regular(backend, d, D):
    """D = 0 and t = 0: Eq. (2), the field without the extra dimension."""
    generator = seeded(d)
    x0 = torch.randn(70, d, dtype=torch.float64, generator=generator)
    x = 0.5 * torch.randn(5, d, dtype=torch.float64, generator=generator)
    expected = solve(x, 0.0, x0, D)
    assert expected.effective_sample_size.max() > 2
    v, log_mass = backend.displacement(x, 0.0, x0, D=D)
    assert_displacement(v, expected, FLOAT64)
    assert_log_mass(log_mass, expected)
    assert_field(backend.field(x, 0, x0, D=D), expected, FLOAT64)


def test_t_0_beside_a_reference_in_one_coordinate_has_a_gradient(backend):
    x0 = torch.tensor([[0.0, 1.0], [3.0, -2.0]], dtype=torch.float64)
    x = torch.tensor([[0.0, 1.5]], dtype=torch.float64, requires_grad=True)
    outputs = backend.displacement(x, 0.0, x0)
    cotangents = [torch.ones_like(output) for output in outputs]
    (dx,) = torch.autograd.grad(outputs, x, cotangents)
    assert_gradients(differentiate(solve(x, 0.0, x0), x, x0, *cotangents), dx)


@pytest.mark.parametrize("d", [1, 3, 40])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_a_field_of_zero_norm_is_zero_with_zero_gradient(backend, d, gamma):
    x0 = torch.stack([torch.ones(d), -torch.ones(d)]).requires_grad_()
    x, t = torch.zeros(1, d, requires_grad=True), torch.zeros(1, requires_grad=True)
    field = backend.field(x, t, x0, gamma=gamma)
    assert not field.any()
    for gradient in torch.autograd.grad(field.sum(), [x, t, x0]):
        assert not gradient.any()


def test_t_0_with_infinite_d_is_refused_or_nan(backend):
    x0 = torch.randn(50, 3, generator=seeded())
    x = x0[:4] + 0.1
    with pytest.raises(ValueError, match="t expects"):
        backend.displacement(x, 0.0, x0, D=math.inf)
    t = torch.tensor([0.5, 0.0, 2.0, -1.0])
    x[1] = x0[1]
    v, log_mass = backend.displacement(x, t, x0, D=math.inf)
    assert v[1].isnan().all()
    assert log_mass[1].isnan()
    assert backend.field(x, t, x0, D=math.inf)[1].isnan().all()
    keep = torch.tensor([0, 2, 3])
    expected = solve(x[keep], t[keep], x0, math.inf)
    assert_displacement(v[keep], expected, 1e-6)
    assert_log_mass(log_mass[keep], expected)
    # So are gradients: the singular point is one of a finite D.
    leaf = x0[:1].clone().requires_grad_()
    v, log_mass = backend.displacement(leaf, torch.zeros(1), x0, D=math.inf)
    cotangents = [torch.ones_like(v), torch.ones_like(log_mass)]
    (dx,) = torch.autograd.grad([v, log_mass], leaf, cotangents)
    assert dx.isnan().all()
    tangents = torch.func.jvp(
        lambda x: backend.displacement(x, torch.zeros(1), x0, D=math.inf),
        (x0[:1],),
        (torch.ones(1, 3),),
    )[1]
    assert all(tangent.isnan().all() for tangent in tangents)


def test_shards_share_the_singular_point_equally(backend):
    x0 = torch.randn(40, 3, generator=seeded())
    x0[30] = x0[2]
    x = x0[2:4].clone()
    parts = [backend.displacement(x, 0.0, part) for part in x0.split(20)]
    v, log_mass = merge(parts)
    assert not v[0].any()
    assert torch.equal(log_mass, torch.full((2,), math.inf, dtype=torch.float64))
    # Displacements to infinite masses are averaged.
    halves = [(torch.full((1, 3), value), torch.tensor([math.inf])) for value in (1.0, 5.0)]
    v, log_mass = merge([*halves, (torch.full((1, 3), 100.0), torch.tensor([3.0]))])
    assert torch.equal(v, torch.full((1, 3), 3.0))
    assert log_mass.item() == math.inf


def test_the_singular_point_across_chunks(backend):
    """A small workspace splits the references: the coinciding ones lie in several chunks."""
    x0 = torch.randn(6000, 24, generator=seeded())
    x0[[5, 2500, 5999]] = x0[5].clone()
    references = ReferenceSet(x0, workspace=1 << 20)
    x = x0[[5, 4000]].requires_grad_()
    v, log_mass = backend.displacement(x, 0.0, references)
    assert not v.any()
    assert (log_mass == math.inf).all()
    (dx,) = torch.autograd.grad([v, log_mass], x, [torch.ones(2, 24), torch.ones(2).double()])
    assert not dx.any()


def test_close_to_the_singular_point(backend):
    """x on a reference with t → 0: log_mass = −k ln t, and everything stays finite."""
    x0 = torch.randn(50, 3, dtype=torch.float64, generator=seeded())
    t = torch.tensor([1e-5, 1e-20, 1e-100, 1e-150], dtype=torch.float64)
    x = x0[:4].clone()
    v, log_mass = backend.displacement(x, t, x0)
    assert_displacement(v, solve(x, t, x0), FLOAT64)
    torch.testing.assert_close(log_mass, -4 * t.log(), rtol=1e-14, atol=0)
    field = backend.field(x, t, x0)
    expected = torch.tensor([[0.0, 0, 0, -1]] * 4, dtype=torch.float64)
    torch.testing.assert_close(field, expected, rtol=0, atol=1e-12)
