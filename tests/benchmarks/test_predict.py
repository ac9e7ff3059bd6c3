# SPDX-License-Identifier: Apache-2.0
"""Are predictions made of all that is launched, and as the page says?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.chips import CHIPS
from benchmarks.launches import Problem
from benchmarks.models import TRITON, Work
from benchmarks.models_cuda import CUDA
from benchmarks.predict import CASES, RATES, Rates, kernels_of, launches_on, time_of, total
from benchmarks.routing import CIFAR10, CUDA_CIFAR10, Routing, routing_of

pytest.importorskip("triton", "3.6")

H200, H100, A100, RTX_5090, RTX_4090 = CHIPS
HEADLINE = Problem(512, 50_000, 3072)


def predicted(name: str, backend: str = "triton", chip=H100, routing: Routing = CIFAR10):
    kernels = {k.name: k for k in kernels_of(HEADLINE, routing, chip, backend)}
    return kernels[name]


@pytest.mark.parametrize("problem", [case[0] for case in CASES], ids=str)
def test_every_kernel_has_a_model(problem: Problem) -> None:
    for backend, models in (("triton", TRITON), ("cuda", CUDA)):
        if backend == "triton" and problem.dim <= 32:
            continue  # not what a GPU should take there
        for own, torchs in launches_on(problem, backend, H100.capability, 132).values():
            assert {launch.kernel for launch in own} <= models.keys()
            assert min(launch.programs for launch in own) > 0
            assert torchs > 0


def test_products_by_hand() -> None:
    """512 queries and 391 tiles of 128 references, one chunk: sums of 3072 terms, of digits six
    times; by `cuda` two chunks, of parts thrice.
    """
    screen = predicted("products.screen", chip=A100)
    assert screen.launches == 1
    assert screen.work.integer == 6 * 2 * 512 * 391 * 128 * 3072
    rounds = -(-screen.programs // 108)
    seconds = screen.work.integer / (RATES.mma * 624e12) * rounds / (screen.programs / 108)
    assert (screen.seconds, screen.bound) == (pytest.approx(seconds), "tensor")
    assert predicted("compare", "cuda").work.tensor == 3 * 2 * 256 * 391 * 128 * 3072


def test_direct_differences_by_hand() -> None:
    """A conversion, a subtraction and a multiply-add of each of 512 × 8,594 × 3,072 elements, and
    the conversion of a query for each group of eight.
    """
    many = partial(predicted, "exact.distances", routing=CUDA_CIFAR10)
    work = many().work
    assert work.float64 == 2 * 3072 * 512 * (3 * 8594 + 1085)
    assert work.memory > 4 * 3072 * 50_000
    on_4090 = many(chip=RTX_4090)
    assert on_4090.bound == "float64"
    assert on_4090.seconds == pytest.approx(work.float64 / (RATES.float64 * 1.29e12))


@pytest.mark.parametrize(("backend", "name"), [("triton", "products.sum"), ("cuda", "sum")])
def test_grids_are_those_of_the_chip(backend: str, name: str) -> None:
    """By its block sizes, or splits that fill it; of 24 blocks of columns."""
    programs = {predicted(name, backend, chip).programs for chip in CHIPS}
    assert len(programs) > 1
    assert all(number % 24 == 0 for number in programs)


def test_the_unit_that_takes_longest_takes_the_time() -> None:
    rates = Rates(memory=1, float32=1, float64=1, mma=1)
    work = Work(memory=2.039e6, float32=39e6, float64=9.7e6, tensor=312e6, cache=4.5e6)
    assert time_of(work, A100, "cuda", rates) == (pytest.approx(2e-6), "float32")
    work = replace(work, longest=10)
    assert time_of(work, A100, "cuda", rates) == (pytest.approx(4e-6), "steps")
    work = replace(work, steps=108 * 8 * 20)
    assert time_of(work, A100, "cuda", rates) == (pytest.approx(8e-6), "steps")


def test_programs_that_are_alike_are_done_in_rounds() -> None:
    work = Work(tensor=1e12)
    full, one_more, any_ = (
        time_of(replace(work, working=programs), H100, "triton")[0] for programs in (132, 133, 0)
    )
    assert one_more == pytest.approx(full * 2 * 132 / 133)
    assert any_ == full


def test_work_follows_the_data() -> None:
    less = replace(CUDA_CIFAR10, candidates=3, tiles=2, groups=2, most=64)
    for backend in ("triton", "cuda"):
        for chip in CHIPS:
            more = total(HEADLINE, CUDA_CIFAR10, chip, backend)
            assert total(HEADLINE, less, chip, backend) < more
    more = replace(less, dense=0.25, blocks=1)
    assert total(HEADLINE, more, H100, "triton") > total(HEADLINE, less, H100, "triton")


def test_routing_is_counted() -> None:
    """Queries with 1, with 100 near ones, and with a cut that leaves one beside 64 to be summed."""
    r = torch.full((3, 600), 9.0)
    r[0, 300] = r[2, 0] = 0
    r[1, 200:300] = 0
    r[2, 64:128] = 1
    limit, cut = torch.zeros(3), torch.tensor([-torch.inf, -torch.inf, 1])
    assert routing_of(r, limit, cut) == Routing(
        candidates=pytest.approx(102 / 3),
        tiles=pytest.approx(4 / 3),
        groups=pytest.approx((1 + 7 + 6 + 1) / 3),
        listed=1.0,
        many=pytest.approx(2 / 3),
        dense=pytest.approx(1 / 3),
        blocks=1.0,
        active=pytest.approx(1 / 10),
        most=100,
    )
