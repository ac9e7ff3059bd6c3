# SPDX-License-Identifier: Apache-2.0
"""Are samples drawn from the run's own prior, along its own ODE, each by its seed alone?"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from pfgm_kernels.flow import Churn, grid, sample, sample_prior
from pfgm_kernels.training import data
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.generate import Sampler, Sampling, batches

CONFIG = TrainConfig(data="points", event_shape=(2, 3), M=100, gamma=1.0, T=7.0, threads=3)
QUIET = Console(quiet=True)


def field(x: Tensor, t: Tensor) -> Tensor:
    """Of one source at 1; its lines are straight."""
    assert torch.get_num_threads() == 3
    return torch.cat([1 - x.flatten(1), -t[:, None]], 1)


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize(("solver", "steps", "nfe"), [("euler", 4, 5), ("heun", 3, 7)])
def test_the_whole_way_is_the_configs(first: int, solver: str, steps: int, nfe: int) -> None:
    seeds = [*range(first, first + 11)]
    sampler = Sampler(field, CONFIG, Sampling(solver, steps, batch=11))
    (part,) = sampler.generate(seeds, QUIET, keep_path=True)
    result = part.result
    assert result.path is not None
    order = [seeds.index(seed) for seed in part.seeds]
    assert torch.equal(result.path[0], sample_prior(11, (2, 3), T=7.0, seeds=seeds)[order])
    assert result.times[0] == 7.0
    assert result.nfe == part.evaluations == nfe
    torch.testing.assert_close(result.x, torch.ones(11, 2, 3), rtol=0, atol=1e-4)
    (part,) = sampler.generate(seeds, QUIET)
    assert part.result.path is None


def test_what_the_options_mean() -> None:
    """Beside `sample` itself, of a field whose lines are bent."""

    def bent(x: Tensor, t: Tensor) -> Tensor:
        mean = x.flatten(1).sin()
        return torch.cat([mean - x.flatten(1), -t[:, None]], 1)

    config = replace(CONFIG, D=16.0, T=30.0)
    prior = {"T": 30.0, "D": 16.0}
    for how, expected in (
        (Sampling(steps=5), {"times": grid(30.0, 4e-3, 6)}),
        (Sampling("euler", 5, rho=7), {"times": grid(30.0, 4e-3, 6, rho=7), "solver": "euler"}),
        (Sampling(steps=4, sigma_min=0.5), {"times": grid(30.0, 2.0, 5)}),
        (
            Sampling(steps=4, churn=(3, 0.1, 5, 1.1)),
            {"times": grid(30.0, 4e-3, 5), "churn": Churn(3, 0.1, 5, 1.1, D=16), "seeds": [8, 9]},
        ),
        (Sampling("rk45"), {"t_min": 4e-3, "T": 30.0, "rtol": 1e-4, "per_sample": True}),
        (Sampling("rk45", rtol=0.1), {"t_min": 4e-3, "T": 30.0, "rtol": 0.1, "per_sample": True}),
    ):
        (part,) = Sampler(bent, config, how).generate([8, 9], QUIET)
        alone = sample(bent, sample_prior(2, (2, 3), seeds=[8, 9], **prior), **expected)
        assert part.seeds == [8, 9]
        torch.testing.assert_close(part.result.x, alone.x, rtol=1e-6, atol=1e-6)
        each = alone.evaluations
        assert part.evaluations == (alone.nfe if each is None else each.double().mean())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conditional": True},
        {"predicts": "field"},
        {"method": "pfgmpp"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "how",
    [Sampling(steps=2), Sampling("rk45", rtol=0.05), Sampling(steps=2, churn=(1,), batch=7)],
    ids=lambda how: f"{how.solver} {how.churn}",
)
def test_a_seed_makes_the_same_sample_to_the_bit(options: dict[str, Any], how: Sampling) -> None:
    config = TrainConfig.for_data(data.load("digits"), width=64, depth=2, **options)
    model = config.model().eval()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():  # those that end a block begin as zeros
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    sampler = Sampler(model, config, how)

    def drawn(*seeds: int) -> dict[int, Tensor]:
        parts = sampler.generate(seeds, QUIET)
        return {s: x for part in parts for s, x in zip(part.seeds, part.result.x, strict=True)}

    all_ = drawn(*range(40))
    assert [*all_] == [*range(40)]
    assert len({tuple(x.flatten().tolist()) for x in all_.values()}) == 40
    for seeds in ((7,), (39, 5, 3), tuple(range(17, 31)), (0, 16, 32)):
        for seed, x in drawn(*seeds).items():
            assert torch.equal(x, all_[seed]), seed


def test_the_model_sees_one_size_and_one_batch_at_a_time() -> None:
    seen: list[int] = []

    def watched(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert len(t) == len(labels) == len(x)
        seen.append(len(x))
        return field(x, t)

    sampler = Sampler(watched, replace(CONFIG, classes=3), Sampling(steps=2, batch=8))
    parts = sampler.generate(range(20), QUIET)
    first = next(parts)
    assert first.seeds == [*range(8)]
    assert seen == [8] * 5
    assert [len(part.seeds) for part in parts] == [8, 4]
    assert seen == [8] * 15
    assert not [*sampler.generate([], QUIET)]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_batches_have_each_seed_once_at_a_row_of_its_own(size: int) -> None:
    seeds = [5, 3, 100, 4, 13, 21, 29, 2**32 - 1, 6]
    parts = batches(seeds, size)
    assert sorted(seed for part in parts for seed in part) == sorted(seeds)
    for part in parts:
        assert len({seed % size for seed in part}) == len(part) <= size
    assert batches(range(7), 3) == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"solver": "huen"}, "solver expects one of euler, heun, heun_euler, rk45, got 'huen'"),
        ({"steps": 0}, "steps expects an integer ≥ 1, got 0"),
        ({"batch": 0}, "batch expects an integer ≥ 1, got 0"),
        ({"sigma_min": 0.0}, "sigma_min expects a finite number > 0"),
        ({"rho": -1.0}, "rho expects a finite number > 0"),
        ({"solver": "rk45", "rtol": math.inf}, "rtol expects a finite number > 0"),
        ({"rtol": 0.1}, "rtol expects the solver rk45, got heun"),
        ({"solver": "rk45", "rho": 7.0}, "rho expects a solver with a grid, got rk45"),
        ({"solver": "rk45", "churn": (1.0,)}, "churn expects a solver with a grid, got rk45"),
        ({"churn": (1.0, 2.0, 1.0)}, "S_max expects a number ≥ S_min = 2.0, got 1.0"),
        ({"churn": (1.0,) * 5}, "S_min, S_max and S_noise, got 5 numbers"),
        ({"labels": (0,)}, "labels expects classes of a run with some, got 0"),
        ({"sigma_min": 8.0}, "T expects a number > t_min = 8.0, got 7.0"),
    ],
    ids=str,
)
def test_options_that_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Sampler(field, CONFIG, Sampling(**options))


def test_classes_that_the_run_has_not() -> None:
    with pytest.raises(ValueError, match="labels expects classes of 0 to 2, got 3"):
        Sampler(field, replace(CONFIG, classes=3), Sampling(labels=(2, 3)))
