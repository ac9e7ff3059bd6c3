# SPDX-License-Identifier: Apache-2.0
"""Does a sketch of the references lose none that carries weight?"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import seeded
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    assert_displacement,
    assert_gradients,
    assert_log_mass,
    differentiate,
    solve,
)
from torch import Tensor

from pfgm_kernels import ReferenceSet, poisson_displacement, references
from pfgm_kernels.backends import _sketch, cpu

pytestmark = pytest.mark.skipif(cpu.unsupported_reason() is not None, reason="no CPU kernels")
COUNT, DIM = 2100, 300


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sketches of few columns, whatever the references."""
    for name, value in (("LEAST_DIM", 1), ("LEAST_COUNT", 1), ("LEAST_SHARE", -1.0)):
        monkeypatch.setattr(_sketch, name, value)
    monkeypatch.setattr(_sketch, "COLUMNS", (8, 36))


def sketched(made: ReferenceSet, reach: float = math.inf) -> ReferenceSet:
    """Its calls use sketches, for queries that are not far."""
    made._sketch("cpu")
    found = cpu._sketches(made.operands["cpu"])
    assert len(found) == 2
    for each in found:
        each.scale[2] = min(reach, 1e300)
    return made


def near_a_plane(spread: float, generator: torch.Generator) -> Tensor:
    """References in twenty dimensions, more or less."""
    plane = torch.randn(20, DIM, generator=generator) * torch.logspace(0, -1, 20)[:, None]
    points = torch.randn(COUNT, 20, generator=generator) @ plane
    return points + spread * torch.randn(COUNT, DIM, generator=generator)


