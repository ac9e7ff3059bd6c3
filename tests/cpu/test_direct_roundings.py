# SPDX-License-Identifier: Apache-2.0
"""Do direct differences in float keep the contract where what they round does not average out?

Small problems, each made for one of the roundings: alike for all references or for many, of few
that have the weight, or of one alone.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import seeded
from test_adversarial import check as check_with_gradients
from test_adversarial import check_values, normal, three_threads  # noqa: F401
from torch import Tensor
from torch.nn.functional import normalize

pytestmark = pytest.mark.usefixtures("poison", "three_threads")

SAMPLE = 1024  # rows that crowds are looked for in


def uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed))


def height(depth: Tensor, d: int, D: float) -> Tensor:
    """t for which a reference at distance 1 has a logit so much below that of one at distance 0."""
    return (0.5 / depth).sqrt() if math.isinf(D) else torch.expm1(2 * depth / (d + D)).rsqrt()


@pytest.mark.parametrize(
    ("d", "D"), [(1, 1), (2, 1), (3, 1), (2, 6), (8, 1), (16, 1), (2, 20), (2, 1e3), (8, math.inf)]
)
@pytest.mark.parametrize("width", [0.0, 1e-3])
def test_many_small_weights_beside_a_large_one(d, D, width):
    """Equal or nearly, they are rounded alike as they are added to it."""
    far = normalize(normal(1, d), dim=1) * (1 + width * normal(254, d, seed=1) / math.sqrt(d))
    t = height(torch.linspace(11, 17, 300), d, D)
    x = 0.3 * t[:, None] * normal(300, d, seed=2) / math.sqrt(d)
    check_values(x, t, torch.cat([torch.zeros(1, d), far]), D)


@pytest.mark.parametrize(
    ("d", "D"), [(1, 5.9), (1, 15.3), (2, 5.9), (2, 1e3), (3, 20), (8, 20), (16, 40), (2, math.inf)]
)
@pytest.mark.parametrize("count", [30, 3000])
def test_far_copies_beside_a_near_reference(d, D, count):
    """Whatever is rounded of a copy counts for all, as much more as it is below the nearest."""
    t = height(math.log(count) + torch.linspace(-2, 1, 100), d, D)
    x = 0.1 * t[:, None] * normal(100, d, seed=2) / math.sqrt(d)
    for seed in (0, 1):
        copies = normalize(normal(1, d, seed=seed), dim=1).expand(count, d)
        check_values(x, t, torch.cat([torch.zeros(1, d), copies]), D)


@pytest.mark.parametrize(("d", "D"), [(1, 15.3), (1, math.inf), (2, math.inf), (24, math.inf)])
@pytest.mark.parametrize("count", [1, 3])
def test_few_far_references_where_the_nearest_is_here(d, D, count):
    """All of v is theirs, with what is rounded of them, however little of the weight they have."""
    t = height(torch.linspace(1, 12, 400), d, D)
    x = 1e-3 * t[:, None] * normal(400, d, seed=2) / math.sqrt(d)
    far = normalize(normal(count, d), dim=1) * (1 + 0.01 * uniform(count, 1, seed=1))
    check_values(x, t, torch.cat([torch.zeros(1, d), far]), D)


@pytest.mark.parametrize("D", [127, math.inf])
def test_roundings_for_all_references_that_add_up(D):
    """Of a query's differences, and of k/2 or 1/(2t²)."""
    torch.set_num_threads(1)  # so that the near reference is beside all
    if math.isinf(D):
        depth = torch.linspace(6.9, 7.14, 20_000, dtype=torch.float64)
        depth = depth[(depth.float() - depth).argsort()[:100]]
    else:
        D = (D + 1) * (1 + 0.98 * 2**-24) - 1
        depth = torch.linspace(6, 8, 100, dtype=torch.float64)
    x0 = torch.cat([torch.zeros(1, 1), 1 + 2**-8 * uniform(30_000, 1, seed=1)])
    check_values(torch.full((100, 1), -0.98 * 2**-24), height(depth, 1, D), x0, D)


@pytest.mark.parametrize("d", [1, 2, 3, 8])
@pytest.mark.parametrize("digits", [7, 20])
def test_the_digits_that_queries_have_more_than_references(d, digits):
    """All differences of a column round by the same."""
    signs = normal(1, d, seed=1).sign()
    x0 = (0.5 + uniform(100, d, seed=d)).mul(2**digits).round() / 2**digits * 0.1 + 1
    x = torch.cat([2.0**-24 * uniform(100, d, seed=2), 2.0**-14 * uniform(100, d, seed=3)])
    for D in (6, 27 - d, math.inf):
        t = torch.full((200,), math.sqrt(d / 20) if math.isinf(D) else 0.01)
        check_values(x, t, signs * x0, D)


