# SPDX-License-Identifier: Apache-2.0
"""Do the gradients of x, t and x0 meet the accuracy contract on every named hard case?"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import CASES, Case, build, seeded, truth
from oracle import (
    Gradients,
    assert_gradient_of_x,
    assert_gradients,
    differentiate,
    solve,
)
from torch import Tensor


def leaves(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [a.to(dtype, copy=True).requires_grad_() for a in (case.x, case.t, case.x0)]


def cotangents(case: Case) -> tuple[Tensor, Tensor]:
    """Of v (B, d) and log_mass (B,), scaled so that both matter to the gradient of x."""
    generator = seeded(1)
    g_v = torch.randn(case.x.shape, generator=generator)
    return g_v, torch.randn(len(case.x), dtype=torch.float64, generator=generator)


def expected(name: str, g_v: Tensor, g_m: Tensor) -> Gradients:
    case = build(name)
    return differentiate(truth(name), case.x, case.x0, g_v, g_m, case.D)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_displacement(backend, name, dtype):
    case = build(name)
    x, t, x0 = leaves(case, dtype)
    g_v, g_m = cotangents(case)
    v, log_mass = backend.displacement(x, t, x0, D=case.D)
    gradients = torch.autograd.grad([v, log_mass], [x, t, x0], [g_v.to(dtype), g_m])
    assert [g.dtype for g in gradients] == [dtype] * 3
    assert_gradients(expected(name, g_v, g_m), *gradients)


@pytest.mark.parametrize("name", CASES)
def test_without_that_of_x0(backend, name):
    """For which other kernels may take what float32 is certain for."""
    case = build(name)
    x, t, _ = leaves(case)
    g_v, g_m = cotangents(case)
    v, log_mass = backend.displacement(x, t, case.x0, D=case.D)
    dx, dt = torch.autograd.grad([v, log_mass], [x, t], [g_v, g_m])
    assert_gradients(expected(name, g_v, g_m), dx, dt)
    assert_gradient_of_x(expected(name, g_v, g_m), dx)


@pytest.mark.parametrize("name", ["normal d=3", "normal d=64", "D=inf d=64", "N=513 d=2"])
@pytest.mark.parametrize("output", ["displacement", "log_mass"])
def test_one_output_alone(backend, name, output):
    case = build(name)
    x, t, x0 = leaves(case)
    g_v, g_m = cotangents(case)
    v, log_mass = backend.displacement(x, t, x0, D=case.D)
    if output == "displacement":
        (v * g_v).sum().backward()
        g_m = torch.zeros_like(g_m)
    else:
        (log_mass * g_m).sum().backward()
        g_v = torch.zeros_like(g_v)
    assert_gradients(expected(name, g_v, g_m), x.grad, t.grad, x0.grad)


@pytest.mark.parametrize(
    "name", ["normal d=1", "normal d=16", "normal d=64", "D=2.5 d=3", "all t d=2", "N=33 d=3072"]
)
@pytest.mark.parametrize(("gamma", "scale"), [(0.0, 1.0), (5.0, 8.0)])
def test_field(backend, name, gamma, scale):
    case = build(name)
    x, t, x0 = leaves(case)
    g = torch.randn(len(x), case.d + 1, generator=seeded(2))
    field = backend.field(x, t, x0, D=case.D, gamma=gamma, scale=scale)
    gradients = torch.autograd.grad(field, [x, t, x0], g)

    # The normalisation by autograd in float64, the sum over references by the oracle.
    v, t64 = truth(name).v.clone().requires_grad_(), case.t.double().requires_grad_()
    vector = torch.cat([v, -t64[:, None]], 1)
    normalised = scale * vector / (vector.norm(dim=1, keepdim=True) + gamma)
    g_v, dt_direct = torch.autograd.grad(normalised, [v, t64], g.double())
    inner = expected(name, g_v, torch.zeros(len(x)))
    combined = replace(
        inner,
        dt=inner.dt + dt_direct,
        dt_terms=inner.dt_terms + scale * g.double().norm(dim=1) / (truth(name).norm + gamma),
    )
    assert_gradients(combined, *gradients)


@pytest.mark.parametrize("D", [0.0, 1.0, 2.5, math.inf])
def test_the_oracle_is_autograd_of_the_formula(D):
    generator = seeded()
    x, x0 = (torch.randn(n, 5, dtype=torch.float64, generator=generator) for n in (4, 30))
    t = torch.rand(4, dtype=torch.float64, generator=generator) + 0.5
    g_v = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    g_m = torch.randn(4, dtype=torch.float64, generator=generator)
    for tensor in (x, t, x0):
        tensor.requires_grad_()
    squares = (x[:, None] - x0).square().sum(2)
    if math.isinf(D):
        logits = -squares / (2 * t.square()[:, None])
    else:
        logits = -(5 + D) / 2 * (squares + t.square()[:, None]).log()
    v = (logits.softmax(1)[:, :, None] * (x0 - x[:, None])).sum(1)
    log_mass = logits.logsumexp(1)
    dx, dt, dx0 = torch.autograd.grad([v, log_mass], [x, t, x0], [g_v, g_m])

    solved = solve(x, t, x0, D)
    assert solved.effective_sample_size.max() > 2
    torch.testing.assert_close(solved.v, v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(solved.log_mass, log_mass, rtol=1e-12, atol=1e-12)
    gradients = differentiate(solved, x, x0, g_v, g_m, D)
    torch.testing.assert_close(gradients.dx, dx, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients.dt, dt, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients.dx0, dx0, rtol=1e-11, atol=1e-11)
    for value, terms in (
        (dx, gradients.dx_terms),
        (dt, gradients.dt_terms),
        (dx0, gradients.dx0_terms),
    ):
        assert (value.abs() <= terms).all()
