# SPDX-License-Identifier: Apache-2.0
"""References of every stored dtype and all that is computed of them, wherever they lie."""

from __future__ import annotations

from functools import partial

import torch
from cases import seeded
from torch import Tensor

from pfgm_kernels import (
    ReferenceSet,
    divergence,
    log_density,
    poisson_field,
    posterior_mean,
)

FUNCTIONS = (posterior_mean, log_density, divergence, poisson_field)


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """References, what they stand for in float64, and float64 queries x and t near and far."""
    generator = seeded(3)
    rows = torch.randn(301, 50, generator=generator, dtype=torch.float64).to(dtype)
    if dtype == torch.uint8:
        rows = torch.randint(256, (301, 50), generator=generator, dtype=torch.uint8)
    rows[1::7] = rows[0]
    exact = rows.double()
    if dtype == torch.uint8:
        exact = (exact / 127.5 - 1).float().double()
    noise = torch.randn(20, 50, generator=generator, dtype=torch.float64)
    x = exact[:20] + torch.logspace(-3, 1, 20)[:, None] * noise
    return rows, exact, x, torch.logspace(-2, 2, 20, dtype=torch.float64)


def results(x: Tensor, t: Tensor, references: ReferenceSet, D: float) -> dict[str, list[Tensor]]:
    """Of each function its values, their gradients by x and t, and a tangent if it has one."""
    found = {}
    for function in FUNCTIONS:
        xs, ts = x.clone().requires_grad_(), t.clone().requires_grad_()
        values = function(xs, ts, references, D=D)
        gradients = torch.autograd.grad(values.sum(), (xs, ts))
        tangents = []
        if function is not divergence:
            at = partial(function, t=t, x0=references, D=D)
            tangents = [torch.func.jvp(at, (x,), (x.cos(),))[1]]
        each = [values.detach(), *gradients, *tangents]
        found[function.__name__] = [tensor.cpu() for tensor in each]
    return found


def assert_alike(
    found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]], t: Tensor
) -> None:
    """Each row to 1e-9 of its norm and of its terms, whose sizes grow as t falls."""
    assert found.keys() == expected.keys()
    for name, results in expected.items():
        for i, (got, wanted) in enumerate(zip(found[name], results, strict=True)):
            gap, size = (
                (each.flatten(1) if each.dim() > 1 else each[:, None]).norm(dim=1)
                for each in (got - wanted, wanted)
            )
            terms = 1 + size + (50 / t) ** (1 if i == 0 else 2)
            assert (gap <= 1e-9 * terms).all(), f"{name}, {i}: {(gap / terms).max():.1e}"
