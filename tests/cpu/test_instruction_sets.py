# SPDX-License-Identifier: Apache-2.0
"""Do the CPU kernels meet the contract with every instruction set that this processor has?"""

from __future__ import annotations

import pytest
import torch
from cases import build, seeded, truth
from images import decode, eq_11_queries, synthetic_images
from oracle import (
    FLOAT64,
    assert_displacement,
    assert_gradients,
    assert_log_mass,
    differentiate,
    float32_contract,
    solve,
)

from pfgm_kernels import ReferenceSet, poisson_displacement

_C = pytest.importorskip("pfgm_kernels._C", reason="the extension is not built")

NAMES = [
    "normal d=1",
    "normal d=3",
    "normal d=17",
    "normal d=65",
    "normal d=784",
    "N=1 B=1 d=3",
    "N=513 d=2",
    "N=257 d=20",
    "N=7 d=64",
    "N=17 d=3072",
    "B=33 d=40",
    "D=0 d=3",
    "D=2.5 d=784",
    "D=1e+06 d=64",
    "D=inf d=64",
    "t=1e-3 d=2 offset=1000",
    "all t d=16",
    "near-duplicates d=64 distance=1e-05",
    "on data points d=3",
    "crowds d=300",
    "a cluster d=300",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_named_cases(instruction_set, name, dtype):
    case, expected = build(name), truth(name)
    x, t, x0 = (a.to(dtype, copy=True).requires_grad_() for a in (case.x, case.t, case.x0))
    v, log_mass = poisson_displacement(x, t, x0, D=case.D, backend="cpu")
    tolerance = FLOAT64 if dtype == torch.float64 else float32_contract("cpu")
    assert_displacement(v.detach(), expected, tolerance)
    assert_log_mass(log_mass.detach(), expected)
    g_v = torch.randn(case.x.shape, generator=seeded()).to(dtype)
    g_m = torch.randn(len(case.x), dtype=torch.float64, generator=seeded())
    gradients = torch.autograd.grad([v, log_mass], [x, t, x0], [g_v, g_m])
    assert_gradients(differentiate(expected, x, x0, g_v, g_m, case.D), *gradients)


@pytest.mark.parametrize("m", [200, 225, 260])
def test_8_bit_images(instruction_set, m):
    images = synthetic_images()
    x, t = eq_11_queries(decode(images[5:9]), m, seed=m)
    expected = solve(x, t, decode(images))
    v, log_mass = poisson_displacement(x, t, ReferenceSet.from_images(images), backend="cpu")
    assert_displacement(v, expected, float32_contract("cpu"))
    assert_log_mass(log_mass, expected)


@pytest.mark.parametrize("d", [2, 40])
def test_not_finite(instruction_set, d):
    x, x0 = (torch.randn(n, d, generator=seeded()) for n in (5, 600))
    x[2, 1] = torch.nan
    x0[3] = x[4]
    v, log_mass = poisson_displacement(x, 0.0, x0, backend="cpu")
    assert v[2].isnan().all()
    assert log_mass[2].isnan()
    assert log_mass[4].item() == torch.inf
    assert not v[4].any()
    assert v[[0, 1, 3]].isfinite().all()


def test_an_unknown_instruction_set_is_refused():
    before = _C.build_info()["instruction set"]
    with pytest.raises(ValueError, match="no instruction set mmx"):
        _C.use_instruction_set("mmx")
    assert _C.build_info()["instruction set"] == before
