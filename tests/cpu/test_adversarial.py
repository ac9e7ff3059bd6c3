# SPDX-License-Identifier: Apache-2.0
"""Are the CPU kernels right where a bound, a block's end or a part of the references decides?

Small problems, each made for one decision, on every road: direct differences (d ≤ 24), the fused
kernel (d ≤ 256) and the two passes. On several threads, which share out queries and references.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from cases import seeded
from oracle import (
    Truth,
    assert_displacement,
    assert_gradient_of_x,
    assert_gradients,
    assert_log_mass,
    differentiate,
    float32_contract,
    solve,
)
from torch import Tensor

from pfgm_kernels import ReferenceSet, poisson_displacement

pytest.importorskip("pfgm_kernels._C", reason="the extension is not built")
pytestmark = pytest.mark.usefixtures("poison", "three_threads")

ROADS = [3, 16, 40, 250, 300]


@pytest.fixture
def three_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def check_values(
    x: Tensor,
    t: Tensor,
    x0: Tensor,
    D: float = 1,
    references: Tensor | ReferenceSet | None = None,
) -> tuple[Truth, Tensor, Tensor]:
    """What the contract says of values. Returns the truth, v and the log mass."""
    truth = solve(x.detach(), t.detach(), x0, D)
    references = x0 if references is None else references
    v, log_mass = poisson_displacement(x, t, references, D=D, backend="cpu")
    assert_displacement(v.detach(), truth, float32_contract("cpu"))
    assert_log_mass(log_mass.detach(), truth)
    return truth, v, log_mass


def check(
    x: Tensor,
    t: Tensor,
    x0: Tensor,
    D: float = 1,
    g_v: Tensor | None = None,
    g_m: Tensor | None = None,
    references: Tensor | ReferenceSet | None = None,
) -> None:
    """All that the contract says of values and gradients, for cotangents that are normal if none
    are given.
    """
    g_v = torch.randn(x.shape, generator=seeded()) if g_v is None else g_v
    g_m = torch.randn(len(x), generator=seeded()).double() if g_m is None else g_m
    x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
    truth, v, log_mass = check_values(x, t, x0, D, references)
    dx, dt = torch.autograd.grad([v, log_mass], [x, t], [g_v, g_m])
    expected = differentiate(truth, x, x0, g_v, g_m, D)
    assert_gradients(expected, dx, dt)
    assert_gradient_of_x(expected, dx)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


@pytest.mark.parametrize("d", ROADS)
@pytest.mark.parametrize("D", [1, 40, math.inf])
@pytest.mark.parametrize("count", [600, 1500])
def test_references_that_come_nearer(d, D, count):
    """Each by as much in its logit, so that what was summed so far counts for less and less."""
    total = 30 if math.isinf(D) else min(30, 0.6 * (d + D))
    logits = torch.linspace(total, 0, count).double()
    t = 3.0
    s = 2 * t * t * logits if math.isinf(D) else (1 + t * t) * torch.expm1(2 * logits / (d + D))
    direction = torch.nn.functional.normalize(normal(count, d).double(), dim=1)
    x0 = (1 + s).sqrt()[:, None] * direction
    check(0.01 * normal(2, d, seed=1), torch.full((2,), t), x0.float(), D)


@pytest.mark.parametrize("d", ROADS)
def test_heavy_references_in_every_block(d):
    """24 in each 240, whose logits are two more than in the block before."""
    logits = torch.full((1920,), 30.0).double()
    for block in range(8):
        logits[240 * block : 240 * block + 24] = 16 - 2 * block
    logits = (logits * min(1, (d + 1) / 40)).clamp(max=0.6 * (d + 1))
    t = 3.0
    s = (1 + t * t) * torch.expm1(2 * logits / (d + 1))
    direction = torch.nn.functional.normalize(normal(1920, d).double(), dim=1)
    x0 = ((1 + s).sqrt()[:, None] * direction).float()
    check(0.01 * normal(2, d, seed=1), torch.full((2,), t), x0)


@pytest.mark.parametrize("d", ROADS)
@pytest.mark.parametrize("count", [97, 241, 257, 2000])
@pytest.mark.parametrize("closer", [0.5, 0.9])
def test_the_last_reference_is_the_nearest(d, count, closer):
    """And the only one of its block, or one of a part that the float kernels leave to others."""
    x0 = normal(count, d, seed=count)
    x = 0.3 * normal(1, d, seed=1) + 0.01 * normal(5, d, seed=2)
    x0[-1] = x[0] + (1 - closer) * x0[-1]
    t = torch.tensor([0.05, 0.5, 1, 1.5, 2]) * math.sqrt(d)
    check(x, t, x0)
    check(x, t, x0.flip(0))


@pytest.mark.parametrize("d", ROADS)
@pytest.mark.parametrize("batch", [33, 70])
def test_queries_for_which_other_blocks_count(d, batch):
    """References in the order of their clusters, a block or more each; queries of one cluster are
    a vector, or a tile.
    """
    clusters = normal(4, d)
    x0 = clusters.repeat_interleave(260, 0) + normal(1040, d, seed=1)
    for order in ([3, 2, 1, 0], [2, 3, 0, 1]):
        x = clusters[order].repeat_interleave(16, 0).repeat(2, 1)[:batch]
        x = x + 0.5 * normal(batch, d, seed=2)
        t = torch.full((batch,), math.sqrt(d))
        check(x, t, x0)


@pytest.mark.parametrize("d", ROADS)
@pytest.mark.parametrize("exponent", [-30, -22, -20, -18, -14, 14, 18, 25, 30])
def test_data_of_any_size(d, exponent):
    """Squares and products overflow in float32, or vanish."""
    x, x0 = (normal(n, d, seed=n).double() * 10.0**exponent for n in (5, 100))
    t = 10.0**exponent * d**0.75 * torch.tensor([1e-3, 0.1, 0.5, 1, 3]).double()
    for D in (1, 8, math.inf):
        g_m = normal(5).double() * 10.0**exponent  # so that gradients fit into float32
        check(x.float(), (t / d**0.5 if math.isinf(D) else t).float(), x0.float(), D, g_m=g_m)


@pytest.mark.parametrize("d", ROADS)
@pytest.mark.parametrize("D", [1, 2.5, math.inf])
@pytest.mark.parametrize("row", [0, 1, 599])
def test_a_reference_farther_than_float32_can_square(d, D, row):
    x, x0 = normal(5, d), normal(600, d, seed=1)
    x0[row, 0] = 1e20
    check(x, torch.linspace(0.5, 2, 5) * (d**0.25 if math.isinf(D) else d**0.75), x0, D)


@pytest.mark.parametrize("d", ROADS)
@pytest.mark.parametrize("D", [1, math.inf])
def test_cotangents_of_any_size(d, D):
    """A row of zeros has a gradient of zeros."""
    x, x0 = normal(8, d), normal(300, d, seed=1)
    t = torch.full((8,), d**0.25 if math.isinf(D) else d**0.75)
    sizes = torch.tensor([0, 1, 0, 1e-30, 1e-30, 1e25, 1, 1e-38])
    g_v, g_m = sizes[:, None] * normal(8, d, seed=2), normal(8, seed=3).double()
    g_m *= torch.tensor([0, 0, 1, 1e-30, 1e10, 1e25, 1e30, 1e-38])
    check(x, t, x0, D, g_v, g_m)


@pytest.mark.parametrize("d", ROADS)
@pytest.mark.parametrize("distance", [1.0, 10.0, 1000.0])
@pytest.mark.parametrize("D", [1, 500])
def test_cotangents_along_the_displacement(d, distance, D):
    """As a loss's are: their products with x − x0 are large, and cancel."""
    x, x0 = normal(4, d), normal(300, d, seed=1)
    x = distance * x
    t = x.norm(dim=1) * torch.tensor([0.1, 0.5, 1.0, 3.0])
    check(x, t, x0, D, x, torch.zeros(4).double())


