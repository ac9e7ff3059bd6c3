# SPDX-License-Identifier: Apache-2.0
"""Is a draw by seed the same in any batch, and of the right law; and has each its own height?"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pfgm_kernels.flow import sample_prior
from pfgm_kernels.flow._seeds import generators

SEEDS = [9, 0, 3, 2**32 - 1, *range(100, 160)]


@pytest.mark.parametrize("max_radius", [None, 4.0])
@pytest.mark.parametrize("D", [1, 128, math.inf])
def test_the_batch_does_not_matter(D, max_radius):
    options = {"event_shape": (3, 8, 8), "D": D, "max_radius": max_radius}
    T = torch.linspace(1, 2, 64)
    whole = sample_prior(64, T=T, seeds=SEEDS, **options)
    for size in (1, 7):
        parts = zip(T.split(size), torch.arange(64).split(size), strict=True)
        found = [
            sample_prior(len(each), T=each, seeds=[SEEDS[i] for i in places], **options)
            for each, places in parts
        ]
        assert torch.equal(torch.cat(found), whole)
    before = torch.get_rng_state()
    assert torch.equal(sample_prior(64, T=T, seeds=SEEDS, **options), whole)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(torch.unique(whole.flatten(1), dim=0)) == 64


@pytest.mark.parametrize("D", [1, 8, math.inf])
def test_draws_by_seed_follow_the_prior(D):
    d, T = 6, 3.0
    x = sample_prior(3000, d, T=T, D=D, seeds=range(3000), dtype=torch.float64)
    squared = x.square().sum(1).numpy() / T**2
    law = stats.chi2(d).cdf if math.isinf(D) else stats.f(d, D).cdf
    assert stats.kstest(squared if math.isinf(D) else squared * D / d, law).pvalue > 0.001
    first = (x[:, 0] / x.norm(dim=1)).numpy()
    uniform = stats.beta((d - 1) / 2, (d - 1) / 2)
    assert stats.kstest((first + 1) / 2, uniform.cdf).pvalue > 0.001
    # Neighbouring seeds have nothing in common.
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 5 / math.sqrt(3000)


@pytest.mark.parametrize("seeds", [np.array([3, 4]), torch.tensor([3, 4]), (3, 4), range(3, 5)])
def test_seeds_of_any_kind(seeds):
    found = sample_prior(2, 3, T=1, seeds=seeds)
    assert torch.equal(found, sample_prior(2, 3, T=1, seeds=[3, 4]))


def test_streams_of_a_seed_have_nothing_in_common():
    streams = [
        torch.cat([torch.randn(50, generator=each) for each in generators(range(40), stream)])
        for stream in range(3)
    ]
    correlation = np.corrcoef(torch.stack(streams).numpy())
    assert np.abs(correlation - np.eye(3)).max() < 5 / math.sqrt(2000)
    numbers = [{each.initial_seed() for each in generators(range(1000), s)} for s in range(9)]
    assert len(set().union(*numbers)) == 9000


def test_each_draw_has_its_own_height():
    options = {"event_shape": (2, 3), "D": 2, "max_radius": 40.0}
    T = torch.tensor([0.5, 1, 80, 3], dtype=torch.float64)
    whole = sample_prior(4, T=T, generator=torch.Generator().manual_seed(1), **options)
    for i, height in enumerate(T):
        one = sample_prior(4, T=height, generator=torch.Generator().manual_seed(1), **options)
        assert torch.equal(one[i], whole[i])
        as_number = sample_prior(
            4, T=height.item(), generator=torch.Generator().manual_seed(1), **options
        )
        assert torch.equal(one, as_number)
    assert sample_prior(3, 2, T=torch.ones(3, dtype=torch.int64)).shape == (3, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seeds": [1]}, ValueError, "seeds expects one for each of 2 draws, got 1"),
        ({"seeds": []}, ValueError, "seeds expects one for each of 2 draws, got 0"),
        ({"seeds": [1, -1]}, ValueError, "seeds expects an integer ≥ 0, got -1"),
        ({"seeds": [1, 2**32]}, ValueError, "seeds expects integers ≤ 4294967295, got 4294967296"),
        ({"seeds": [1, 2.0]}, TypeError, "seeds expects an integer, got float"),
        ({"seeds": 7}, TypeError, "seeds expects a sequence of integers, got int"),
        ({"seeds": "12"}, TypeError, "seeds expects a sequence of integers, got str"),
        ({"seeds": torch.ones(2, 1)}, TypeError, "seeds expects a sequence of integers, got Ten"),
        (
            {"seeds": [1, 2], "generator": torch.Generator()},
            ValueError,
            "expects a generator or seeds, got both",
        ),
        ({"T": torch.ones(3)}, ValueError, r"T expects .* or shape \(2,\), got \(3,\)"),
        ({"T": torch.tensor(-1.0)}, ValueError, "T expects a finite number > 0"),
        ({"T": torch.ones(2).bool()}, TypeError, "T expects real numbers, got"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        sample_prior(2, 3, **{"T": 1.0} | options)
