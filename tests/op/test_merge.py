# SPDX-License-Identifier: Apache-2.0
"""Do partial results combine into the whole: chunks, shards, threads, orders?"""

from __future__ import annotations

import math

import pytest
import torch
from cases import build, seeded, truth
from oracle import (
    FLOAT64,
    assert_displacement,
    assert_gradients,
    assert_log_mass,
    differentiate,
    solve,
)

from pfgm_kernels import ReferenceSet, merge
from pfgm_kernels.backends import BACKENDS, _native, cpu
from pfgm_kernels.chunks import Chunks, Inputs

NAMES = ["normal d=2", "normal d=17", "normal d=64", "normal d=784", "D=inf d=64", "D=2.5 d=3"]
MIB = 1 << 20


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [(1, 100, 3), (50, 51)])
def test_shards(backend, name, sizes):
    case = build(name)
    x, x0 = case.x.double(), case.x0.double()
    shards = x0.split([*sizes, len(x0) - sum(sizes)])
    parts = [backend.displacement(x, case.t, shard, D=case.D) for shard in shards]
    v, log_mass = merge(parts)
    assert v.dtype == log_mass.dtype == torch.float64
    assert_displacement(v, truth(name), FLOAT64)
    assert_log_mass(log_mass, truth(name))
    nested = merge([merge(parts[:2]), *parts[2:]])
    torch.testing.assert_close(nested, (v, log_mass), rtol=1e-12, atol=1e-12)


def test_a_shard_far_away_weighs_nothing(backend):
    x0 = torch.randn(100, 40, generator=seeded())
    x = x0[:5] + 0.1
    near, far = backend.displacement(x, 1.0, x0), backend.displacement(x, 1.0, x0 + 1e6)
    v, log_mass = merge([far, near])
    assert torch.equal(v, near[0])
    assert torch.equal(log_mass, near[1])


def test_merge_keeps_dtype_shape_and_gradient(backend):
    x0 = torch.randn(60, 2, 3, generator=seeded())
    x = (x0[:4] + 0.3).requires_grad_()
    parts = [backend.displacement(x, 2.0, part) for part in x0.split(25)]
    v, log_mass = merge(parts)
    assert v.shape == x.shape
    assert v.dtype == torch.float32
    g_v, g_m = torch.ones_like(v), torch.ones_like(log_mass)
    gradient = torch.autograd.grad([v, log_mass], x, [g_v, g_m])
    expected = differentiate(solve(x, 2.0, x0), x, x0, g_v, g_m)
    assert_gradients(expected, *gradient)
    assert merge([(v.double(), log_mass), (v, log_mass)])[0].dtype == torch.float64


def test_merge_of_infinite_and_nan_masses():
    ones = torch.ones(3, 2)
    masses = [torch.tensor([math.nan, -math.inf, -math.inf]), torch.tensor([1.0, 2.0, -math.inf])]
    v, log_mass = merge([(ones, masses[0]), (3 * ones, masses[1])])
    assert log_mass.dtype == torch.float64  # whatever the dtype of the parts
    assert v[0].isnan().all()
    assert log_mass[0].isnan()
    assert torch.equal(v[1:], torch.tensor([[3.0, 3.0], [2.0, 2.0]]))
    assert log_mass[1].item() == 2
    assert log_mass[2].item() == -math.inf


