# SPDX-License-Identifier: Apache-2.0
"""Does each option of `sample` and `encode` reach the solver?"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pfgm_kernels.flow import Substitution, encode, sample

GAMMA = 5.0


def bent(x: Tensor, t: Tensor) -> Tensor:
    """A field whose lines are smooth and not straight, dx/dt = x/t + t cos x, as large as the
    target of a loss with that gamma.
    """
    t = t[:, None]
    row = torch.cat([-(x + t * t * x.cos()), -t], 1)
    return math.sqrt(2) * row / (row.norm(dim=1, keepdim=True) + GAMMA)


X = torch.linspace(-2, 2, 6, dtype=torch.float64).view(3, 2)
WAYS = [(sample, {"final_step": False}), (encode, {})]


@pytest.mark.parametrize(("integrate", "options"), WAYS, ids=["sample", "encode"])
def test_tolerances(integrate, options):
    """An error may be atol + rtol |x|; atol is rtol's number where it is not given."""
    options = options | {"T": 2.0, "t_min": 0.5}

    def nfe(**tolerances: float) -> int:
        return integrate(bent, X, solver="rk45", **tolerances, **options).nfe

    loose, tight = nfe(rtol=1e-2, atol=1e-2), nfe(rtol=1e-9, atol=1e-9)
    assert tight > 3 * loose
    assert (nfe(rtol=1e-2), nfe(rtol=1e-9)) == (loose, tight)
    assert nfe(rtol=1e-2, atol=1e-9) < tight / 2
    assert nfe(rtol=1e-9, atol=1e-2) < tight / 2


@pytest.mark.parametrize(("integrate", "options"), WAYS, ids=["sample", "encode"])
@pytest.mark.parametrize(("solver", "nfe"), [("euler", 7), ("heun", 14), ("heun_euler", 13)])
def test_steps(integrate, options, solver, nfe):
    fractions: list[float] = []
    result = integrate(
        bent, X, T=2.0, t_min=0.5, solver=solver, steps=7, progress=fractions.append, **options
    )
    assert result.nfe == nfe
    assert result.path is None
    assert fractions == pytest.approx([i / 7 for i in range(8)])  # even in log t


@pytest.mark.parametrize(("integrate", "options"), WAYS, ids=["sample", "encode"])
@pytest.mark.parametrize("solver", ["euler", "heun", "rk45"])
def test_the_substitution(integrate, options, solver):
    """It takes the place of a component that is NaN below its t."""
    asked = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t[0].item())
        values = bent(x, t)
        values[:, -1] = torch.where(t < 1, math.nan, values[:, -1])
        return values

    options = options | {"T": 2.0, "t_min": 0.5, "solver": solver, "steps": 5}
    with pytest.raises(FloatingPointError, match="the field is NaN"):
        integrate(field, X, **options)
    cured = integrate(field, X, substitution=Substitution(GAMMA, below=1.0), **options).x
    torch.testing.assert_close(cured, integrate(bent, X, **options).x, rtol=1e-9, atol=1e-9)
    assert min(asked) < 1 < max(asked)


def test_the_bound_of_the_substitution_grows_with_x():
    """Where a network overshoots, R is the distance of the furthest corner of [-1, 1]^d."""
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    field_x = torch.full_like(x, 9.0)
    found = Substitution(0.5, below=2.0).t_component(x, 1.5, field_x)
    furthest = [math.hypot(norm + math.sqrt(2), 1.5) for norm in (5.0, 0.0)]
    assert found.tolist() == pytest.approx([-math.sqrt(2) * 1.5 / (r + 0.5) for r in furthest])


def test_rk45_is_of_fifth_order():
    """Dormand and Prince's: its evaluations grow with the fifth root of the tolerance."""
    options = {"T": 2.0, "t_min": 0.5, "solver": "rk45", "final_step": False}
    few, many = (sample(bent, X, rtol=rtol, **options).nfe for rtol in (1e-6, 1e-11))
    assert 7 < many / few < 13  # 10 for the fifth, 46 for the third


def test_the_error_of_a_sample_is_a_mean_over_its_event():
    """So that a larger event of the same numbers is no harder."""
    options = {"T": 2.0, "t_min": 0.5, "solver": "rk45", "rtol": 1e-6}
    assert sample(bent, X.repeat(1, 100), **options).nfe == sample(bent, X, **options).nfe


def test_the_last_step_ends_at_the_end():
    """It is not one beyond the end, from which the state would be interpolated."""
    asked = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        asked.append((t[0].item(), x))
        return bent(x, t)

    result = sample(field, X, T=2.0, t_min=0.5, solver="rk45", final_step=False)
    assert asked[-1][0] == pytest.approx(0.5, rel=1e-12)
    torch.testing.assert_close(asked[-1][1], result.x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", ["euler", "heun", "rk45"])
def test_a_field_of_another_dtype(dtype, solver):
    other = torch.float64 if dtype == torch.float32 else torch.float32
    options = {"T": 2.0, "t_min": 0.5, "solver": solver, "steps": 3}
    result = sample(lambda x, t: bent(x, t).to(other), X.to(dtype), **options)
    assert result.x.dtype == dtype
    torch.testing.assert_close(
        result.x, sample(bent, X.to(dtype), **options).x, rtol=1e-4, atol=1e-4
    )


def test_steps_that_are_none_end_with_a_sentence():
    """Where a tolerance asks for steps smaller than the time's rounding, long before the count."""
    noise = torch.rand(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    calls = itertools.count()

    def rough(x: Tensor, t: Tensor) -> Tensor:
        size = torch.where(t < 1, 1e6, 0)[:, None]
        return torch.cat([size * noise[next(calls) % 1000], -t[:, None]], 1)

    with pytest.raises(RuntimeError, match=r"does not get forward at t = 1, after \d{2} steps"):
        sample(rough, X, T=2.0, t_min=0.5, rtol=1e-14, solver="rk45")
