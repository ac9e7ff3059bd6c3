# SPDX-License-Identifier: Apache-2.0
"""Does a value that is not finite make its own row NaN and no other, and raise where it can?"""

from __future__ import annotations

import math

import pytest
import torch
from cases import seeded

from pfgm_kernels import ReferenceSet, poisson_displacement

SHAPES = [(1, 600), (3, 600), (20, 300), (40, 70), (100, 33)]  # (d, N)
VALUES = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize(("d", "count"), [*SHAPES, (2, 1), (40, 1)])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("D", [1, math.inf])
@pytest.mark.parametrize("where", ["x", "t"])
def test_in_a_query(backend, d, count, value, D, where):
    generator = seeded(d)
    x0 = torch.randn(count, d, generator=generator)
    x, t = torch.randn(9, d, generator=generator), torch.linspace(1, 5, 9)
    clean_v, clean_mass = backend.displacement(x, t, x0, D=D)
    clean_field = backend.field(x, t, x0, D=D)
    for row in (0, 5):
        if where == "x":
            x[row, d // 2] = value
        else:
            t[row] = value
    bad = torch.zeros(9, dtype=torch.bool)
    bad[[0, 5]] = True

    x, t = x.requires_grad_(), t.requires_grad_()
    v, log_mass = backend.displacement(x, t, x0, D=D)
    field = backend.field(x, t, x0, D=D)
    assert v[bad].isnan().all()
    assert log_mass[bad].isnan().all()
    assert field[bad].isnan().all()
    assert torch.equal(v[~bad], clean_v[~bad])
    assert torch.equal(log_mass[~bad], clean_mass[~bad])
    assert torch.equal(field[~bad], clean_field[~bad])
    dx, dt = torch.autograd.grad(v.sum() + log_mass.sum(), [x, t])
    assert dx[~bad].isfinite().all()
    assert dt[~bad].isfinite().all()


@pytest.mark.parametrize(("d", "count"), [*SHAPES, (40, 300), (300, 300)])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("where", ["first", "second", "middle", "last"])
def test_in_a_plain_x0(backend, d, count, value, where):
    """No row may pass over it: neither as too far to matter nor by min and max."""
    generator = seeded(d)
    x0, x = (torch.randn(n, d, generator=generator) for n in (count, 5))
    row = {"first": 0, "second": 1, "middle": count // 2, "last": count - 1}[where]
    x0[row, d // 2] = value
    for t in (1e-3, 100.0):
        for D in (1, math.inf):
            v, log_mass = backend.displacement(x, t, x0, D=D)
            assert v.isnan().any(1).all()
            assert log_mass.isnan().all()
            assert backend.field(x, t, x0, D=D).isnan().all()


@pytest.mark.parametrize("d", [3, 40])
def test_a_nan_with_all_bits_set(backend, d):
    x0 = torch.randn(70, d, dtype=torch.float64, generator=seeded(d))
    x = torch.randn(5, d, dtype=torch.float64, generator=seeded(1))
    x0[20, 1] = torch.full((), -1, dtype=torch.int64).view(torch.float64)
    v, log_mass = backend.displacement(x, 1.0, x0)
    assert v.isnan().any(1).all()
    assert log_mass.isnan().all()


def test_across_chunks(backend):
    x0 = torch.randn(6000, 24, generator=seeded())
    references = ReferenceSet(x0.clone(), workspace=1 << 20)
    x = torch.randn(4, 24, generator=seeded())
    clean, _ = backend.displacement(x, 2.0, references)
    x[2, 3] = math.nan
    v, log_mass = backend.displacement(x, 2.0, references)
    assert v[2].isnan().all()
    assert log_mass[2].isnan()
    assert torch.equal(v[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_reference_set_refuses_it(value, dtype):
    x0 = torch.zeros(7, 2, 3, dtype=dtype)
    x0[6, 1, 2] = value
    with pytest.raises(ValueError, match="finite"):
        ReferenceSet(x0)


@pytest.mark.parametrize("argument", ["t", "D"])
def test_a_scalar_nan_is_refused(argument):
    arguments = {"t": 1.0, "D": 1.0} | {argument: math.nan}
    with pytest.raises(ValueError, match=f"{argument} expects"):
        poisson_displacement(torch.ones(2, 3), arguments["t"], torch.ones(4, 3), D=arguments["D"])


@pytest.mark.parametrize("value", [-1e300, 1e300])
def test_an_overflow_is_nan_not_a_small_weight(backend, value):
    """‖x − x0‖² beyond float64 cannot be weighed."""
    x0 = torch.zeros(20, 2, dtype=torch.float64)
    x0[:, 0] = torch.linspace(0, 1, 20, dtype=torch.float64)
    x = torch.tensor([[value, 0.0], [0.5, 0.0]], dtype=torch.float64)
    v, log_mass = backend.displacement(x, 1.0, x0)
    assert v[0].isnan().all()
    assert log_mass[0].isnan()
    assert v[1].isfinite().all()
    assert log_mass[1].isfinite()
