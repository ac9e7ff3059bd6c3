# SPDX-License-Identifier: Apache-2.0
"""Do roundings of the fused kernel (24 < d ≤ 256) add up where a problem lets them be alike?

Each problem leaves one of them alone to decide: distances that are equal, queries of which float
leaves out the same in every column, products that are large beside what differs.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import seeded
from test_adversarial import check, normal, three_threads  # noqa: F401
from torch import Tensor

from pfgm_kernels.backends import cpu

pytestmark = pytest.mark.usefixtures("poison", "three_threads")

DIMENSIONS = [40, 250]


@pytest.fixture
def one_thread(three_threads: None) -> None:  # noqa: F811
    """Which takes all references one after the other."""
    torch.set_num_threads(1)


def directions(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(normal(n, d, seed=seed).double(), dim=1)


def gaussian_height(slope: float) -> float:
    """σ of which a squared distance takes so much off the logit, per unit."""
    return math.sqrt(0.5 / slope)


def shell(n: int, d: int) -> Tensor:
    """(n, d) of equal norms about zero: one row's values, rearranged and with other signs."""
    order = torch.rand(n // 2, d, generator=seeded()).argsort(1)
    sign = torch.randint(0, 2, (n // 2, d), generator=seeded(1)) * 2 - 1
    half = normal(1, d).expand(n // 2, d).gather(1, order) * sign
    return torch.cat([half, -half]).double()


def nearer(x0: Tensor, height: float, k: float, depth: float) -> Tensor:
    """The references with the third row so near to zero that the logits of rows as far as it was
    are `depth` less.
    """
    square = x0[2].square().sum()
    s = (square + height**2) * math.exp(-2 * depth / k)
    x0 = x0.clone()
    x0[2] *= ((s - height**2) / square).sqrt()
    return x0


@pytest.mark.parametrize("half_k", [128.0, 128 * (1 + 0.98 * 2**-24)])
@pytest.mark.parametrize("s", [32.0, 32 * (1 - 0.98 * 2**-24)])
def test_logits_of_a_shell(half_k, s, one_thread):
    """Equal, they round alike; neither k/2 nor 1/s of the nearest, which scale all of them, may
    round to the next float.
    """
    n, d = 16384, 32
    k = 2 * half_k
    for depth in (7.0, 8.0):
        x0 = shell(n, d)
        square = x0[2].square().sum().item()
        height = math.sqrt(s * math.exp(2 * depth / k) - square)
        x0 = nearer(x0, height, k, depth).float()
        t = (
            s * (1 + torch.linspace(-1, 1, 16).double() * 1e-9) - x0[2].double().square().sum()
        ).sqrt()
        check(torch.zeros(16, d), t, x0, k - d)


@pytest.mark.parametrize("d", [100, 200])
@pytest.mark.parametrize("D", [1, 64, 500])
def test_norms_of_a_shell(d, D):
    """Rounded, with others that are far from theirs."""
    x0 = directions(2048, d)
    x0[::2] = -x0[1::2]
    x0[0] *= 1.9
    x0[1024] *= 1.9
    x0[-1] *= 1.33
    for height in (0.6, 1.2, 2.4):
        t = height * torch.linspace(1, 1.01, 16)
        check(torch.zeros(16, d), t, nearer(x0, height, d + D, 6.5).float(), D)


@pytest.mark.parametrize("d", [40, 64, 250])
def test_log_masses_of_queries_of_which_float_leaves_out_the_same(d):
    """In all columns, in which all that counts lies on the same side, in the same part."""
    n = 6000
    column = (torch.arange(8) * 3 + 70000 * 16) * 2.0**-25 + 2.0**-26 - 2.0**-28
    x = column[:, None].expand(8, d).contiguous()
    side = torch.where(torch.arange(n) < n // 2, 0.2, -0.2)[:, None]
    x0 = 0.5 + side.double() + 0.02 * normal(n, d)
    square = d * (0.5 - 0.2 - x[0, 0].item()) ** 2
    for slope in (4, 6, 9):
        near = max(0.1 * square, square - math.log(n / 24) / slope)
        x0[0] = x[0] + directions(1, d, seed=3)[0] * math.sqrt(near)
        check(x, torch.full((8,), gaussian_height(slope)), x0.float(), math.inf)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_gradients_for_queries_of_which_float_leaves_out_the_same(d):
    """Half of a unit in the last place."""
    column = 0.24 + torch.arange(8) * 1e-3
    column = ((column * 2**25).floor() * 2 + 1) / 2**26
    x = column[:, None].expand(8, d).contiguous()
    side = torch.where(torch.arange(2000) % 2 == 0, -0.2, 0.2)[:, None]
    x0 = (0.5 + side + 0.002 * normal(2000, d)).float()
    for products in (1.6, 2, 2.4):
        t = torch.full((8,), gaussian_height(100 * products / (0.26 * 0.2 * d)))
        check(x, t, x0, math.inf, torch.zeros(8, d), torch.ones(8).double())


@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize("D", [1e9, math.inf])
@pytest.mark.parametrize("step", [2.0**-12, 2.0**-60])
def test_two_that_are_as_near(d, D, step):
    """Exactly where the values are steps that float32 holds, else but for the rounding of their
    values. Float products tell them apart by more than any weight that counts.
    """
    x, half = (
        (scale * math.sqrt(d) * directions(8, d, seed) / step).round() * step
        for scale, seed in ((3, 1), (0.7, 2))
    )
    x0 = torch.cat([normal(100, d), (x + half).float(), (x - half).float()])
    for slope in (1e6, 1e7, 1e8, 1e9):  # times half² about
        s = d / 2 / slope * (1 if math.isinf(D) else (d + D) / 2)
        t = gaussian_height(slope / (d / 2)) if math.isinf(D) else math.sqrt(max(s - d / 2, 1e-6))
        check(x.float(), torch.full((8,), t), x0, D)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_weights_below_what_float_holds(d):
    depth = torch.cat([torch.linspace(0, 1, 2000), torch.linspace(175, 179, 20)])
    x0 = (30 + 2 * depth).sqrt()[:, None] * directions(2020, d)
    check(0.001 * normal(3, d, seed=1), torch.ones(3), x0.float(), math.inf)


@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize("D", [1, 300])
def test_a_block_of_which_only_the_nearest_counts(d, D, one_thread):
    """It is heavy: nothing is summed but by what the sums before are multiplied with."""
    x0 = directions(481, d)
    x0[-1] *= 0.1
    x0[:-1] *= math.sqrt(1.01 * math.exp(12 / (d + D)) - 1)
    check(torch.zeros(1, d), torch.ones(1), (x0 + 0.05 * x0[:1]).float(), D)


@pytest.mark.parametrize(("d", "D"), [(40, 300), (250, 1)])
def test_more_heavy_references_than_may_wait(d, D, one_thread):
    """In each block 24, whose logits are two more than in the block before."""
    depth = torch.full((1440,), 20.0).double()
    for block in range(6):
        depth[240 * block : 240 * block + 24] = 10 - 2 * block
    s = 0.5 + 1.5 * torch.expm1(2 * depth / (d + D))
    x0 = s.sqrt()[:, None] * directions(1440, d)
    check(1e-3 * normal(1, d), torch.ones(1), x0.float(), D)


@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize("width", [0.001, 0.01])
def test_sums_of_a_cluster_far_from_another(d, width):
    """All of a cluster weigh the same: the logits are certain, the sum of what is large is not."""
    centre = 30 * directions(1, d)
    x0 = torch.cat([centre + width * normal(300, d), -centre + width * normal(300, d, seed=1)])
    x = (centre + width * normal(8, d, seed=2)).float()
    check(x, torch.full((8,), gaussian_height(22 / 3600)), x0.float(), math.inf)


def beyond(centre: Tensor, times: float, products: float) -> tuple[Tensor, Tensor]:
    """16 queries as many times as far as a centre and in its direction, and heights at which the
    product with it, unrounded, is so much of a logit.
    """
    d = centre.shape[1]
    x = (1 + times) * centre + 1e-3 * normal(16, d, seed=11)
    t = gaussian_height(products / ((1 + times) * centre.square().sum().item()))
    return x.float(), t * torch.linspace(1, 1.01, 16)


@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize("kind", ["one", "the last one", "a cluster", "a crowd"])
def test_log_masses_far_beyond_what_counts(d, kind):
    """Their gradients alone, whose errors are those of weights."""
    centre = math.sqrt(d) * directions(1, d, seed=4)
    few = 0.003 * normal(600, d, seed=7)
    near = {"a cluster": centre + few, "a crowd": (centre + few[:2]).repeat(300, 1)}.get(
        kind, centre
    )
    x0 = torch.cat([near, -centre + 0.1 * normal(600, d, seed=8)]).float()
    if kind == "the last one":
        x0 = x0.flip(0)
    for times in (1, 4):
        for products in (60, 100, 200, 330):
            x, t = beyond(centre, times, products)
            check(x, t, x0, math.inf, torch.zeros(16, d), torch.ones(16).double())


@pytest.mark.parametrize("d", DIMENSIONS)
def test_cotangents_along_all_that_counts(d):
    """Their products are large, and equal but for little."""
    centre = math.sqrt(d) * directions(1, d, seed=4)
    near, other = (normal(600, d, seed=seed) for seed in (7, 8))
    g_v = (centre * torch.linspace(1, 1.9, 16)[:, None]).float()
    x0 = torch.cat([centre + 0.002 * near, -centre + 0.1 * other]).float()
    for times in (0.5, 1, 4):
        for products in (150, 250, 330):
            x, t = beyond(centre, times, products)
            check(x, t, x0, math.inf, g_v, torch.zeros(16).double())


@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize(("depth", "width"), [(3.5, 1), (3.6, 3), (9, 3)])
def test_one_that_counts_beside_a_heavy_anchor(d, depth, width):
    """Gradients are all its own where cotangents point to it."""
    centre = math.sqrt(d) * directions(1, d, seed=4)
    along = centre / centre.norm()
    aside = directions(1, d, seed=5)
    aside = torch.nn.functional.normalize(aside - (aside * along).sum() * along, dim=1)
    for times in (1, 4):
        for products in (30, 60, 330, 3000):
            x, t = beyond(centre, times, products)
            square = times**2 * d + depth * 2 * t[0].item() ** 2
            other = (1 + times) * centre - math.sqrt(square - width**2) * along + width * aside
            x0 = torch.cat([centre, other, -centre + 0.1 * normal(238, d, seed=8)]).float()
            g_v = (x0[1] - x0[0]).expand(16, d)
            check(x, t[:1].expand(16), x0, math.inf, g_v, torch.zeros(16).double())


@pytest.mark.parametrize("d", [*DIMENSIONS, 300])
def test_the_anchor_is_the_nearest(d):
    """Whichever thread has found it, for it is what other passes measure weights by."""
    x0, x = normal(4000, d), 2 * normal(64, d, seed=1)
    t = torch.full((64,), math.sqrt(d), dtype=torch.float64)
    table = torch.empty(0)
    operands = cpu.prepare(x0, table, 1 << 28)
    anchor = cpu.forward(x, t, x0, table, operands, d + 1.0)[2]
    assert (anchor == torch.cdist(x.double(), x0.double()).argmin(1)).all()
