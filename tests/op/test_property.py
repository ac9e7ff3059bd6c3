# SPDX-License-Identifier: Apache-2.0
"""Does any valid input meet the contract? Thousands of cases: --hypothesis-profile=thorough."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
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

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Problem:
    x: Tensor
    t: Tensor
    x0: Tensor
    D: float
    gamma: float
    g_v: Tensor
    g_m: Tensor


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in memory of another shape."""
    if layout == "transposed":
        return values.T.contiguous().T
    if layout == "strided":
        return torch.stack([values, -values], 2).flatten(1)[:, ::2]
    if layout == "one row":
        return values[:1].expand(values.shape)
    if layout == "one column":
        return values[:, :1].expand(values.shape)
    return values


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    d = draw(st.sampled_from([1, 2, 3, 5, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 100, 257, 301]))
    count, batch = draw(st.integers(1, 300)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = 10 ** draw(st.sampled_from([-2.0, 0.0, 0.0, 0.0, 2.0]))
    offset = draw(st.sampled_from([0.0, 0.0, 10.0, 1000.0]))
    x0_dtype, x_dtype = draw(st.sampled_from(DTYPES[1:])), draw(st.sampled_from(DTYPES))
    if x_dtype == torch.float16 or x0_dtype in DTYPES[:2]:
        offset, scale = 0.0, 1.0

    x0 = offset + scale * torch.randn(count, d, dtype=torch.float64, generator=generator)
    if draw(st.sampled_from([False, False, True])):  # on a grid of 256 steps, as 8-bit images are
        step = scale / 40
        x0 = offset + step * ((x0 - offset) / step).round().clamp(-128, 127)
    copies = draw(st.sampled_from([0, 1, 3, 100]))
    nudge = draw(st.sampled_from([0.0, 1e-6, 1e-3]))
    for _ in range(copies):
        source, target = torch.randint(count, (2,), generator=generator)
        x0[target] = x0[source] * (1 + nudge)
    x0 = laid_out(
        x0.to(x0_dtype), draw(st.sampled_from(["", "", "transposed", "strided", "one row"]))
    )

    # One t and one kind of query a row: on a reference, about t away, amid the data.
    exponents = draw(st.lists(st.floats(-5, 4), min_size=batch, max_size=batch))
    signs = draw(st.lists(st.sampled_from([1, 1, -1]), min_size=batch, max_size=batch))
    t = torch.tensor([s * 10**e for s, e in zip(signs, exponents, strict=True)])
    D = draw(st.sampled_from([0, 1, 1, 1, 2.5, 128, 1e6, math.inf]))
    kinds = draw(st.lists(st.integers(0, 2), min_size=batch, max_size=batch))
    distance = torch.tensor([0.0, 1.0, 0.0])[kinds] * t.abs()
    base = x0.double()[torch.randint(count, (batch,), generator=generator)]
    centre = offset + 0.3 * scale * torch.randn(batch, d, dtype=torch.float64, generator=generator)
    base = torch.where(torch.tensor(kinds)[:, None] == 2, centre, base)
    x = base + distance[:, None] * torch.randn(batch, d, dtype=torch.float64, generator=generator)
    x = x.to(x_dtype)
    assume(x.isfinite().all())
    x = laid_out(x, draw(st.sampled_from(["", "", "transposed", "strided", "one column"])))
    g_v = torch.randn(batch, d, generator=generator)
    g_m = torch.randn(batch, dtype=torch.float64, generator=generator)
    gamma = draw(st.sampled_from([0.0, 0.0, 5.0]))
    return Problem(x, t, x0, D, gamma, g_v, g_m)


@settings(suppress_health_check=list(HealthCheck))
@given(p=problems())
def test_every_problem(backend, p):
    assume(backend.reason() is None)
    truth = solve(p.x, p.t, p.x0, p.D)
    x, t, x0 = (tensor.detach().requires_grad_() for tensor in (p.x, p.t, p.x0))
    v, log_mass = backend.displacement(x, t, x0, D=p.D)
    field = backend.field(p.x, p.t, p.x0, D=p.D, gamma=p.gamma)
    named = x.shape[1] <= 16
    tolerance = FLOAT64 if v.dtype == torch.float64 else float32_contract(backend.name, named)
    assert_displacement(v.detach(), truth, tolerance)
    assert_log_mass(log_mass.detach(), truth)
    assert_field(field, truth, tolerance, p.gamma)
    gradients = torch.autograd.grad([v, log_mass], [x, t, x0], [p.g_v.to(v.dtype), p.g_m])
    assert [g.dtype for g in gradients] == [x.dtype, t.dtype, x0.dtype]
    assert_gradients(differentiate(truth, x, x0, p.g_v, p.g_m, p.D), *gradients)
