# SPDX-License-Identifier: Apache-2.0
"""Do the float kernels leave to others what their tolerances cannot answer for?"""

from __future__ import annotations

import math

import pytest
import torch
from cases import seeded
from test_adversarial import check, normal, three_threads  # noqa: F401
from torch import Tensor

from pfgm_kernels import ReferenceSet, poisson_displacement
from pfgm_kernels.backends import cpu

pytestmark = pytest.mark.usefixtures("poison", "three_threads")


def spread_logits(x: Tensor, x0: Tensor, height: float, spread: float) -> float:
    """D for which the logits of x0 (N, d) spread by so much, seen from x (B, d) at the height."""
    squares = (x[:, None].double() - x0.double()).square().sum(2)
    s = squares.mean() + height**2
    k = 2 * spread * s / squares.std(1).mean()
    return max(0.0, k.item() - x.shape[1])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("d", [27, 64, 256, 300])
@pytest.mark.parametrize("size", [40, 500])
@pytest.mark.parametrize("spread", [1e-3, 0.03, 1.0])
def test_a_cluster_far_from_another(d, size, spread, seed):
    """Products are as large as the clusters are far apart; all that differs is within a cluster."""
    centres = 10 * normal(2, d, seed=seed)
    cluster = centres[:1] + spread * normal(size, d, seed=seed + 10)
    x0 = torch.cat([cluster, centres[1:] + spread * normal(100, d, seed=seed + 20)])
    x = centres[:1] + spread * normal(4, d, seed=seed + 30)
    for height in (0.3, 3, 30):
        t = height * spread * math.sqrt(d)
        D = spread_logits(x, cluster, t, 2.0)
        check(x, torch.full((4,), t), x0, D)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("d", [40, 300, 1000])
@pytest.mark.parametrize("share", [0.3, 0.01])
def test_clusters_off_a_grid_the_other_way(d, share, seed):
    """Codes leave out what moves all distances of a cluster by as much, towards the queries or away
    from them; share: of what a value may be off the grid by.
    """
    centres = torch.randint(2, 254, (2, d), generator=seeded(seed)).double()
    cluster = torch.arange(300) % 2
    codes = centres[cluster] + torch.randint(-1, 2, (300, d), generator=seeded(seed + 10))
    codes[0, :2] = torch.tensor([0.0, 255.0])
    points, centres = (2 * values / 255 - 1 for values in (codes, centres))
    away = centres[0] - centres[1]
    direction = normal(4, d, seed=seed + 20).double()
    direction -= (direction @ away / away.square().sum())[:, None] * away
    for far in (0.5, 1.0, 2.0):
        x = centres.mean(0) + far * direction  # as far from one as from the other
        off = share * 2**-21 * torch.sign(points - x[0])
        x0 = (points + torch.where(cluster == 0, 1.0, -1.0)[:, None] * off).float()
        for D in (1, 1000):
            for t in (0.1, 1.0):
                check(x.float(), t * (x - centres[0]).norm(dim=1).float(), x0, D)


@pytest.mark.parametrize("d", [40, 300, 1000])
@pytest.mark.parametrize("distance", [0.2, 0.4])
def test_displacements_to_a_cluster_off_a_grid(d, distance):
    """All its values by as much: that leaves distances and moves the mean."""
    codes = torch.randint(0, 256, (3000, d), generator=seeded()).double()
    steps = torch.randint(-1, 2, (300, d), generator=seeded(1))
    codes[1700:2000] = codes[1700].clamp(3, 252) + steps
    off = 0.9 * 2**-21 * torch.sign(normal(1, d, seed=2))
    x0 = 2 * codes / 255 - 1
    x = (x0[1700] + distance * normal(4, d, seed=3)).float()
    x0[1700:2000] += off
    for D in (1, math.inf):
        check(x, torch.full((4,), 0.3 * distance * math.sqrt(d)), x0.float(), D)


@pytest.mark.parametrize("d", [27, 64, 200])
def test_a_cluster_of_few_values(d):
    """Amid others of many: what a column adds to sums is one of three numbers."""
    x0 = normal(2000, d)
    x0[500:700] = x0[500] + 0.01 * torch.randint(-1, 2, (200, d), generator=seeded(2))
    for distance in (0.3, 1, 3):
        x = x0[500:508] + distance * normal(8, d, seed=4)
        for D in (1, 64, 1000):
            for height in (0.3, 1, 3):
                check(x, height * (x - x0[500:508]).norm(dim=1), x0, D)