@pytest.mark.parametrize("d", ROADS)
@pytest.mark.parametrize("distance", [10.0, 100.0, 1000.0])
def test_log_masses_in_a_cluster_beside_another(d, distance):
    """Gradients of log masses alone, which point nowhere: beside distances within the cluster the
    sums of references are large.
    """
    cluster = normal(1, d)
    x0 = torch.cat([cluster + normal(500, d, seed=1) / distance, normal(100, d, seed=2)])
    x = cluster + normal(4, d, seed=3) / distance
    t = torch.tensor([0.05, 0.3, 1, 3]) * math.sqrt(d)
    check(x, t, x0, g_v=torch.zeros(4, d), g_m=torch.ones(4).double())
    check(x, t / d**0.25, x0, math.inf, g_v=torch.zeros(4, d), g_m=torch.ones(4).double())


@pytest.mark.parametrize("d", [3, 16, 40, 300])
@pytest.mark.parametrize("count", [3, 17, 50])
def test_what_an_earlier_call_left_in_memory(d, count):
    """References nearer than any that follow."""
    x = normal(4, d)
    t = torch.full((4,), 0.5 * math.sqrt(d))
    check(x, t, x.repeat(128, 1) + 1e-3)
    check(x, t, 5 + normal(count, d, seed=1))


@pytest.mark.parametrize("row", [0, 95])
def test_candidates_at_the_ends_of_blocks(row):
    """A query amid a cluster of the rows at one place of each block, beside 16 others for which all
    references count: it may be finished another way. On a grid and off it.
    """
    x0 = normal(1100, 300)
    members = torch.cat([torch.arange(row, 1100, 96), torch.arange(300, 440)]).unique()
    x0[members] = x0[0] + 0.1 * normal(len(members), 300, seed=1)
    x = normal(17, 300, seed=2)
    x[8] = x0[members].mean(0) + 0.1 * x[8]
    t = torch.linspace(60, 200, 17)
    t[8] = 10
    check(x, t, (x0 * 32).round() / 32)
    check(x, t, x0)


@pytest.mark.parametrize("d", [3, 40])
def test_ratios_of_distances_beyond_float64(d):
    x0 = 1e3 * normal(100, d).double()
    x = x0[:2].clone().requires_grad_()
    t = torch.full((2,), 1e-153, dtype=torch.float64, requires_grad=True)
    v, log_mass = poisson_displacement(x, t, x0, backend="cpu")
    assert not v.any()
    gradients = torch.autograd.grad(v.sum() + log_mass.sum(), [x, t])
    assert all(g.isfinite().all() for g in gradients)
