# SPDX-License-Identifier: Apache-2.0
"""Named hard cases: float32 queries and references, small enough for every test."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from oracle import Truth, solve
from torch import Tensor


@dataclass(frozen=True)
class Case:
    x: Tensor
    t: Tensor
    x0: Tensor
    D: float = 1
    dense: bool = False  # claims to cover the dense sum: the effective sample size is above 2
    named: bool = True  # the contract's stricter column

    @property
    def d(self) -> int:
        return self.x.shape[1]

    def truth(self) -> Truth:
        return solve(self.x, self.t, self.x0, self.D)


CASES: dict[str, Callable[[], Case]] = {}


@cache
def build(name: str) -> Case:
    return CASES[name]()


@cache
def truth(name: str) -> Truth:
    return build(name).truth()


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(d: int, count: int, batch: int, D: float = 1, dense: bool = True) -> Case:
    """Normal references, queries among them; t from a one-hot softmax to a flat one.

    s_j spreads by √(8d) around 2d + t², so the logits spread by about 1 at t² = (d + D) √(2d).
    """
    generator = seeded(d * 1000 + count)
    x0 = torch.randn(count, d, generator=generator)
    x = torch.randn(batch, d, generator=generator)
    octaves = torch.linspace(1, -4, batch) if d < 4 else torch.linspace(0, -1.5, batch)
    t = 2**octaves * math.sqrt((1 if math.isinf(D) else d + D) * math.sqrt(2 * d))
    return Case(x, t, x0, D, dense, named=d <= 16)


def low_dimension(d: int, offset: float, D: float = 1) -> Case:
    """t = 1e-3 on a fine cluster far from the origin, by its points and by its centre."""
    generator = seeded(d)
    x0 = offset + 2e-3 * torch.randn(300, d, generator=generator)
    x = torch.cat([x0[:12], torch.full((12, d), float(offset))])
    x += 1e-3 / math.sqrt(d) * torch.randn(24, d, generator=generator)
    return Case(x, torch.full((24,), 1e-3), x0, D, dense=True)


def all_t(d: int) -> Case:
    """t from 1e-5 to 1e4, with queries at about that distance."""
    generator = seeded(d)
    t = torch.logspace(-5, 4, 28)
    x0 = torch.randn(515, d, generator=generator)
    x = x0[:28] + t[:, None] * torch.randn(28, d, generator=generator)
    return Case(x, t, x0, named=d <= 16)


def near_duplicates(d: int, distance: float) -> Case:
    """Queries amid three references that almost coincide."""
    generator = seeded(d)
    x0 = torch.randn(130, d, generator=generator)
    x0[70:72] = x0[0] + distance / math.sqrt(d) * torch.randn(2, d, generator=generator)
    x = x0[[0, 70, 71]].mean(0) + distance / math.sqrt(d) * torch.randn(6, d, generator=generator)
    # Where (k/2) ln s differs by about 1 between the three.
    return Case(x, distance * math.sqrt(d) * torch.logspace(-0.5, 0.5, 6), x0, dense=True)


def on_data_points(d: int) -> Case:
    generator = seeded(d)
    x0 = torch.randn(100, d, generator=generator)
    t = torch.tensor([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10, 1e2, 1e4])
    return Case(x0[90:99].clone(), t, x0)


def crowds(d: int) -> Case:
    """Four references with many copies each, whose float32 errors are all the same."""
    generator = seeded(d)
    x0 = torch.randn(4, d, generator=generator).repeat(60, 1)
    x = torch.randn(12, d, generator=generator)
    return Case(x, torch.linspace(0.2, 2, 12) * math.sqrt(d), x0, dense=True, named=d <= 16)


def uneven_crowds(d: int) -> Case:
    """Nine tenths copies of one reference, one tenth of another: long sums of equal terms. Queries
    on the latter, from where on the displacement is small beside what is summed.
    """
    generator = seeded(d)
    copied = torch.randn(2, d, generator=generator)
    x0 = copied[(torch.rand(1000, generator=generator) < 0.1).long()]
    x = copied[1] + 1e-3 * torch.randn(12, d, generator=generator)
    return Case(x, torch.logspace(0.5, 2, 12) * math.sqrt(d), x0, dense=True, named=False)


def flat(d: int, count: int, D: float = 1, share: float = 0) -> Case:
    """All references weigh almost the same, so that the terms of their sums round alike. share: of
    ones among zeros in place of normal references, so that the terms of the displacement do, too.
    """
    generator = seeded(d * 1000 + count)
    x0 = torch.randn(count, d, generator=generator).bfloat16().float()
    x = torch.randn(8, d, generator=generator)
    if share:
        x0 = (torch.rand(count, d, generator=generator) < share).float()
        x = share + torch.linspace(0, 0.35, 8)[:, None] * x
    t = torch.tensor([848, 1778, 4394, 1e4]).repeat(2)
    return Case(x, t, x0, D, dense=True, named=False)


def hardly_spread(d: int, steps: int) -> Case:
    """Values on a grid whose spread is `steps` of its steps, with queries near all of them: float32
    rounds the grid's values, by little beside the grid but not beside the displacement.
    """
    generator = seeded(d * 100 + steps)
    centre = torch.randint(-100, 100, (d,), generator=generator)
    codes = centre + torch.randint(0, steps + 1, (240, d), generator=generator)
    x0 = (codes.double() / 40).float()
    x = x0[:6] + torch.logspace(-5, -1, 6)[:, None] * torch.randn(6, d, generator=generator)
    return Case(x, torch.tensor([1.0, 40, 1e3]).repeat(2), x0, D=0, dense=True, named=False)


def a_cluster(d: int, size: int) -> Case:
    """A query amid a cluster of some references, beside 16 queries for which all of them count:
    of 17 with many candidates the one with the fewest may be finished another way. On a grid.
    """
    generator = seeded(d)
    x0 = torch.randn(1100, d, generator=generator)
    members = torch.randperm(1100, generator=generator)[:size]
    x0[members] = x0[0] + 0.1 * torch.randn(size, d, generator=generator)
    x = torch.randn(17, d, generator=generator)
    x[8] = x0[members].mean(0) + 0.1 * x[8]
    t = torch.linspace(60, 200, 17)
    t[8] = 10
    return Case(x, t, (x0 * 32).round() / 32, dense=True, named=False)


def far_away(d: int) -> Case:
    """Queries far outside of data that are themselves far from the origin."""
    generator = seeded(d)
    x0 = 1000 + torch.randn(200, d, generator=generator)
    x = 300 * torch.randn(6, d, generator=generator)
    return Case(x, torch.tensor([1e-5, 0.1, 1, 10, 1e2, 1e4]), x0, dense=d < 16, named=d <= 16)


def close_together(d: int, D: float, distance: float) -> Case:
    """Distances so far below t = 1 that s = ‖x − x0‖² + t² has few digits of them, which D then
    multiplies.
    """
    generator = seeded(d)
    x0 = distance * torch.randn(12, d, generator=generator)
    x = distance * torch.randn(12, d, generator=generator)
    return Case(x, torch.ones(12), x0, D, dense=True, named=d <= 16)


def few_values(d: int, D: float, t: float, count: int = 60) -> Case:
    """Ones and zeros, with queries amid them: roundings are those of a few numbers."""
    generator = seeded(d)
    x0 = (torch.rand(count, d, generator=generator) < 0.5).float()
    x = 0.5 + 0.01 * torch.randn(16, d, generator=generator)
    return Case(x, torch.full((16,), t), x0, D, dense=True, named=False)


def two_clusters(d: int, D: float, distance: float, width: float, t: float) -> Case:
    """Far apart and tight; queries at one of them, between them and about t away. Of 300, so that a
    few of the others do not stand for all.
    """
    generator = seeded(d)
    centres = distance / math.sqrt(2 * d) * torch.randn(2, d, generator=generator)
    x0 = centres[torch.arange(300) % 2] + width * torch.randn(300, d, generator=generator)
    near = centres[[0, 1, 0, 1, 0, 1]] + width * torch.randn(6, d, generator=generator)
    middle = (centres[0] + centres[1]) / 2 + 1e-3 * torch.randn(6, d, generator=generator)
    return Case(torch.cat([near, middle]), torch.full((12,), t), x0, D, dense=True, named=False)


def clusters_far_apart(d: int, peak: float, other: float, t: float) -> Case:
    """About ±c, where c has a peak in every 64th column: what sums of products lose is alike for
    all references of one of them, and the more the higher the peaks. Queries by one of them.
    """
    generator = seeded(d)
    centre = torch.full((d,), other)
    centre[::64] = peak
    sign = 1 - 2 * (torch.arange(300) % 2)
    stretch = sign * (1 + 0.05 * torch.randn(300, generator=generator))
    x0 = stretch[:, None] * centre + 0.3 * other * torch.randn(300, d, generator=generator)
    x = centre + 0.3 * centre.norm() / math.sqrt(d) * torch.randn(8, d, generator=generator)
    times = t * centre.norm() * torch.logspace(-0.5, 0.7, 8)
    return Case(x, times, x0, dense=True, named=False)


def mostly_coinciding(d: int, D: float) -> Case:
    """Of five references four coincide, as far away as the other."""
    generator = seeded(d)
    x0 = torch.randn(2, d, generator=generator)[[0, 1, 1, 1, 1]] * 10
    x = x0[:2].mean(0) + 3 * torch.randn(200, d, generator=generator)
    return Case(x, torch.linspace(0.1, 3, 200), x0, D, named=d <= 16)


def at_the_origin(d: int) -> Case:
    """Unit vectors and their negatives, and queries at the origin, equally far from all."""
    x0 = torch.eye(d).repeat(2, 1)
    x0[d:] *= -1
    return Case(
        torch.zeros(2, d), torch.tensor([3.0, 300.0]), x0, math.inf, dense=True, named=False
    )


def huge_D(d: int, D: float) -> Case:  # noqa: N802
    """t grows as √D, as D approaches the Gaussian kernel."""
    generator = seeded(d)
    x0, x = (torch.randn(n, d, generator=generator) for n in (100, 6))
    t = torch.tensor([0.2, 0.5, 1, 2, 5, 20], dtype=torch.float64) * math.sqrt(D)
    return Case(x, t, x0, D, dense=True, named=d <= 16)


def alone(d: int, D: float) -> Case:
    """On references of which all others have e^-8 … e^-18 of the weight: it alone makes v."""
    x0 = torch.randn(40, d, generator=seeded(d))
    x = x0[:12]
    square = (x0.double() - x[:, None].double()).square().sum(2).kthvalue(2, dim=1).values
    logit = torch.linspace(8, 18, 12, dtype=torch.float64)
    t = square / (2 * logit if math.isinf(D) else (2 * logit / (d + D)).expm1())
    return Case(x, t.sqrt(), x0, D, named=d <= 16)


def register(name: str, build: Callable[..., Case], *arguments: float, **options: float) -> None:
    assert name not in CASES
    CASES[name] = lambda: build(*arguments, **options)


for d in (1, 2, 3, 16, 17, 63, 64, 65, 100, 512, 784, 3072):
    register(f"normal d={d}", normal, d, 777 if d < 512 else 333, 37 if d < 512 else 9)
# Blocks of the exact CPU kernel hold 512 (d ≤ 16), 256 (d ≤ 32) and at most 64 references, those of
# the others 256 (d ≤ 32), 240 (d ≤ 256) and 96.
for d, counts in {
    2: (2, 9, 511, 512, 513, 1025),
    20: (256, 257),
    64: (7, 8, 63, 64, 65, 129, 239, 241),
    257: (95, 96, 97, 257),
}.items():
    for count in counts:
        register(f"N={count} d={d}", normal, d, count, 5, dense=count > 7)
for count in (15, 16, 17, 33):
    register(f"N={count} d=3072", normal, 3072, count, 3)
for d in (1, 3, 65):
    register(f"N=1 d={d}", normal, d, 1, 3, dense=False)
    register(f"N=1 B=1 d={d}", normal, d, 1, 1, dense=False)
# Queries are taken in groups of 4 and tiles of 32 to 64.
for batch in (1, 4, 31, 33, 65, 129):
    for d in (3, 40):
        register(f"B={batch} d={d}", normal, d, 201, batch)
for D in (0, 2.5, 128, 1e6, math.inf):
    for d in (3, 64, 784):
        register(f"D={D:g} d={d}", normal, d, 205, 9, D)
for d in (1, 2, 3, 16):
    for offset in (0, 10, 1000):
        register(f"t=1e-3 d={d} offset={offset}", low_dimension, d, offset)
register("t=1e-3 d=2 offset=10 D=128", low_dimension, 2, 10, 128)
for d in (2, 16, 64):
    register(f"all t d={d}", all_t, d)
for d, distance in ((2, 1e-3), (64, 1e-5), (64, 1e-2), (784, 1e-4)):
    register(f"near-duplicates d={d} distance={distance:g}", near_duplicates, d, distance)
for d in (1, 3, 64, 100):
    register(f"on data points d={d}", on_data_points, d)
for d, D in ((1, 40), (4, math.inf), (20, 1e4), (40, math.inf)):
    register(f"alone d={d} D={D:g}", alone, d, D)
for d in (3, 33, 64, 256, 300, 3072):
    register(f"crowds d={d}", crowds, d)
for d in (64, 300, 784):
    register(f"uneven crowds d={d}", uneven_crowds, d)
for d, steps in ((64, 0), (64, 1), (301, 0), (301, 1)):
    register(f"hardly spread d={d} steps={steps}", hardly_spread, d, steps)
register("a cluster d=300", a_cluster, 300, 150)
for d in (2, 17, 100):
    register(f"far away d={d}", far_away, d)
for d, D, distance in ((3, 1e6, 1e-6), (3, 1e9, 3e-5), (64, 1e9, 1e-5), (300, 1e9, 1e-5)):
    register(f"close together d={d} D={D:g}", close_together, d, D, distance)
for d, count, D in (
    (32, 240, 1),
    (32, 240, math.inf),
    (64, 240, 1),
    (64, 2000, math.inf),
    (300, 515, math.inf),
    (784, 515, math.inf),
):
    register(f"flat d={d} D={D:g}", flat, d, count, D)
    register(f"flat d={d} D={D:g} ones", flat, d, count, D, share=0.2)
for d, D, t in (
    (20, 8, 0.4),
    (32, 1, 0.4),
    (64, 1, 0.4),
    (64, 128, 0.4),
    (200, 128, 0.4),
    (257, 1, 0.4),
):
    register(f"few values d={d} D={D:g}", few_values, d, D, t, 60 if d < 257 else 300)
for d, D, distance, width, t in (
    (20, 8, 60, 1e-6, 10),
    (100, 1000, 60, 1, 87),
    (128, 128, 900, 1e-6, 14),
    (257, 128, 1000, 1e-3, 1.3e-4),
    (257, 1e6, 1000, 1e-7, 3e-4),
):
    register(f"two clusters d={d} D={D:g} width={width:g}", two_clusters, d, D, distance, width, t)
for d, peak, other, t in ((100, 1, 1, 2), (100, 30, 1, 2), (300, 5, 0.02, 8)):
    name = f"clusters far apart d={d} peak={peak}"
    register(name, clusters_far_apart, d, float(peak), float(other), t)
for d in (3, 16, 20, 24):
    register(f"mostly coinciding d={d}", mostly_coinciding, d, 8)
register("at the origin d=257", at_the_origin, 257)
for d, D in ((1, 1e9), (2, 1e11), (20, 1e12), (64, 1e11), (300, 1e11)):
    register(f"huge D d={d}", huge_D, d, D)
