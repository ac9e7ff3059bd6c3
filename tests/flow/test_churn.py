# SPDX-License-Identifier: Apache-2.0
"""Is the sampler EDM's, step by step, with its noise and its seeds?

The published algorithms are written here from Karras et al. 2022, "Elucidating the Design Space of
Diffusion-Based Generative Models": Eq. (5) and Algorithms 1 and 2.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from pfgm_kernels import poisson_field
from pfgm_kernels.flow import Churn, grid, sample, sample_prior
from pfgm_kernels.flow._seeds import generators

STEPS, SIGMA_MIN, SIGMA_MAX = 18, 0.002, 80.0
X0 = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 2
COUNT = 6


def digits() -> Tensor:
    return torch.tensor(load_digits().data[:500], dtype=torch.float32) / 8 - 1


def root(D: float) -> float:
    return 1.0 if math.inf == D else math.sqrt(D)


def mean(x: Tensor, sigma: float, D: float) -> Tensor:
    """The denoiser of X0 under the kernel of D, in float64."""
    squared = (x[:, None] - X0).square().sum(2)
    if math.inf == D:
        logits = -squared / (2 * sigma**2)
    else:
        logits = -(x.shape[1] + D) / 2 * (squared + sigma**2 * D).log()
    return logits.softmax(1) @ X0


def edm(x: Tensor, D: float, churn: Churn | None = None, noise=None) -> list[Tensor]:
    """States after each step of Algorithm 2 (of Algorithm 1 where there is no churn)."""
    sigmas = [
        (SIGMA_MAX ** (1 / 7) + i / (STEPS - 1) * (SIGMA_MIN ** (1 / 7) - SIGMA_MAX ** (1 / 7)))
        ** 7
        for i in range(STEPS)
    ] + [0.0]
    states = [x]
    for sigma, sigma_next in itertools.pairwise(sigmas):
        if churn is not None and churn.S_min <= sigma <= churn.S_max:
            gamma = min(churn.S_churn / STEPS, math.sqrt(2) - 1)
            raised = sigma + gamma * sigma
            x = x + math.sqrt(raised**2 - sigma**2) * churn.S_noise * next(noise)
            sigma = raised
        slope = (x - mean(x, sigma, D)) / sigma
        following = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            second = (following - mean(following, sigma_next, D)) / sigma_next
            following = x + (sigma_next - sigma) * (slope + second) / 2
        x = following
        states.append(x)
    return states


def field(D: float):
    def exact(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([mean(x, t[0].item() / root(D), D) - x, -t[:, None]], 1)

    return exact


def prior() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return SIGMA_MAX * torch.randn(COUNT, 5, dtype=torch.float64, generator=generator)


def published_grid(D: float) -> Tensor:
    return grid(SIGMA_MAX * root(D), SIGMA_MIN * root(D), STEPS, rho=7)


@pytest.mark.parametrize("D", [1, 128, math.inf])
def test_edm_step_by_step(D):
    expected = torch.stack(edm(prior(), D))
    found = sample(field(D), prior(), times=published_grid(D), keep_path=True)
    assert found.nfe == 2 * STEPS - 1 == 35
    assert (found.path - expected).abs().max() <= 1e-12
    op = sample(
        lambda x, t: poisson_field(x, t, X0, D=D),
        prior(),
        times=published_grid(D),
        keep_path=True,
    )
    assert (op.path - expected).abs().max() <= 1e-12
    single = sample(
        lambda x, t: poisson_field(x, t, X0.float(), D=D),
        prior().float(),
        times=published_grid(D),
        keep_path=True,
    )
    # Each state relative to its own size, which falls from 80 to that of the data.
    assert ((single.path - expected).norm(dim=2) / expected.norm(dim=2)).max() <= 1e-6


@pytest.mark.parametrize("D", [1, 128, math.inf])
def test_edm_with_churn_step_by_step(D):
    churn = Churn(40, 0.05, 50, 1.003, D=D)
    source = torch.Generator().manual_seed(3)
    draw = iter(lambda: torch.randn(COUNT, 5, dtype=torch.float64, generator=source), None)
    expected = torch.stack(edm(prior(), D, churn, draw))
    generator = torch.Generator().manual_seed(3)
    options = {"times": published_grid(D), "churn": churn, "keep_path": True}
    found = sample(field(D), prior(), generator=generator, **options)
    assert found.nfe == 35
    assert (found.path - expected).abs().max() <= 1e-12
    plain = sample(field(D), prior(), times=published_grid(D), keep_path=True)
    # 80 and 57.6 lie above S_max, so that the noise begins with the third step.
    assert torch.equal(found.path[:3], plain.path[:3])
    assert (found.path[3] - plain.path[3]).abs().max() > 1


@pytest.mark.parametrize("D", [1, 128, math.inf])
@pytest.mark.parametrize("final_step", [True, False])
@pytest.mark.parametrize("S_churn", [0.8, 1e3])
def test_the_variance_of_the_noise(D, final_step, S_churn):
    """Through a field whose slope is 0, the noise of all steps is all that there is."""
    count = 4096
    times = [4.0, 3.0, 2.5, 2.0]
    churn = Churn(S_churn, 0.4, 3.5, 1.5, D=D)
    result = sample(
        lambda x, t: torch.cat([0 * x, -t[:, None]], 1),
        torch.zeros(count, 4, dtype=torch.float64),
        times=[t * root(D) for t in times],
        churn=churn,
        final_step=final_step,
        generator=torch.Generator().manual_seed(0),
    ).x
    gamma = min(S_churn / (3 + final_step), math.sqrt(2) - 1)
    expected = 1.5**2 * sum(
        ((1 + gamma) ** 2 - 1) * sigma**2 for sigma in (3.0, 2.5, 2.0)[: 2 + final_step]
    )
    # The mean of n squares of normal numbers has a relative standard deviation of √(2/n).
    assert abs(result.square().mean() / expected - 1) < 4 * math.sqrt(2 / (4 * count))
    assert abs(result.mean()) < 4 * math.sqrt(expected / (4 * count))


def test_no_churn_is_the_ode():
    options = {"times": published_grid(1)}
    plain = sample(field(1), prior(), **options).x
    assert torch.equal(sample(field(1), prior(), churn=Churn(0), **options).x, plain)
    assert torch.equal(sample(field(1), prior(), churn=Churn(9, 100), **options).x, plain)
    noisy = sample(field(1), prior(), churn=Churn(9), **options).x
    assert not torch.equal(noisy, plain)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_noise_of_a_sample_is_its_seeds(solver):
    """The same in any batch and any place, whatever the others'."""

    def elementwise(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([x.tanh() - x, -t[:, None]], 1)

    x = torch.randn(64, 3, 4, generator=torch.Generator().manual_seed(5))
    flat = lambda x, t: elementwise(x.flatten(1), t)  # noqa: E731
    options = {"T": 10.0, "steps": 8, "solver": solver, "churn": Churn(20)}
    seeds = list(range(100, 164))
    whole = sample(flat, x, seeds=seeds, **options).x
    parts = [
        sample(flat, x[i : i + 7], seeds=torch.tensor(seeds[i : i + 7]), **options).x
        for i in range(0, 64, 7)
    ]
    assert torch.equal(torch.cat(parts), whole)
    single = [sample(flat, x[i : i + 1], seeds=[seeds[i]], **options).x for i in range(0, 64, 9)]
    assert torch.equal(torch.cat(single), whole[::9])
    other = sample(flat, x[:1], seeds=[1], **options).x
    assert not torch.equal(other, whole[:1])
    double = sample(flat, x.double(), seeds=seeds, **options).x
    torch.testing.assert_close(double.float(), whole, rtol=1e-3, atol=1e-3)  # the same noise


@pytest.mark.parametrize("d", [2, 64])
def test_an_image_by_its_seed(d):
    """Under the exact field, bit for bit, with noise on the way."""
    x0 = digits() if d == 64 else X0[:, :2].float()

    def exact(x: Tensor, t: Tensor) -> Tensor:
        # Beyond d = 24 last bits of float32 queries depend on the others.
        return poisson_field(x if d == 2 else x.double(), t, x0)

    x = sample_prior(64, d, T=40.0, max_radius=4000, generator=torch.Generator().manual_seed(6))
    options = {"T": 40.0, "t_min": 1e-2, "solver": "heun", "steps": 12, "churn": Churn(10)}
    whole = sample(exact, x, seeds=range(64), **options).x
    for size in (7, 1):
        parts = [
            sample(exact, x[i : i + size], seeds=range(i, min(i + size, 64)), **options).x
            for i in range(0, 64, size)
        ]
        assert torch.equal(torch.cat(parts), whole)
    assert (whole[:, None] - x0).norm(dim=2).amin(1).median() < 0.1  # they came to the data


def test_the_noise_is_not_that_of_the_prior():
    """Which has the same seeds: x_T = T z, and the noise would be z again."""
    empty = torch.empty(1000, dtype=torch.float64)
    z = torch.stack([empty.clone().normal_(generator=g) for g in generators(range(6))])
    moved = sample(
        lambda x, t: torch.cat([0 * x, -t[:, None]], 1),
        torch.zeros(6, 1000, dtype=torch.float64),
        times=[1.0, 0.1],
        churn=Churn(1),
        seeds=range(6),
        final_step=False,
    ).x
    correlation = np.corrcoef(torch.cat([z, moved]).numpy())
    # Of 1,000 independent numbers: 0 ± 0.03.
    assert np.abs(correlation - np.eye(12)).max() < 0.15


def test_a_generator_is_used():
    options = {"T": 10.0, "churn": Churn(20), "steps": 5}
    first, again, other = (
        sample(field(1), prior(), generator=torch.Generator().manual_seed(s), **options).x
        for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(9)
    free = sample(field(1), prior(), **options).x
    torch.manual_seed(9)
    assert torch.equal(sample(field(1), prior(), **options).x, free)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Churn(-1), ValueError, "S_churn expects a finite number ≥ 0, got -1"),
        (lambda: Churn(1, -1), ValueError, "S_min expects a finite number ≥ 0, got -1"),
        (lambda: Churn(1, 2, 1), ValueError, "S_max expects a number ≥ S_min = 2.0, got 1.0"),
        (lambda: Churn(1, S_noise=math.inf), ValueError, "S_noise expects a finite number ≥ 0"),
        (lambda: Churn(1, D=0), ValueError, "D expects a number > 0, got 0"),
        (lambda: Churn("1"), TypeError, "S_churn expects a real number, got str"),
    ],
)
def test_churn_checks_its_constants(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"churn": 40}, TypeError, "churn expects a Churn or None, got int"),
        ({"churn": Churn(1), "rtol": 1e-3}, ValueError, "churn expects a solver with a grid"),
        ({"seeds": 5}, TypeError, "seeds expects a sequence of integers, got int"),
        ({"seeds": [1, 2]}, ValueError, "seeds expects one a sample, 6, got 2"),
        ({"seeds": [0.5] * 6}, TypeError, "seeds expects an integer, got float"),
        ({"seeds": [-1] * 6}, ValueError, "seeds expects an integer ≥ 0, got -1"),
        (
            {"seeds": range(6), "generator": torch.Generator()},
            ValueError,
            "expected a generator or seeds, got both",
        ),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        sample(field(1), prior(), T=10.0, **options)
