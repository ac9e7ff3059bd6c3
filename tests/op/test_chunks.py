# SPDX-License-Identifier: Apache-2.0
"""Does each chunk of references get its own operands, and is autocast off while it is computed?"""

from __future__ import annotations

import math

import pytest
import torch
from cases import seeded
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
from pfgm_kernels.backends import BACKENDS, cpu, eager
from pfgm_kernels.rows import begin

CHUNK = 7  # references


@pytest.fixture
def watched(monkeypatch) -> list[str]:
    """`eager` in small chunks, with operands that have to be its values' sums; what was called."""
    called: list[str] = []
    real = {name: getattr(eager, name) for name in ("forward", "backward", "jvp")}

    def prepare(values: Tensor, *_: object) -> list[Tensor]:
        called.append("prepare")
        return [values.sum(1)]

    def compute(name: str):
        first = 2 if name == "forward" else 1  # x and t, or rows of queries

        def run(*arguments):
            called.append(name)
            assert not torch.is_autocast_enabled("cpu")
            values, table, operands = arguments[first : first + 3]
            assert torch.equal(operands[0], values.sum(1))
            return real[name](*arguments[:first], values, table, [], *arguments[first + 3 :])

        return run

    monkeypatch.setattr(eager, "prepare", prepare)
    monkeypatch.setattr(eager, "operands_of", lambda operands, cut: [operands[0][cut]])
    for name in real:
        monkeypatch.setattr(eager, name, compute(name))
    return called


@pytest.mark.parametrize("kind", ["tensor", "set"])
@pytest.mark.parametrize("chunk", [CHUNK, 1000])
def test_operands_are_those_of_the_chunk(watched, kind, chunk, monkeypatch):
    """Prepared for each chunk of a tensor, and kept while that is the same; cut from a set's."""
    monkeypatch.setattr(eager, "chunk_shape", lambda *_: (3, chunk))
    x0 = torch.randn(5 * CHUNK + 2, 4, dtype=torch.float64, generator=seeded())
    x = torch.randn(8, 4, dtype=torch.float64, generator=seeded(1)).requires_grad_()
    t = torch.linspace(0.5, 3, 8, dtype=torch.float64)
    references = ReferenceSet(x0, backend="eager") if kind == "set" else x0
    with torch.autocast("cpu", torch.bfloat16):
        v, log_mass = poisson_displacement(x, t, references, backend="eager")
        g_v, g_m = torch.ones_like(v), torch.ones_like(log_mass)
        (dx,) = torch.autograd.grad([v, log_mass], x, [g_v, g_m])
    assert_displacement(v.detach(), solve(x, t, x0), 1e-12)
    assert_gradients(differentiate(solve(x, t, x0), x, x0, g_v, g_m), dx)
    chunks = 3 * (6 if chunk == CHUNK else 1)
    assert watched.count("forward") == watched.count("backward") == chunks
    if kind == "set" or chunk > CHUNK:  # once for the set, or for each pass
        assert watched.count("prepare") == (1 if kind == "set" else 2)


def test_autocast_is_off_in_forward_mode(watched):
    x, x0 = torch.ones(2, 3), torch.randn(9, 3, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        torch.func.jvp(lambda x: poisson_displacement(x, 1.0, x0, backend="eager"), (x,), (x,))
    assert "jvp" in watched


def test_what_the_cpu_has_of_each_reference_is_cut():
    """Its kernels would notice codes of other references, and compute in float64."""
    x0 = torch.randint(256, (50, 40), generator=seeded()) / 127.5 - 1
    norms, grid, codes = cpu.prepare(x0, x0.new_empty(0), x0.nbytes)
    cut = cpu.operands_of([norms, grid, codes], slice(20, 27))
    for found, expected in zip(cut, (norms[20:27], grid, codes[20:27]), strict=True):
        assert torch.equal(found, expected)


def test_cotangents_are_contiguous_for_the_backend_that_begins(monkeypatch):
    """Kernels read them by their address."""
    seen = []

    def watch(rows, output, g, g_m):
        seen.extend([g, g_m])
        return begin(rows, output, g, g_m)

    monkeypatch.setattr(eager, "begin", watch, raising=False)
    x = torch.randn(8, 4, generator=seeded(), requires_grad=True)
    v, log_mass = poisson_displacement(x, 1.0, torch.randn(9, 4), backend="eager")
    g_v, g_m = torch.ones(1, 4).expand(8, 4), torch.ones((), dtype=torch.float64).expand(8)
    torch.autograd.grad([v, log_mass], x, [g_v, g_m])
    assert [each.is_contiguous() for each in seen] == [True, True]


def test_codes_are_cut_with_the_references(backend):
    """Floats that turn out to be 8-bit images, in a workspace that holds a part of them."""
    codes = torch.randint(256, (2100, 40), generator=seeded())
    x0 = (2 * codes.double() / 255 - 1).float()
    x = x0[::300] + 0.3 * torch.randn(7, 40, generator=seeded(1))
    t = torch.linspace(0.2, 3, 7) * 40**0.75
    truth = solve(x, t, x0)
    assert truth.effective_sample_size.max() > 2
    stored = ReferenceSet(x0.to(backend.device), workspace=1 << 20)
    if backend.name == "cpu":
        assert stored.nbytes > x0.nbytes + codes.numel()  # it holds the codes
    x = x.requires_grad_()
    v, log_mass = backend.displacement(x, t, stored)
    assert_displacement(v.detach(), truth, float32_contract(backend.name))
    g_v, g_m = torch.ones_like(v), torch.ones_like(log_mass)
    gradient = torch.autograd.grad([v, log_mass], x, [g_v, g_m])
    assert_gradients(differentiate(truth, x, x0, g_v, g_m), *gradient)


def test_weights_are_cut_as_those_of_all_references(backend, monkeypatch):
    """Of 16 chunks each has references with e^−16.1 of all weight together, 60 times as far as the
    nearest: what a chunk might leave out for itself, all must not for the gradients.
    """
    chunks, count, d = 16, 8, 40
    monkeypatch.setattr(BACKENDS[backend.name], "chunk_shape", lambda *_: (1, count))
    x = torch.zeros(1, d, requires_grad=True)
    x0 = 0.01 * torch.randn(chunks * count, d, generator=seeded())
    x0[:, 0] += (2 * (16.1 + math.log(count))) ** 0.5
    x0[0] = 0.1 * d**-0.5
    truth = solve(x, 1.0, x0, math.inf)
    v, log_mass = backend.displacement(x, 1.0, x0, D=math.inf)
    assert_displacement(v.detach(), truth, float32_contract(backend.name))
    assert_log_mass(log_mass.detach(), truth)
    g_v, g_m = torch.zeros_like(v), torch.ones_like(log_mass)
    (dx,) = torch.autograd.grad([v, log_mass], x, [g_v, g_m])
    assert_gradients(differentiate(truth, x, x0, g_v, g_m, math.inf), dx)
