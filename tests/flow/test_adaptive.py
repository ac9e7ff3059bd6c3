# SPDX-License-Identifier: Apache-2.0
"""Are steps of rk45 those of Dormand and Prince, of each sample where that is asked for?"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from pfgm_kernels import poisson_field
from pfgm_kernels.flow import encode, sample, sample_prior

X0 = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
X = sample_prior(
    32,
    3,
    T=40,
    max_radius=400,
    generator=torch.Generator().manual_seed(5),
    dtype=torch.float64,
)
INTERVAL = {"T": 40.0, "t_min": 1e-2}


def field(x: Tensor, t: Tensor) -> Tensor:
    return poisson_field(x, t, X0)


@pytest.mark.parametrize(("integrate", "ends"), [(sample, (40.0, 1e-2)), (encode, (1e-2, 40.0))])
@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
def test_each_sample_is_solved_as_scipy_solves_it(integrate, ends, rtol):
    """The same steps, refusals among them, hence the same evaluations and digits."""
    start = X if integrate is sample else X0 + 1e-2 * X[:7] / 40
    options = {"final_step": False} if integrate is sample else {}
    found = integrate(field, start, rtol=rtol, per_sample=True, **INTERVAL, **options)
    sign = math.copysign(1, ends[1] - ends[0])

    def by_log_time(s: float, x: np.ndarray) -> np.ndarray:
        t = ends[0] * math.exp(sign * s)
        row = field(torch.tensor(x)[None], torch.tensor([t], dtype=torch.float64))[0]
        return (sign * t * row[:-1] / row[-1]).numpy()

    span = (0, math.log(40 / 1e-2))
    for i in range(0, len(start), 4):
        peer = solve_ivp(by_log_time, span, start[i].numpy(), method="RK45", rtol=rtol, atol=rtol)
        assert found.evaluations[i] == peer.nfev
        np.testing.assert_allclose(found.x[i].numpy(), peer.y[:, -1], rtol=1e-10, atol=1e-10)
    assert found.evaluations.unique().numel() > 1
    assert found.evaluations.max() == found.nfe


def test_samples_at_the_end_are_not_evaluated_any_more():
    sizes: list[int] = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        assert x.shape[:1] == t.shape
        sizes.append(len(x))
        return field(x, t)

    fractions: list[float] = []
    found = sample(counted, X, rtol=1e-5, per_sample=True, progress=fractions.append, **INTERVAL)
    assert found.nfe == len(sizes)
    assert sum(sizes) == found.evaluations.sum()
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
    assert sizes[-2] < len(X) / 2
    assert sizes[-1] == len(X)  # the final step
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0, 1)
    assert len(fractions) > 10
    assert found.times == [40.0, 0.01, 0.0]
    assert found.path is None


def test_a_sample_does_not_depend_on_its_batch():
    whole = sample(field, X, rtol=1e-5, per_sample=True, **INTERVAL)
    for rows in (slice(0, 7), slice(5, 6), slice(8, 32)):
        part = sample(field, X[rows], rtol=1e-5, per_sample=True, **INTERVAL)
        assert torch.equal(part.x, whole.x[rows])
        assert torch.equal(part.evaluations, whole.evaluations[rows])


def test_one_that_is_hard_does_not_hold_the_others():
    """A stiff sample among easy ones costs itself alone."""
    rate = torch.ones(20, 1, dtype=torch.float64)
    rate[3] = 40.0

    def decay(x: Tensor, t: Tensor, rate: Tensor) -> Tensor:  # dx/dlog t = rate (x − sin log t)
        return torch.cat([-rate * (x - t[:, None].log().sin()), -t[:, None]], 1)

    x = torch.ones(20, 2, dtype=torch.float64)
    options = {"rtol": 1e-6, "T": 8.0, "t_min": 0.5, "final_step": False, "rate": rate}
    shared = sample(decay, x, **options)
    alone = sample(decay, x, per_sample=True, **options)
    assert alone.nfe <= shared.nfe
    easy = torch.arange(20) != 3
    assert alone.evaluations[easy].max() < shared.nfe / 2
    torch.testing.assert_close(alone.x, shared.x, rtol=1e-4, atol=1e-4)
    assert shared.evaluations is None


@pytest.mark.parametrize("integrate", [sample, encode])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "heun"}, "per_sample expects the solver rk45, got 'heun'"),
        ({"keep_path": True}, "keep_path expects steps that samples share, got per_sample=True"),
    ],
)
def test_what_it_does_not_go_with(integrate, options, message):
    with pytest.raises(ValueError, match=message):
        integrate(field, X, per_sample=True, **INTERVAL, **options)