def hard(name: str) -> Tensor:
    generator = seeded(1)
    x0 = near_a_plane(0.02, generator)
    if name == "white":
        x0 = torch.randn(COUNT, DIM, generator=generator)
    elif name == "duplicates":
        x0 = x0[torch.arange(COUNT) // 7]
    elif name == "outlier":
        x0[5] *= 1e4
    elif name == "constant":
        x0 = torch.linspace(-1, 1, COUNT)[:, None].expand(COUNT, DIM).contiguous()
    elif name == "offset":
        x0 += 100
    elif name == "grid":
        x0 = ((x0.clamp(-2, 2) + 2) * 63.75).round() / 127.5 - 1
    elif name == "few values":
        x0 = x0.sign()
    return x0


def queries(x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """From on the references to far from all."""
    scale = torch.logspace(-4, 2, 40) * x0.std()
    x = x0[torch.randint(len(x0), (40,), generator=generator)]
    x = x + scale[:, None] * torch.randn(x.shape, generator=generator) / math.sqrt(x.shape[1])
    return x, scale * torch.rand(40, generator=generator) + 1e-6


NAMES = ("plane", "white", "duplicates", "outlier", "constant", "offset", "grid", "few values")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
def test_hard_references(name, D):
    x0 = hard(name)
    x, t = queries(x0, seeded(2))
    x, t = x.requires_grad_(), t.requires_grad_()
    made = sketched(ReferenceSet(x0, backend="cpu"))
    v, log_mass = poisson_displacement(x, t, made, D=D)
    expected = solve(x.detach(), t.detach(), x0, D)
    assert_displacement(v.detach(), expected, 1e-6)
    assert_log_mass(log_mass.detach(), expected)
    g_v = torch.randn(x.shape, generator=seeded(3))
    g_m = torch.randn(len(x), dtype=torch.float64, generator=seeded(4))
    dx, dt = torch.autograd.grad([v, log_mass], [x, t], [g_v, g_m])
    assert_gradients(differentiate(expected, x.detach(), x0, g_v, g_m, D), dx, dt)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_queries_that_are_put_aside(share):
    """Some, all or none are for the first pass from the start."""
    x0 = hard("plane")
    x, t = (torch.cat([each] * 2) for each in queries(x0, seeded(2)))
    far = (x - x0.mean(0)).norm(dim=1).quantile(1 - share).item() if share < 1 else 0.0
    v, log_mass = poisson_displacement(x, t, sketched(ReferenceSet(x0, backend="cpu"), far))
    expected = solve(x, t, x0)
    assert_displacement(v, expected, 1e-6)
    assert_log_mass(log_mass, expected)


def test_one_query_that_all_references_count_for():
    """For one direct differences with some hundred references would be worth it."""
    x0 = hard("plane")
    x, t = x0.mean(0, keepdim=True), torch.full((1,), 100.0)
    v, log_mass = poisson_displacement(x, t, sketched(ReferenceSet(x0, backend="cpu")))
    expected = solve(x, t, x0)
    assert_displacement(v, expected, 1e-6)
    assert_log_mass(log_mass, expected)


def test_images_classes_and_chunks():
    codes = ((hard("plane").clamp(-2, 2) + 2) * 63.75).round().byte()
    exact = (codes.double() / 127.5 - 1).float()
    labels = torch.arange(COUNT) % 2
    x, t = queries(exact, seeded(2))
    wanted = torch.arange(40) % 2
    for workspace in (1 << 20, None):
        made = ReferenceSet.from_images(codes, labels=labels, workspace=workspace, backend="cpu")
        sketched(made)
        v, log_mass = poisson_displacement(x, t, made)
        assert_displacement(v, solve(x, t, exact), 1e-6)
        assert_log_mass(log_mass, solve(x, t, exact))
        v, log_mass = poisson_displacement(x, t, made, labels=wanted)
        for label in range(2):
            here = wanted == label
            expected = solve(x[here], t[here], exact[labels == label])
            assert_displacement(v[here], expected, 1e-6)
            assert_log_mass(log_mass[here], expected)


def test_a_class_that_lies_elsewhere():
    """But for ten references, which must not pass for the only ones that count in the other."""
    labels = torch.arange(COUNT) % 2
    x0 = 0.1 * hard("plane")
    x = x0[1:40:2]
    x0[20::2] += torch.randn(DIM, generator=seeded(3))
    made = sketched(ReferenceSet(x0, labels=labels, backend="cpu"))
    t = torch.full((len(x),), 0.3)
    for label in range(2):
        v, log_mass = poisson_displacement(x, t, made, labels=torch.full((len(x),), label))
        expected = solve(x, t, x0[labels == label])
        assert_displacement(v, expected, 1e-6)
        assert_log_mass(log_mass, expected)


@pytest.mark.exhaustive
@given(st.integers(0, 1 << 30))
def test_any_basis_is_correct(seed):
    """The bound on what a basis leaves, for bases that have nothing to do with the data."""
    random = np.random.default_rng(seed)
    d, count = int(random.integers(260, 400)), int(random.integers(70, 400))
    generator = seeded(seed)
    columns = [2 * int(q) for q in sorted(random.integers(1, 30, 2))]
    x0 = torch.randn(count, d, generator=generator) * torch.logspace(0, -random.uniform(0, 4), d)
    x0 *= 2 * torch.rand(count, 1, generator=generator)
    side = 1 - torch.arange(count)[:, None] % 2 * 2  # of two clusters, that may be far apart
    x0 += random.choice([0.0, 100.0, 3000.0]) * side * torch.randn(d, generator=generator)
    # Beside references, and half-way between one of large and one of small norm.
    noise = random.choice([0.01, 1.0, 30.0]) * torch.randn(20, d, generator=generator)
    x = torch.cat([x0[:20] + noise, (x0[:20] + x0[20:40]) / 2])
    t = random.choice([1e-3, 1.0, 40.0]) * torch.rand(len(x), generator=generator) + 1e-6
    normal = torch.randn(d, columns[1], dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(normal)[0].T.contiguous()
    made = ReferenceSet(x0, backend="cpu")
    operands = made.operands["cpu"]
    found = _sketch.in_basis(x0, made.table, *operands[:2], basis, columns)
    for each in found:
        each.scale[2] = 1e300
    made.operands = {"cpu": [*operands, *(each for one in found for each in one)]}
    D = random.choice([1.0, 64.0, math.inf])
    v, log_mass = poisson_displacement(x, t, made, D=D)
    expected = solve(x, t, x0, D)
    assert_displacement(v, expected, 1e-6)
    assert_log_mass(log_mass, expected)


def test_it_is_looked_at():
    """A sketch that is wrong for half of the references loses some of them."""
    x0 = hard("plane")
    x, t = queries(x0, seeded(2))
    made = sketched(ReferenceSet(x0, backend="cpu"))
    sound = poisson_displacement(x, t, made)[1]
    for each in cpu._sketches(made.operands["cpu"]):
        each.points[::2].neg_()
        each.rest[::2] = 0
    assert not torch.allclose(poisson_displacement(x, t, made)[1], sound)


def test_only_sets_that_are_used_often_have_one(monkeypatch):
    monkeypatch.setattr(references, "CALLS", 4)
    x0 = hard("plane")
    x, t = queries(x0, seeded(2))
    made = ReferenceSet(x0, backend="cpu")
    before, results = made.nbytes, []
    for calls in range(6):
        assert (made.nbytes > before) == (calls >= 4)
        results.append(poisson_displacement(x, t, made))
    for v, log_mass in results:  # to the bit, as what is near is summed exactly
        assert torch.equal(v, results[0][0])
        assert torch.equal(log_mass, results[0][1])
    monkeypatch.setattr(_sketch, "LEAST_SHARE", 0.3)
    white = ReferenceSet(hard("white"), backend="cpu")
    before = white.nbytes
    for _ in range(6):
        poisson_displacement(x, t, white)
    assert white.nbytes == before


def test_what_a_sketch_holds():
    x0 = hard("plane")
    made = sketched(ReferenceSet(x0, backend="cpu"))
    few, more = cpu._sketches(made.operands["cpu"])
    eye = torch.eye(36, dtype=torch.float64)
    torch.testing.assert_close(more.basis @ more.basis.T, eye, rtol=0, atol=1e-12)
    assert torch.equal(few.basis, more.basis[:8])
    y = x0.double() - made.operands["cpu"][1][4:]
    for points, rest, basis, (unit, lost, _) in (few, more):
        exact = y @ basis.T
        off = (exact - points * unit).norm(dim=1)
        assert off.max() <= lost <= 1.01 * off.max()
        assert lost < 1e-3 * exact.norm(dim=1).max()
        outside = (y - exact @ basis).norm(dim=1)
        assert (rest >= outside).all()
        assert (rest <= outside + 4e-6 * y.norm(dim=1)).all()
    assert outside.mean() < 0.2 * y.norm(dim=1).mean()
    cut = cpu._sketches(cpu.operands_of(made.operands["cpu"], slice(700, 900)))
    for part, whole in zip(cut, (few, more), strict=True):
        assert torch.equal(part.points, whole.points[700:900])
        assert torch.equal(part.rest, whole.rest[700:900])
        assert torch.equal(part.basis, whole.basis)


def test_where_it_pays_is_measured():
    """Noise of the size of what lies between references is too much, a tenth of it is not."""
    x0 = hard("plane")
    made = ReferenceSet(x0, backend="cpu")
    made._sketch("cpu")
    few, _ = cpu._sketches(made.operands["cpu"])
    outside = few.rest.square().mean().sqrt()
    apart = torch.cdist(x0[:200], x0[:200]).add(1e9 * torch.eye(200)).min(1).values.mean()
    assert outside < few.scale[2] < outside + 2 * apart
    assert few.scale[2] > (outside**2 + (0.1 * apart) ** 2).sqrt()
