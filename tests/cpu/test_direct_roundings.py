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
from oracle import (
    assert_displacement,
    assert_gradient_of_x,
    assert_gradients,
    assert_log_mass,
    differentiate,
    float32_contract,
    solve,
)
from test_adversarial import normal, three_threads  # noqa: F401
from torch import Tensor
from torch.nn.functional import normalize

from pfgm_kernels import poisson_displacement

pytestmark = pytest.mark.usefixtures("poison", "three_threads")

SAMPLE = 1024  # rows that crowds are looked for in


def check(x: Tensor, t: Tensor, x0: Tensor, D: float) -> None:
    truth = solve(x, t, x0, D)
    v, log_mass = poisson_displacement(x, t, x0, D=D, backend="cpu")
    assert_log_mass(log_mass, truth)
    assert_displacement(v, truth, float32_contract("cpu"))


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
    check(x, t, torch.cat([torch.zeros(1, d), far]), D)


@pytest.mark.parametrize(
    ("d", "D"), [(1, 5.9), (2, 5.9), (2, 1e3), (3, 20), (8, 20), (16, 1), (16, 40), (2, math.inf)]
)
@pytest.mark.parametrize("count", [30, 1000])
def test_far_copies_beside_a_near_reference(d, D, count):
    """Whatever is rounded of a copy counts for all, as much more as it is below the nearest."""
    t = height(math.log(count) + torch.linspace(-2, 1, 150), d, D)
    x = 0.1 * t[:, None] * normal(150, d, seed=2) / math.sqrt(d)
    for seed in (0, 1):
        copies = normalize(normal(1, d, seed=seed), dim=1).expand(count, d)
        check(x, t, torch.cat([torch.zeros(1, d), copies]), D)


@pytest.mark.parametrize("d", [1, 2, 3, 8])
@pytest.mark.parametrize("digits", [7, 20])
def test_the_digits_that_queries_have_more_than_references(d, digits):
    """All differences of a column round by the same."""
    signs = normal(1, d, seed=1).sign()
    x0 = (0.5 + uniform(100, d, seed=d)).mul(2**digits).round() / 2**digits * 0.1 + 1
    x = torch.cat([2.0**-24 * uniform(100, d, seed=2), 2.0**-14 * uniform(100, d, seed=3)])
    for D in (6, 27 - d, math.inf):
        t = torch.full((200,), 0.01 if D < math.inf else math.sqrt(d / 20))
        check(x, t, signs * x0, D)


@pytest.mark.parametrize("d", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("count", [4, 5, 6])
def test_few_references_that_share_the_weight(d, count):
    """At squared distances a little above 1, where float rounds the most."""
    near = normalize(normal(count, d), dim=1) * (1 + 0.01 * uniform(count, 1, seed=1))
    x0 = torch.cat([near, 20 + normal(500 if d > 1 else 40, d, seed=2)])
    check(1e-3 * normal(400, d, seed=3), torch.full((400,), 1e-3), x0, 27.9 - d)


@pytest.mark.parametrize("d", [4, 8, 16, 24])
@pytest.mark.parametrize("copies", [3, 8])
@pytest.mark.parametrize("nearest", [False, True])
def test_few_copies_among_many_references(d, copies, nearest):
    x0 = 20 + normal(460, d)
    direction = normalize(normal(1, d, seed=1), dim=1)
    x0[5 : 50 * copies : 50] = direction if nearest else (1 + 1 / 27) * direction
    x0[400] = direction if not nearest else -2 * direction
    check(1e-3 * normal(200, d, seed=2), torch.full((200,), 1e-3), x0, 27.9 - d)


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("d", [4, 16])
def test_copies_of_the_nearest_that_a_sample_does_not_show(d, step):
    """Of so many rows the sample has one."""
    share = 32
    x0 = 20 + normal(share * SAMPLE, d)
    x0[7 * share : 8 * share : step] = normalize(normal(1, d, seed=1), dim=1)
    check(1e-3 * normal(60, d, seed=2), torch.full((60,), 1e-3), x0, 27.9 - d)


@pytest.mark.parametrize("d", [1, 3, 8, 24])
@pytest.mark.parametrize("D", [1, 4])
def test_one_reference_alone(d, D):
    """What float makes of it is no part of the log mass."""
    x = 1e-3 * normal(100, d, seed=1)
    check(x, torch.full((100,), 1e-3), normalize(normal(1, d), dim=1), D)
    check(x, torch.full((100,), 1e-3), normalize(normal(1, d), dim=1), 28 - d)


def test_powers_of_what_is_just_above_one():
    """1 + u has few of the digits of u, and k/2 times that for copies."""
    x0 = torch.cat([torch.zeros(1, 1), torch.ones(3000, 1)])
    check(1e-3 * normal(100, 1), torch.linspace(8, 20, 100), x0, 39)


@pytest.mark.parametrize("d", [4, 16])
def test_parts_of_the_references_that_begin_late(d):
    """Two tiles of queries for three threads: the last has two thirds of the second's."""
    x0 = normal(1500, d)
    x = x0[500:628] + 0.3 * normal(128, d, seed=1)
    check(x, torch.full((128,), 0.5), x0, 1)


@pytest.mark.parametrize("d", [1, 3, 16])
@pytest.mark.parametrize("D", [1, math.inf])
def test_small_cotangents_of_small_data(d, D):
    """Their products are below what float holds, and the gradients are as large as they."""
    x, x0 = 1e-12 * normal(6, d), 1e-12 * normal(100, d, seed=1)
    t = torch.full((6,), 1e-12 * math.sqrt(d))
    g_v, g_m = 1e-30 * normal(6, d, seed=2), torch.zeros(6).double()
    truth = solve(x, t, x0, D)
    x, t = x.requires_grad_(), t.requires_grad_()
    v, log_mass = poisson_displacement(x, t, x0, D=D, backend="cpu")
    dx, dt = torch.autograd.grad([v, log_mass], [x, t], [g_v, g_m])
    expected = differentiate(truth, x, x0, g_v, g_m, D)
    assert_gradients(expected, dx, dt)
    assert_gradient_of_x(expected, dx)
