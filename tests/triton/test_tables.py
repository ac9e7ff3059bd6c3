# SPDX-License-Identifier: Apache-2.0
"""Are results right with the block sizes of each kind of chip, and with its multiprocessors?

Interpreted, kernels run with sizes of their own elsewhere: the larger the fewer programs. Here each
has a few tiles of the table's, and so many multiprocessors that sums are split.
"""

from __future__ import annotations

import pytest
import torch
from oracle import (
    assert_displacement,
    assert_gradients,
    assert_log_mass,
    differentiate,
    float32_contract,
    solve,
)
from torch import Tensor

from pfgm_kernels import ReferenceSet, poisson_displacement
from pfgm_kernels.backends import triton as backend

REASON = backend.unsupported_reason(torch.device("cpu"))
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.usefixtures("poison"),
]
SPLITS = 3

# d, B, N, codes: for direct differences, for one pass of one slice of columns and of two, for two
# passes. There are three tiles of the largest blocks of references, the last cut short.
SHAPES = [
    (3, 40, 40, False),
    (20, 40, 40, False),
    (60, 40, 330, True),
    (100, 40, 330, False),
    pytest.param(200, 130, 270, True, marks=pytest.mark.exhaustive),
    (300, 20, 330, False),
]


def kinds() -> list[object]:
    """Those with a table of their own, a Hopper alone where time is short."""
    if REASON is not None:
        return []
    from pfgm_kernels.backends.triton.configurations import TABLE

    others = {str(table): kind for kind, table in TABLE.items() if kind != "interpreter"}.values()
    marked = [pytest.param(k, marks=pytest.mark.exhaustive) for k in others if k != "hopper"]
    return ["hopper", *marked]


@pytest.fixture
def launched(monkeypatch) -> dict[str, tuple[tuple[int, ...], dict]]:
    """Grid and options of the last launch of each kernel."""
    from pfgm_kernels.backends.triton import launch

    real, found = launch.Kernel.launch, {}

    def watch(self, grid, *arguments, **options):
        found[self.name] = grid, options
        real(self, grid, *arguments, **options)

    monkeypatch.setattr(launch.Kernel, "launch", watch)
    return found


@pytest.fixture(params=kinds())
def kind(request: pytest.FixtureRequest, monkeypatch) -> str:
    from pfgm_kernels.backends.triton import call, configurations, fused

    monkeypatch.setattr(configurations, "kind", lambda _: request.param)
    monkeypatch.setattr(fused, "multiprocessors", lambda _: 6)
    monkeypatch.setattr(call, "multiprocessors", lambda _: 0)  # as many programs as keep it busy
    return request.param


def problem(d: int, B: int, N: int, codes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and values, of which many share the weight of a query."""
    generator = torch.Generator().manual_seed(d)
    x = torch.randn(B, d, generator=generator)
    values = torch.randn(N, d, generator=generator)
    if codes:
        values = (127.5 + 60 * values).round().clamp(0, 255).byte()
        x *= 120 / 255
    t = torch.linspace(1, 2, B) * (0.5 if codes else 1) * ((d + 1) * (2 * d) ** 0.5) ** 0.5
    return x, t, values


@pytest.mark.parametrize(("d", "B", "N", "codes"), SHAPES)
def test_values_and_gradients(kind, launched, d, B, N, codes):
    from pfgm_kernels.backends.triton import configurations

    x, t, values = problem(d, B, N, codes)
    make = ReferenceSet.from_images if codes else ReferenceSet
    references = make(values, backend="triton")
    x0 = references.table[values.long()] if codes else values
    truth = solve(x, t, x0)
    assert truth.effective_sample_size.median() > 2
    x, t = x.requires_grad_(), t.requires_grad_()
    v, log_mass = poisson_displacement(x, t, references, backend="triton")
    assert_displacement(v.detach(), truth, float32_contract("triton", named=d <= 16))
    assert_log_mass(log_mass.detach(), truth)
    g_v, g_m = torch.ones_like(v), torch.ones_like(log_mass)
    gradients = torch.autograd.grad([v, log_mass], [x, t], [g_v, g_m])
    assert_gradients(differentiate(truth, x, x0, g_v, g_m), *gradients)

    table = configurations.TABLE[kind]
    if d > 32:
        grid, options = launched["sum_kernel"]
        assert grid[2] >= SPLITS
        assert options.items() >= table["sum"].items()
        assert launched["compare_kernel"][1].items() >= table["compare"].items()
        assert launched["distances_kernel"][1]["TILES"] > 1
    if 32 < d <= 128:
        grid, options = launched["fused_kernel"]
        assert grid[1] >= SPLITS
        assert options.items() >= table[f"fused {64 if d <= 64 else 128}"].items()