def gentle(x: Tensor, x0: Tensor, D: float, slopes: Tensor) -> Tensor:
    """t for which the slopes of the nearest's logits times their squared distances are such."""
    square = (x[:, None] - x0).square().sum(2).amin(1)
    if math.isinf(D):
        return (0.5 * square / slopes).sqrt()
    ratio = (x.shape[1] + D) / 2 / slopes - 1
    return (square * ratio).clamp(min=1e-12).sqrt()


@pytest.mark.parametrize(
    ("d", "D"), [(1, 26.9), (3, 24.9), (8, 19.9), (16, 40), (24, 20), (24, math.inf)]
)
@pytest.mark.parametrize("count", [3, 5])
def test_few_references_that_share_the_weight(d, D, count):
    """At squared distances a little above 1, where float rounds the most."""
    x0 = normalize(normal(count, d), dim=1) * (1 + 0.005 * uniform(count, 1, seed=1))
    x0 = torch.cat([x0, 20 + normal(40, d, seed=2)])
    x = 1e-3 * normal(1000, d, seed=3)
    check_values(x, gentle(x, x0, D, torch.linspace(8, 14, 1000)), x0, D)


@pytest.mark.parametrize(("d", "D"), [(8, 19.9), (16, 20), (24, 3.9), (24, 8)])
@pytest.mark.parametrize("copies", [3, 8])
def test_few_copies_among_many_references(d, D, copies):
    """Beside a nearest one."""
    near, far = normalize(normal(2, d), dim=1)
    x0 = 20 + normal(460, d, seed=1)
    x0[5 : 50 * copies : 50], x0[400] = (1 + 1 / (d + D)) * far, near
    x = 1e-3 * normal(300, d, seed=2)
    check_values(x, gentle(x, x0, D, torch.linspace(5, 14, 300)), x0, D)


@pytest.mark.parametrize(("d", "D", "count"), [(24, 1, 17), (16, 8, 150), (16, 8, 240)])
def test_few_values(d, D, count):
    """Distances from an even query are sums of few numbers, in one order or another."""
    if count > d:
        x0 = 0.015 * (uniform(count, d, seed=d) < 0.5) - 0.01
    else:
        x0 = torch.eye(d)[:count] * normal(count, 1).sign()
    x = torch.linspace(-0.003, 0.0027, 400)[:, None].expand(400, d)
    check_values(x, gentle(x, x0, D, torch.linspace(5, 12, 400)), x0, D)


@pytest.mark.parametrize("step", [1, 3])
def test_copies_of_the_nearest_that_a_sample_does_not_show(step):
    """Of so many rows the sample has one."""
    share, d = 32, 24
    x0 = 20 + normal(share * SAMPLE, d)
    x0[7 * share : 8 * share : step] = normalize(normal(1, d, seed=1), dim=1)
    check_values(1e-3 * normal(80, d, seed=2), torch.full((80,), 1e-3), x0, 3)


@pytest.mark.parametrize("d", [1, 3, 8, 24])
@pytest.mark.parametrize("D", [1, 4])
def test_one_reference_alone(d, D):
    """What float makes of it is no part of the log mass."""
    x = 1e-3 * normal(100, d, seed=1)
    check_values(x, torch.full((100,), 1e-3), normalize(normal(1, d), dim=1), D)
    check_values(x, torch.full((100,), 1e-3), normalize(normal(1, d), dim=1), 28 - d)


def test_powers_of_what_is_just_above_one():
    """1 + u has few of the digits of u, and k/2 times that for copies."""
    x0 = torch.cat([torch.zeros(1, 1), torch.ones(3000, 1)])
    check_values(1e-3 * normal(300, 1), torch.linspace(4, 20, 300), x0, 39)


@pytest.mark.parametrize("d", [4, 16])
def test_parts_of_the_references_that_begin_late(d):
    """Two tiles of queries for three threads: the last has two thirds of the second's."""
    x0 = normal(1500, d)
    x = x0[500:628] + 0.3 * normal(128, d, seed=1)
    check_values(x, torch.full((128,), 0.5), x0, 1)


@pytest.mark.parametrize("d", [1, 3, 16])
@pytest.mark.parametrize("D", [1, math.inf])
def test_small_cotangents_of_small_data(d, D):
    """Their products are below what float holds, and the gradients are as large as they."""
    x, x0 = 1e-12 * normal(6, d), 1e-12 * normal(100, d, seed=1)
    t = torch.full((6,), 1e-12 * math.sqrt(d))
    g_v, g_m = 1e-30 * normal(6, d, seed=2), torch.zeros(6).double()
    check_with_gradients(x, t, x0, D, g_v, g_m)


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("D", [1.5, 2.5, 8.5])
def test_on_copies_far_from_others(d, D):
    """v is of these alone, whose weights of 1e-10 to 1e-4 round alike."""
    x0 = normal(2, d).repeat(300, 1)
    t = torch.logspace(-2.5, 0, 60) * (x0[0] - x0[1]).norm()
    check_values(x0[:1].expand(60, -1), t, x0, D)
