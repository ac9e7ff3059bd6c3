# SPDX-License-Identifier: Apache-2.0
"""Does the form of the inputs not matter: shapes, strides, dtypes, sizes down to nothing?"""

from __future__ import annotations

import math
from collections.abc import Callable

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

from pfgm_kernels import ReferenceSet

HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)


@pytest.mark.parametrize("event", [(), (1,), (3,), (2, 3, 4), (1, 1), (3, 32, 32)])
def test_event_shapes(backend, event):
    generator = seeded()
    x, x0 = (torch.randn(n, *event, dtype=torch.float64, generator=generator) for n in (5, 70))
    x, x0 = x.requires_grad_(), x0.requires_grad_()
    d = math.prod(event)
    truth = solve(x, 1.5 * d**0.75, x0)
    assert truth.effective_sample_size.max() > 2
    v, log_mass = backend.displacement(x, 1.5 * d**0.75, x0)
    field = backend.field(x, 1.5 * d**0.75, x0)
    assert v.shape == (5, *event)
    assert log_mass.shape == (5,)
    assert field.shape == (5, d + 1)
    assert_displacement(v.detach(), truth, FLOAT64)
    assert_field(field.detach(), truth, FLOAT64)
    g_v, g_m = torch.ones_like(v), torch.ones_like(log_mass)
    dx, dx0 = torch.autograd.grad([v, log_mass], [x, x0], [g_v, g_m])
    assert dx.shape == x.shape
    assert dx0.shape == x0.shape
    assert_gradients(differentiate(truth, x, x0, g_v, g_m), dx=dx, dx0=dx0)


def strided(shape: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    """One tensor of every layout, float32."""
    rows, columns = shape
    return {
        "transposed": torch.randn(columns, rows, generator=generator).T,
        "strided": torch.randn(2 * rows, 3 * columns, generator=generator)[::2, ::3],
        "offset": torch.randn(rows + 3, columns + 5, generator=generator)[3:, 5:],
        "one row": torch.randn(1, columns, generator=generator).expand(rows, columns),
        "one column": torch.randn(rows, 1, generator=generator).expand(rows, columns),
    }


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "one row", "one column"])
@pytest.mark.parametrize("d", [3, 40])
def test_strides(backend, layout, d):
    """Of queries, references, t and cotangents."""
    generator = seeded()
    x0, x = strided((70, d), generator)[layout], strided((6, d), generator)[layout]
    t = (d**0.75 * (1 + torch.rand(12, generator=generator)))[::2]
    g_v, g_m = strided((6, d), generator)[layout], torch.randn(1, generator=generator).expand(6)
    truth = solve(x, t, x0)
    x, t, x0 = (a.detach().requires_grad_() for a in (x, t, x0))
    assert not x.is_contiguous()
    assert not t.is_contiguous()
    v, log_mass = backend.displacement(x, t, x0)
    assert_displacement(v.detach(), truth, float32_contract(backend.name))
    assert_log_mass(log_mass.detach(), truth)
    gradients = torch.autograd.grad([v, log_mass], [x, t, x0], [g_v, g_m.double()])
    assert_gradients(differentiate(truth, x, x0, g_v, g_m, 1), *gradients)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("x0_dtype", DTYPES)
@pytest.mark.parametrize("d", [3, 40])
def test_dtypes(backend, x_dtype, x0_dtype, d):
    """Promotion as in torch, 16 bits computed in float32; gradients in each input's dtype."""
    generator = seeded()
    x = torch.randn(6, d, generator=generator).to(x_dtype).requires_grad_()
    x0 = torch.randn(70, d, generator=generator).to(x0_dtype).requires_grad_()
    t = (d**0.75 * (1 + torch.rand(6, generator=generator))).half().requires_grad_()
    truth = solve(x, t, x0)
    assert truth.effective_sample_size.max() > 2
    v, log_mass = backend.displacement(x, t, x0)
    field = backend.field(x, t, x0)
    double = torch.float64 in (x_dtype, x0_dtype)
    assert v.dtype == field.dtype == (torch.float64 if double else torch.float32)
    tolerance = FLOAT64 if double else float32_contract(backend.name)
    assert_displacement(v.detach(), truth, tolerance)
    assert_field(field.detach(), truth, tolerance)
    assert_log_mass(log_mass.detach(), truth)
    g_v, g_m = torch.ones_like(v), torch.ones_like(log_mass)
    gradients = torch.autograd.grad([v, log_mass], [x, t, x0], [g_v, g_m])
    assert [g.dtype for g in gradients] == [x_dtype, torch.float16, x0_dtype]
    assert_gradients(differentiate(truth, x, x0, g_v, g_m), *gradients)


