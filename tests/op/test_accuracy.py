# SPDX-License-Identifier: Apache-2.0
"""Do values meet the accuracy contract on every named hard case?"""

from __future__ import annotations

import math
from decimal import MIN_EMIN, Decimal, localcontext

import pytest
import torch
from cases import CASES, build, truth
from oracle import (
    FLOAT64,
    assert_displacement,
    assert_field,
    assert_log_mass,
    float32_contract,
    solve,
)


@pytest.mark.parametrize("name", CASES)
def test_the_case_is_what_it_claims(name):
    assert truth(name).v.isfinite().all()
    if build(name).dense:
        assert truth(name).effective_sample_size.max() > 2


@pytest.mark.parametrize("name", CASES)
def test_float32(backend, name):
    case, expected = build(name), truth(name)
    tolerance = float32_contract(backend.name, case.named)
    v, log_mass = backend.displacement(case.x, case.t, case.x0, D=case.D)
    assert v.dtype == torch.float32
    assert_displacement(v, expected, tolerance)
    assert_log_mass(log_mass, expected)
    if not backend.interpreted:  # where the same pass again takes seconds
        assert_field(backend.field(case.x, case.t, case.x0, D=case.D), expected, tolerance)


@pytest.mark.parametrize("name", CASES)
def test_float64(backend, name):
    case, expected = build(name), truth(name)
    x, x0 = case.x.double(), case.x0.double()
    v, log_mass = backend.displacement(x, case.t, x0, D=case.D)
    assert v.dtype == torch.float64
    assert_displacement(v, expected, FLOAT64)
    assert_log_mass(log_mass, expected)
    assert_field(backend.field(x, case.t, x0, D=case.D), expected, FLOAT64)


@pytest.mark.parametrize(("gamma", "scale"), [(5.0, math.sqrt(64)), (0.0, -2.0), (1e-3, 1.0)])
def test_gamma_and_scale(backend, gamma, scale):
    case, expected = build("normal d=64"), truth("normal d=64")
    x, x0 = case.x.double(), case.x0.double()
    field = backend.field(x, case.t, x0, gamma=gamma, scale=scale)
    assert_field(field, expected, FLOAT64, gamma, scale)


@pytest.mark.parametrize("D", [0, 1, 2.5, math.inf])
def test_a_single_source_has_a_closed_form(backend, D):
    x, x0 = torch.tensor([[3.0, 0.0], [0.0, -4.0]]), torch.zeros(1, 2)
    v, log_mass = backend.displacement(x, 4.0, x0, D=D)
    assert torch.equal(v, -x)
    k, s = 2 + D, torch.tensor([25.0, 32.0], dtype=torch.float64)
    expected = -(s - 16) / 32 if math.isinf(D) else -k / 2 * s.log()
    torch.testing.assert_close(log_mass, expected, rtol=1e-14, atol=1e-14)
    field = backend.field(x, 4.0, x0, D=D)
    expected = torch.tensor([[-0.6, 0, -0.8], [0, math.sqrt(0.5), -math.sqrt(0.5)]])
    torch.testing.assert_close(field, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_two_equal_sources_have_a_closed_form(backend, dtype, tolerance):
    # x is equally far from both: v is the mean difference, log_mass that of one plus ln 2.
    x0 = torch.tensor([[1.0, 2.0], [1.0, -2.0]], dtype=dtype)
    v, log_mass = backend.displacement(torch.zeros(1, 2, dtype=dtype), 3.0, x0)
    torch.testing.assert_close(v, torch.tensor([[1.0, 0.0]], dtype=dtype))
    assert log_mass.item() == pytest.approx(-1.5 * math.log(14) + math.log(2), abs=tolerance)


@pytest.mark.parametrize("D", [0.0, 1.0, 1e6, math.inf])
def test_the_oracle_agrees_with_fifty_digits(D):
    generator = torch.Generator().manual_seed(3)
    x0 = 10 + torch.randn(6, 3, generator=generator)
    x = x0[:2] + 0.1 * torch.randn(2, 3, generator=generator)
    t = 0.5 * math.sqrt(D) if D == 1e6 else 0.5
    expected = solve(x, t, x0, D)
    with localcontext() as context:
        context.prec, context.Emin = 50, MIN_EMIN
        rows = [[Decimal(c) for c in row] for row in x0.tolist()]
        for b, query in enumerate(x.tolist()):
            differences = [
                [c - Decimal(q) for c, q in zip(row, query, strict=True)] for row in rows
            ]
            squares = [sum(c * c for c in row) for row in differences]
            t2 = Decimal(t) ** 2
            if math.isinf(D):
                masses = [(-s / (2 * t2)).exp() for s in squares]
            else:
                masses = [(-Decimal(3 + D) / 2 * (s + t2).ln()).exp() for s in squares]
            total = sum(masses)
            assert expected.log_mass[b].item() == pytest.approx(float(total.ln()), rel=1e-14)
            for c in range(3):
                v = sum(m * row[c] for m, row in zip(masses, differences, strict=True)) / total
                assert expected.v[b, c].item() == pytest.approx(float(v), rel=1e-12)