@pytest.mark.parametrize(
    ("d", "count", "batch", "D"),
    [(24, 3001, 9, 1), (24, 3001, 9, math.inf), (784, 150, 30, 1), (3072, 60, 13, 2.5)],
)
@pytest.mark.parametrize("references", ["set", "tensor"])
def test_a_small_workspace(backend, monkeypatch, d, count, batch, D, references):
    """Many chunks, of references and, at large d, of queries, give what one chunk gives."""
    generator = seeded(d)
    x0 = torch.randn(count, d, dtype=torch.float64, generator=generator)
    x = torch.randn(batch, d, dtype=torch.float64, generator=generator)
    t = torch.linspace(1, 3, batch, dtype=torch.float64)
    t = (t * (d**0.25 if math.isinf(D) else d**0.75)).requires_grad_()
    x, g_v = x.requires_grad_(), torch.randn(batch, d, generator=generator).double()
    g_m = torch.randn(batch, dtype=torch.float64, generator=generator)
    expected = solve(x, t, x0, D)
    assert expected.effective_sample_size.max() > 2
    monkeypatch.setattr("pfgm_kernels.chunks.SLACK", 0)
    inputs = Inputs(x, t, x0, x0.new_empty(0), [], d + D)
    chunks = Chunks(inputs, MIB, BACKENDS["eager"])
    assert len(chunks.parts[0][1]) > 3
    assert len(chunks.parts) > 3 or d < 100

    monkeypatch.setattr("pfgm_kernels.field.default_workspace", lambda device: MIB)
    inputs = [x, t]
    if references == "set":
        stored = ReferenceSet(x0, workspace=MIB)
    else:
        stored = x0.clone().requires_grad_()
        inputs.append(stored)
    v, log_mass = backend.displacement(x, t, stored, D=D)
    assert_displacement(v.detach(), expected, FLOAT64)
    assert_log_mass(log_mass.detach(), expected)
    gradients = torch.autograd.grad([v, log_mass], inputs, [g_v, g_m])
    assert_gradients(differentiate(expected, x, x0, g_v, g_m, D), *gradients)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_references(backend, name):
    case = build(name)
    x, t, x0 = case.x.double().requires_grad_(), case.t, case.x0.double()
    order = torch.randperm(len(x0), generator=seeded())
    g_v, g_m = torch.ones_like(x), torch.ones(len(x), dtype=torch.float64)
    shuffled = x0[order].requires_grad_()
    v, log_mass = backend.displacement(x, t, shuffled, D=case.D)
    assert_displacement(v.detach(), truth(name), FLOAT64)
    dx, dx0 = torch.autograd.grad([v, log_mass], [x, shuffled], [g_v, g_m])
    expected = differentiate(truth(name), x, x0, g_v, g_m, case.D)
    assert_gradients(expected, dx=dx, dx0=dx0[order.argsort()])


def test_threads_are_worth_waking_up(monkeypatch):
    launched = []
    monkeypatch.setattr(cpu, "WORK_PER_THREAD", 1 << 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(_native, "launch", lambda entry, **p: launched.append(p["num_threads"]))
    for batch, count, d in [(1, 10, 2), (64, 1024, 2), (512, 1024, 2), (512, 8192, 64)]:
        x, t, x0 = torch.ones(batch, d), torch.ones(batch).double(), torch.ones(count, d)
        cpu.forward(x, t, x0, torch.empty(0), [], 3.0)
    assert launched == [1, 1, 3, 3]


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize(("d", "count"), [(2, 2000), (2, 5), (20, 600), (100, 150), (3072, 40)])
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_the_number_of_threads(backend, threads, d, count, batch):
    """Few queries: threads share out the references and their parts are combined."""
    generator = seeded(d)
    x0 = torch.randn(count, d, dtype=torch.float64, generator=generator)
    x = torch.randn(batch, d, dtype=torch.float64, generator=generator).requires_grad_()
    t = d**0.75 * (0.5 + torch.rand(batch, dtype=torch.float64, generator=generator))
    expected = solve(x, t, x0)
    assert expected.effective_sample_size.max() > 2
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        v, log_mass = backend.displacement(x, t, x0)
        g_v, g_m = torch.ones_like(v), torch.ones_like(log_mass)
        (dx,) = torch.autograd.grad([v, log_mass], [x], [g_v, g_m])
    finally:
        torch.set_num_threads(before)
    assert_displacement(v.detach(), expected, FLOAT64)
    assert_log_mass(log_mass.detach(), expected)
    assert_gradients(differentiate(expected, x, x0, g_v, g_m), dx)
