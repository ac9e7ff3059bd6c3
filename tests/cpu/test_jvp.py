# SPDX-License-Identifier: Apache-2.0
"""Do the CPU kernels give the tangents of v and log_mass, relative to that of any logit?"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from cases import Case, build, seeded, truth
from images import decode, eq_11_queries, synthetic_images
from oracle import (
    FLOAT64,
    GRADIENT,
    Tangents,
    assert_tangent_of_v,
    assert_tangents,
    jvp,
    solve,
)
from torch import Tensor

from pfgm_kernels import poisson_displacement
from pfgm_kernels.backends import cpu
from pfgm_kernels.rows import Rows, Stored

pytest.importorskip("pfgm_kernels._C", reason="the extension is not built")
pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float64]
NO_TABLE = torch.empty(0)
WORKSPACE = 256 << 20
# One of each road, layout and kind of weights.
NAMES = [
    "normal d=1",
    "normal d=3",
    "normal d=17",
    "normal d=65",
    "normal d=784",
    "N=17 d=3072",
    "B=33 d=40",
    "D=0 d=3",
    "D=2.5 d=784",
    "D=1e+06 d=64",
    "D=inf d=3",
    "D=inf d=64",
    "D=inf d=784",
    "all t d=16",
    "near-duplicates d=64 distance=1e-05",
    "crowds d=300",
    "a cluster d=300",
]


def tolerance(dtype: torch.dtype) -> float:
    return FLOAT64 if dtype == torch.float64 else GRADIENT


def tangents_of(x: Tensor, t: Tensor, D: float = 1) -> tuple[Tensor, Tensor]:
    """ẋ (B, d) and ṫ (B,), so large that both matter to the logits."""
    x_dot = torch.randn(x.shape, dtype=torch.float64, generator=seeded(3))
    return x_dot, torch.randn(t.shape, dtype=torch.float64, generator=seeded(4))


class Queries:
    """Queries with what the forward pass saves of them, over all references."""

    def __init__(
        self, x: Tensor, t: Tensor, values: Tensor, D: float = 1, table: Tensor = NO_TABLE
    ) -> None:
        self.x, self.t, self.values, self.table = x, t.double(), values, table
        self.k = x.shape[1] + D
        self.operands = cpu.prepare(values, table, WORKSPACE)
        self.v, _, anchor, log_weight = cpu.forward(x, self.t, values, table, self.operands, self.k)
        stored = Stored(values, table, anchor)
        residual = self.v - (stored.decode() - x)
        self.rows = Rows(x, self.t, residual, stored, log_weight, self.k)

    def slope_of_the_anchor(self, x_dot: Tensor, t_dot: Tensor) -> Tensor:
        difference, t = self.rows.anchor_x0 - self.x, self.t
        pull, square = (difference * x_dot).sum(1), difference.square().sum(1)
        if math.isinf(self.k):
            return pull / t**2 + square * t_dot / t**3
        return self.k * (pull - t * t_dot) / (square + t**2)

    def sums(
        self, x_dot: Tensor, t_dot: Tensor, centre: Tensor, cut: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """What the kernels give for a chunk of the references."""
        operands = cpu.operands_of(self.operands, cut) if self.operands else []
        values = self.values[cut]
        return cpu.jvp(self.rows, values, self.table, operands, x_dot, t_dot, centre)

    def push(
        self, x_dot: Tensor, t_dot: Tensor, step: int | None = None, centre: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tangents of v and log_mass, from chunks of `step` references. centre: of the logits'."""
        centre = self.slope_of_the_anchor(x_dot, t_dot) if centre is None else centre
        pull, slope = torch.zeros_like(self.v), torch.zeros_like(self.t)
        step = step or len(self.values)
        for start in range(0, len(self.values), step):
            part = self.sums(x_dot, t_dot, centre, slice(start, start + step))
            pull += part[0]
            slope += part[1]
        return pull - slope[:, None] * self.v - x_dot, slope + centre


def of_case(case: Case, dtype: torch.dtype) -> Queries:
    return Queries(case.x.to(dtype), case.t, case.x0.to(dtype), case.D)


def check(
    expected: Tangents, actual: tuple[Tensor, Tensor], dtype: torch.dtype, strict: bool = True
) -> None:
    assert_tangents(expected, *actual, tolerance(dtype))
    if strict:
        assert_tangent_of_v(expected, actual[0], tolerance(dtype))


@cache
def expected_of_case(name: str) -> Tangents:
    case = build(name)
    return jvp(truth(name), case.x, case.x0, *tangents_of(case.x, case.t), D=case.D)