def origin_of(codes: Tensor) -> Tensor:
    """The codes (d,) that products are about, of references (N, d) that are sampled likewise."""
    _, grid, _ = cpu.prepare((2 * codes / 255 - 1).float(), torch.empty(0), codes.numel())
    return ((grid[4:] - grid[3]) / grid[0]).round()


@pytest.mark.parametrize("D", [1, 3000])
def test_one_that_seems_nearer_than_another(D):
    """By what the first digit leaves of a query, which the norm of a reference multiplies."""
    codes = torch.randint(0, 256, (302, 1000), generator=seeded()).double()
    x = origin_of(codes) + 5.5  # a digit for all but the first column, which is as far as its unit
    x[0] += 1270 - 5.5
    codes[300:] = x - torch.tensor([[-5.5], [5.5]])
    codes[300:, 0] = x[0] - 1270
    points, x = (2 * values / 255 - 1 for values in (codes, x))
    check(x.float()[None], torch.full((1,), 0.1), points.float(), D)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("D", [2e8, 2e9])
def test_what_a_grid_leaves_out_of_two_decides(D, seed):
    """One is farther by its codes, and nearer. A digit holds all that queries differ by."""
    d = 1000
    codes = torch.randint(0, 256, (302, d), generator=seeded(seed)).double()
    x = origin_of(codes) + 1
    near = torch.randint(-60, 60, (d,), generator=seeded(seed + 1)).double()
    codes[300:] = x + torch.stack([near, near.flip(0)])
    columns = (codes[301] == x).nonzero()[:2, 0]
    codes[301, columns] += 1
    points, x = (2 * values / 255 - 1 for values in (codes, x))
    off = 0.3 * 2**-21 * torch.sign(points[300:] - x)
    points[300:] += torch.stack([off[0], -off[1]])
    distances = (points[300:] - x).norm(dim=1)
    assert distances[1] < distances[0]
    check(x.float().expand(2, -1), distances.float(), points.float(), D)


@pytest.mark.parametrize("d", [3, 16, 40, 300])
def test_many_that_weigh_hardly_anything(d):
    """exp(−22) of the nearest each, and together six times what the log mass may be off by."""
    directions = torch.nn.functional.normalize(normal(20_000, d), dim=1)
    x = 1e-3 * normal(2, d)
    for D in (1, 300):
        x0 = torch.cat([directions[:1] * math.exp(-22 / (d + D)), directions])
        check(x, torch.full((2,), 0.01), x0, D)


def test_many_that_count_beside_many():
    """A third of a sphere is nearer: the others have exp(−10.2) of their weight each."""
    x0 = torch.nn.functional.normalize(normal(60_000, 260), dim=1)
    x0[::3] *= math.exp(-10.2 / 261)
    check(1e-4 * normal(2, 260), torch.full((2,), 1e-2), x0, g_v=torch.zeros(2, 260))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("d", [100, 257, 300])
@pytest.mark.parametrize("size", [40, 200])
def test_near_ties_on_a_grid(d, size, seed):
    """Of references that differ by single steps some are nearer by a thousandth of one."""
    codes = torch.randint(0, 256, (2, d), generator=seeded(seed)).double()
    cluster = codes[:1] + torch.randint(-1, 2, (size, d), generator=seeded(seed + 10))
    codes = torch.cat([cluster, codes[1:].expand(300, d)]).clamp(0, 255)
    codes[size:] += torch.randint(-5, 6, (300, d), generator=seeded(seed + 20))
    x0 = (1 + codes.clamp(0, 255) / 255).float()
    x = x0[:size].mean(0) + 1e-3 * normal(4, d, seed=seed + 30)
    t = torch.full((4,), 1.0)
    for D in (1e5, 1e6, 1e7, 1e8, 1e9):
        check(x, t, x0, D)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("d", [3, 8, 16, 24, 40, 250, 300])
