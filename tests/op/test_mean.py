# SPDX-License-Identifier: Apache-2.0
"""Is the posterior mean x + v, value and derivatives?"""

from __future__ import annotations

import math

import pytest
import torch
from cases import seeded
from oracle import differentiate, solve

from pfgm_kernels import posterior_mean


@pytest.mark.parametrize("D", [1, math.inf])
@pytest.mark.parametrize("d", [3, 40])
def test_value_and_derivatives(backend, d, D):
    if (reason := backend.reason(d, True)) is not None:
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
