# SPDX-License-Identifier: Apache-2.0
"""Is the posterior mean x + v, value and derivatives?"""

from __future__ import annotations

import math

import pytest
import torch
from cases import seeded
from oracle import differentiate, float32_contract, solve

from pfgm_kernels import posterior_mean


@pytest.mark.parametrize("D", [1, math.inf])
@pytest.mark.parametrize("d", [3, 40])
def test_value_and_derivatives(backend, d, D):
    if (reason := backend.reason()) is not None:
        pytest.skip(f"{backend.name}: {reason}")
    generator = seeded()
    x, dx = torch.randn(2, 5, 1, d, dtype=torch.float64, generator=generator)
    x0 = torch.randn(70, 1, d, dtype=torch.float64, generator=generator)
    t, g = torch.linspace(1, 3, 5, dtype=torch.float64), torch.randn(x.shape, generator=generator)
    t, g = t * (d**0.25 if math.isinf(D) else d**0.75), g.double()
    x.requires_grad_(), t.requires_grad_()

    def mean(x):
        arguments = (a.to(backend.device) for a in (x, t, x0))
        return posterior_mean(*arguments, D=D, backend=backend.name).cpu()

    truth = solve(x, t, x0, D)
    assert truth.effective_sample_size.max() > 2
    found = mean(x)
    torch.testing.assert_close(found.detach(), x.detach() + truth.v.view(x.shape))
    parts = differentiate(truth, x, x0, g, torch.zeros(5, dtype=torch.float64), D)
    gradients = torch.autograd.grad(found, [x, t], g)
    torch.testing.assert_close(gradients[0].flatten(1), (g + parts.dx.view(x.shape)).flatten(1))
    torch.testing.assert_close(gradients[1], parts.dt)
    # The product with a tangent of x is that of its gradient: (g·ṁ) = (∂(g·m)/∂x)·ẋ.
    _, tangent = torch.func.jvp(mean, (x.detach(),), (dx,))
    torch.testing.assert_close((g * tangent).sum(), (gradients[0] * dx).sum())


@pytest.mark.parametrize("D", [1, 128, 1e6, math.inf])
@pytest.mark.parametrize("kind", ["normal", "grid", "crowd"])
@pytest.mark.parametrize("d", [1, 3, 16, 24, 25, 100, 256, 257, 784])
def test_far_from_the_data(backend, d, kind, D):
    """By the contract's share of the mean's norm, though x is up to 1e8 away."""
    generator = seeded(d)
    x0 = 1 + torch.randn(70, d, generator=generator)
    if kind == "grid":
        x0 = x0.round()
    elif kind == "crowd":
        x0[20:] = x0[20]
    away = torch.randn(9, d, generator=generator)
    distance = torch.logspace(0, 8, 9)
    x = x0[:9] + away * (distance / away.norm(dim=1))[:, None]
    # Where references share the weight: their logits differ by about the distance times the width
    # of the data, over t² for D = ∞ and else times k/s.
    t = (distance * math.sqrt(d)).sqrt() if math.isinf(D) else (D * distance).sqrt()
    found = backend.mean(x, t, x0, D=D)
    truth = solve(x, t, x0, D)
    mean = truth.weights @ x0.double()
    assert (truth.effective_sample_size > 1.5).sum() > 3
    error = (found.double() - mean).norm(dim=1)
    tolerance = max(1e-6, float32_contract(backend.name, named=d <= 16))  # it is in float32
    assert (error / mean.norm(dim=1)).max() <= tolerance