def check_case(name: str, dtype: torch.dtype, step: int | None = None) -> None:
    case = build(name)
    actual = of_case(case, dtype).push(*tangents_of(case.x, case.t), step=step)
    check(expected_of_case(name), actual, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_named_cases(instruction_set, name, dtype):
    check_case(name, dtype)


@pytest.mark.parametrize("name", ["normal d=3", "normal d=65", "D=inf d=784"])
def test_chunks_add_up(name):
    """Most of them without the anchor."""
    check_case(name, torch.float32, step=100)


@pytest.mark.parametrize("moving", ["x", "t"])
@pytest.mark.parametrize("name", ["all t d=2", "D=inf d=3", "normal d=64", "D=1e+06 d=784"])
def test_one_moves_alone(name, moving):
    case = build(name)
    x_dot, t_dot = tangents_of(case.x, case.t)
    (t_dot if moving == "x" else x_dot).zero_()
    expected = jvp(truth(name), case.x, case.x0, x_dot, t_dot, D=case.D)
    check(expected, of_case(case, torch.float32).push(x_dot, t_dot), torch.float32)


@cache
def images(m: float) -> tuple[Tensor, Tensor, Tensor, Tangents]:
    """Queries x, t at the level m, the images' codes (N, d), and the truth."""
    codes = synthetic_images().flatten(1)
    x, t = eq_11_queries(decode(codes[5:9]), m, seed=m)
    truth = solve(x, t, decode(codes))
    return x, t, codes, jvp(truth, x, decode(codes), *tangents_of(x, t))


@pytest.mark.parametrize("m", [200, 225, 260])
def test_8_bit_images(instruction_set, m):
    x, t, codes, expected = images(m)
    queries = Queries(x, t, codes, table=decode(torch.arange(256)))
    check(expected, queries.push(*tangents_of(x, t)), torch.float32)


@pytest.mark.parametrize("d", [2, 40, 300])
def test_far_from_the_data(d):
    x0 = torch.randn(300, d, generator=seeded(d))
    x = torch.logspace(1, 8, 8)[:, None] * torch.randn(8, d, generator=seeded(1))
    t = torch.logspace(-3, 4, 8)
    tangents = tangents_of(x, t)
    for D in (1, math.inf):
        t = t if D == 1 else x.norm(dim=1)  # some that share the weight, and some that do not
        expected = jvp(solve(x, t, x0, D), x, x0, *tangents, D=D)
        check(expected, Queries(x, t, x0, D).push(*tangents), torch.float32)


@pytest.mark.parametrize("name", ["N=513 d=2", "B=33 d=40", "D=inf d=784", "D=inf d=3"])
def test_negative_t_is_the_mirror_image(name):
    case = build(name)
    x_dot, t_dot = tangents_of(case.x, case.t)
    above = Queries(case.x, case.t, case.x0, case.D).push(x_dot, t_dot)
    below = Queries(case.x, -case.t, case.x0, case.D).push(x_dot, -t_dot)
    assert all(a.equal(b) for a, b in zip(above, below, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize(("d", "D"), [(1, 0), (1, 1), (2, 0), (2, 1), (3, 1)])
def test_a_near_reference_of_little_weight(d, D, dtype):
    """Beside very many far ones: relative to its logit's tangent, which is huge, theirs cancel."""
    generator, count = seeded(d), 50_000
    x0 = torch.randn(2, d, generator=generator)[torch.ones(count, dtype=torch.long)]
    x0[0] = torch.randn(d, generator=generator)
    distance = (x0[1] - x0[0]).norm() * count ** (-1 / (2 + d + D)) * torch.logspace(-1, 1, 12)
    x = x0[0] + distance[:, None] / math.sqrt(d) * torch.randn(12, d, generator=generator)
    t = distance * torch.logspace(-1, 1, 3).repeat(4)
    x, t, x0, *tangents = (a.to(dtype) for a in (x, t, x0, *tangents_of(x, t)))
    _, actual = torch.func.jvp(
        lambda x, t: poisson_displacement(x, t, x0, D=D, backend="cpu"), (x, t), tuple(tangents)
    )
    check(jvp(solve(x, t, x0, D), x, x0, *tangents, D=D), actual, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["normal d=64", "D=inf d=3", "D=inf d=784"])
def test_any_centre_does(name, dtype):
    tangents = tangents_of(build(name).x, build(name).t)
    queries = of_case(build(name), dtype)
    centre = 0.5 * queries.slope_of_the_anchor(*tangents)
    actual = queries.push(*tangents, centre=centre)
    check(expected_of_case(name), actual, dtype, strict=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("d", [2, 40, 300])
def test_singular_and_not_finite_rows(instruction_set, d, dtype):
    x0 = torch.randn(600, d, dtype=dtype, generator=seeded())
    x = torch.randn(6, d, dtype=dtype, generator=seeded(1))
    x[1] = x0[77]
    x[3, 1] = torch.nan
    t = torch.tensor([1.0, 0.0, 0.0, 1.0, torch.nan, 1.0])
    tangents = tangents_of(x, t)
    queries = Queries(x, t, x0)
    pull, slope = queries.sums(*tangents, queries.slope_of_the_anchor(*tangents))
    assert not pull[1].any()
    assert slope[1].item() == 0
    assert pull[3:5].isnan().all()
    assert slope[3:5].isnan().all()
    others = [0, 2, 5]
    expected = jvp(solve(x[others], t[others], x0), x[others], x0, *(a[others] for a in tangents))
    check(expected, tuple(a[others] for a in queries.push(*tangents)), dtype)