FORMS: dict[str, Callable[[], Tensor | float]] = {
    "float": lambda: 2.0,
    "int": lambda: 2,
    "0-dim": lambda: torch.tensor(2.0),
    "0-dim int": lambda: torch.tensor(2),
    "per row": lambda: torch.full((5,), 2.0),
    "per row int": lambda: torch.full((5,), 2),
    "expanded": lambda: torch.tensor(2.0, dtype=torch.float64).expand(5),
    "bfloat16": lambda: torch.full((5,), 2.0, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_t(backend, form):
    x, x0 = (torch.randn(n, 3, generator=seeded()) for n in (5, 70))
    v, log_mass = backend.displacement(x, FORMS[form](), x0)
    assert_displacement(v, solve(x, 2.0, x0), float32_contract(backend.name))
    assert_log_mass(log_mass, solve(x, 2.0, x0))


def test_a_0_dim_t_has_the_sum_of_the_rows_gradients(backend):
    x, x0 = (torch.randn(n, 3, generator=seeded()) for n in (5, 70))
    single = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    rows = torch.full((5,), 2.0, dtype=torch.float64, requires_grad=True)
    sums = []
    for t in (single, rows):
        v, log_mass = backend.displacement(x, t, x0)
        sums.append(torch.autograd.grad(v.sum() + log_mass.sum(), t)[0])
    assert sums[0].shape == ()
    torch.testing.assert_close(sums[0], sums[1].sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("event", [(), (3,), (40,), (3, 32, 32)])
@pytest.mark.parametrize("kind", ["tensor", "set", "images"])
def test_no_queries(backend, event, kind):
    x0 = torch.randn(17, *event, generator=seeded())
    references = {
        "tensor": x0.clone().requires_grad_(),
        "set": ReferenceSet(x0),
        "images": ReferenceSet.from_images(x0.to(torch.uint8)),
    }[kind]
    x, t = torch.empty(0, *event, requires_grad=True), torch.empty(0, requires_grad=True)
    v, log_mass = backend.displacement(x, t, references)
    field = backend.field(x, 1.0, references)
    assert v.shape == x.shape
    assert log_mass.shape == (0,)
    assert field.shape == (0, math.prod(event) + 1)
    (v.sum() + log_mass.sum() + field.sum()).backward()
    assert x.grad.shape == x.shape
    assert t.grad.shape == (0,)
    if kind == "tensor":
        assert torch.equal(references.grad, torch.zeros_like(x0))


def test_autocast_is_off_inside(backend):
    x, x0 = (torch.randn(n, 40, generator=seeded()) for n in (5, 70))
    x = x.requires_grad_()
    with torch.autocast(backend.device.type, torch.bfloat16):
        v, log_mass = backend.displacement(x, 20.0, x0)
    assert v.dtype == torch.float32
    truth = solve(x, 20.0, x0)
    assert truth.effective_sample_size.max() > 2
    assert_displacement(v.detach(), truth, float32_contract(backend.name))
    with torch.autocast(backend.device.type, torch.bfloat16):
        (dx,) = torch.autograd.grad(v.sum() + log_mass.sum(), x)
    g_v, g_m = torch.ones_like(v), torch.ones_like(log_mass)
    assert_gradients(differentiate(truth, x, x0, g_v, g_m), dx)