@pytest.mark.parametrize("copies", [40, 150, 900])
def test_a_crowd_in_every_other_row(d, copies, seed):
    """That references are alike is judged by a sample of 1,024 in 2,048."""
    x0 = normal(2048, d, seed=seed)
    rows = 1 + 2 * torch.randperm(1024, generator=seeded(seed))[:copies]
    x0[rows] = x0[rows[0]].clone()
    x = x0[rows[:1]] + (0.3 + seed) * normal(5, d, seed=seed + 10)
    for D in (1, 12, 60):
        t = (x - x0[rows[0]]).norm(dim=1) * torch.logspace(-1, 0.5, 5)
        check(x, t, x0, D)


@pytest.mark.parametrize("jitter", [0, 1e-7])
@pytest.mark.parametrize(
    ("d", "distance", "D", "height"), [(40, 3.3, 300, 1), (40, 0.3, 1000, 10), (250, 0.3, 300, 30)]
)
def test_copies_side_by_side(d, distance, D, height, jitter):
    """Of which a sample of 1,024 in 32,768 sees seven."""
    x0 = normal(32768, d)
    copies = slice(16389, 16389 + 220)
    x0[copies] = x0[16389] + jitter * normal(220, d, seed=50)
    x = x0[16389] + distance * normal(4, d, seed=10)
    check(x, height * (x - x0[16389]).norm(dim=1), x0, D)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("d", [1, 2, 3, 8, 16, 24])
@pytest.mark.parametrize("D", [1, 3.3, 8, 16, 24, 60, 1000])
def test_far_from_a_crowd(d, D, seed):
    """Where roundings of a squared distance move its logit most, and alike for copies."""
    x0 = normal(3, d, seed=seed)[torch.randint(0, 3, (60,), generator=seeded(seed))]
    x0[:5] = normal(5, d, seed=seed + 10)
    x = 10 ** torch.linspace(0, 2, 16)[:, None] * normal(16, d, seed=seed + 20)
    check(x, torch.linspace(0.01, 1, 16), x0, D)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("d", [32, 100, 256, 300])
@pytest.mark.parametrize("D", [1, 64, 500])
def test_among_crowds(d, D, seed):
    x0 = normal(2 + 2 * seed, d, seed=seed)
    x0 = x0[torch.randint(0, len(x0), (240,), generator=seeded(seed))]
    x = normal(8, d, seed=seed + 20)
    check(x, torch.logspace(-0.7, 0.7, 8) * math.sqrt(d + D), x0, D)


@pytest.mark.parametrize(("seed", "D"), [(98, 496985), (217, 528956)])  # of four hundred
def test_between_two_crowds(seed, D):
    """Gradients are what remains of a displacement, which equal terms round alike."""
    crowds = normal(2, 1000, seed=seed)
    x = crowds.mean(0) + 0.01 * normal(4, 1000, seed=seed + 2)
    squares = (x[:, None].double() - crowds.double()).square().sum(2)
    s = (1000 + D) / 6 * squares.diff(dim=1).abs().mean()
    t = (s - squares[0].mean()).sqrt().float()
    check(x, t.expand(4), crowds.repeat(500, 1), D)


@pytest.mark.parametrize("d", [60, 300, 3072])
@pytest.mark.parametrize("distance", [1.0, 30.0])
def test_crowds_of_images(d, distance):
    images = torch.randint(0, 256, (4, d), dtype=torch.uint8, generator=seeded()).repeat(60, 1)
    x0 = (2 * images.double() / 255 - 1).float()
    x = distance * normal(6, d)
    for D in (1, d):
        t = torch.logspace(-2, 1, 6) * math.sqrt(d)
        check(x, t, x0, D, references=ReferenceSet.from_images(images))


@pytest.mark.parametrize("d", [2, 40, 300])
def test_a_displacement_that_all_but_cancels(d):
    """Has its digits: a normalised field shows them."""
    half = normal(40, d)
    x0 = torch.cat([half, -half])
    x = 1e-5 * normal(3, d, seed=1)
    for D in (1, 4):
        v, _ = poisson_displacement(x, 1e-5, x0, D=D, backend="cpu")
        exact, _ = poisson_displacement(x.double(), 1e-5, x0.double(), D=D, backend="cpu")
        assert ((v - exact).norm(dim=1) <= 1e-6 * exact.norm(dim=1)).all()
