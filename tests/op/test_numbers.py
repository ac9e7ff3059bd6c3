# SPDX-License-Identifier: Apache-2.0
"""Is a number a number, of whatever kind, and does none that changes compile a function anew?"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from pfgm_kernels import (
    ReferenceSet,
    divergence,
    log_density,
    poisson_displacement,
    poisson_field,
    posterior_mean,
)
from pfgm_kernels.flow import (
    Churn,
    FieldLoss,
    PosteriorMeanLoss,
    Preconditioned,
    Substitution,
    UnnormalizedLoss,
    bits_per_dim,
    grid,
    heights,
    interpolate,
    log_likelihood,
    log_prior,
    perturb,
    perturb_at,
    sample,
    sample_prior,
    two_plate_field,
)

X = torch.linspace(-1, 2, 12).view(4, 3)
X0 = torch.linspace(1, -1, 27).view(9, 3)
PIXELS = torch.arange(27, dtype=torch.uint8).view(9, 3)
SET = ReferenceSet(X0)

KINDS: dict[str, Callable[[float], object]] = {
    "np.float32": np.float32,
    "np.float16": np.float16,
    "np.longdouble": np.longdouble,
    "np.int64": np.int64,
    "np.uint8": np.uint8,
    "Fraction": Fraction,
    "array": np.array,
    "tensor": torch.tensor,
    "bfloat16": lambda value: torch.tensor(value, dtype=torch.bfloat16),
    "int16": lambda value: torch.tensor(int(value), dtype=torch.int16),
}
INTEGERS = {name: KINDS[name] for name in ("np.int64", "np.uint8", "array", "tensor", "int16")}
NONE_OF_THEM = {
    "True": True,
    "np.bool": np.bool_(True),
    "array of bool": np.array(True),
    "tensor of bool": torch.tensor(True),
    "string": "2",
    "None": None,
    "complex": 2 + 0j,
    "np.complex": np.complex64(2),
    "tensor of complex": torch.tensor(2 + 0j),
    "Decimal": Decimal(2),
    "list": [2.0],
    "array of one": np.ones(1),
    "tensor of one": torch.ones(1),
}


def generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(1)


def network(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([x, t[:, None]], 1)


def loss_of(make: Callable[..., Callable], **options) -> Tensor:
    return make(**options)(network, X0, generator())


# Every place where a function takes a number; each gives a tensor that depends on it.
NUMBERS: dict[str, Callable[..., Tensor]] = {
    "t": lambda n: poisson_field(X, n, X0),
    "D": lambda n: poisson_field(X, 1.0, X0, D=n),
    "displacement": lambda n: poisson_displacement(X, n, SET, D=n)[1],
    "mean": lambda n: posterior_mean(X, n, SET, D=n),
    "density": lambda n: log_density(X, n, SET, D=n),
    "divergence": lambda n: divergence(X, n, SET, D=n),
    "L": lambda n: two_plate_field(X, 0.5, SET, SET, L=n),
    "gamma": lambda n: poisson_field(X, 1.0, SET, gamma=n),
    "scale": lambda n: poisson_field(X, 1.0, X0, scale=n),
    "low": lambda n: ReferenceSet.from_images(PIXELS, n, 9).table,
    "high": lambda n: ReferenceSet.from_images(PIXELS, high=n).table,
    "sigma": lambda n: perturb(X0, sigma=n, generator=generator())[0],
    "tau": lambda n: perturb(X0, tau=n, M=3, generator=generator())[0],
    "M": lambda n: perturb(X0, M=n, generator=generator())[0],
    "perturb's D": lambda n: perturb(X0, D=n, generator=generator())[1],
    "perturb_at": lambda n: perturb_at(X0, n, D=2, generator=generator()),
    "perturb_at's D": lambda n: perturb_at(X0, 2.0, D=n, generator=generator()),
    "heights": lambda n: heights(3, D=n, mean=n, std=n, generator=generator()),
    "denoiser": lambda n: Preconditioned(lambda x, c: x, D=n, sigma_data=n)(X, 2.0),
    "denoiser's loss": lambda n: loss_of(
        lambda **o: lambda network, *a: PosteriorMeanLoss(SET, **o)(lambda x, t: x, *a),
        D=n, sigma_data=n, mean=n, std=n,
    ),
    "T": lambda n: sample_prior(4, 3, T=n, generator=generator()),
    "prior's D": lambda n: sample_prior(4, 3, T=1, D=n, generator=generator()),
    "max_radius": lambda n: sample_prior(4, 3, T=9, max_radius=n, generator=generator()),
    "log_prior": lambda n: log_prior(X, T=n, D=n),
    "loss": lambda n: loss_of(lambda **o: FieldLoss(SET, **o), gamma=n, scale=n, M=n),
    "loss's noise": lambda n: loss_of(lambda **o: FieldLoss(SET, **o), D=n, sigma=n, M=1),
    "eq. 10": lambda n: loss_of(UnnormalizedLoss, sigma=n, D=n, M=n, tau=n),
    "sample": lambda n: sample(network, X, T=8, t_min=n, steps=1, solver="euler").x,
    "sample's T": lambda n: sample(network, X, T=n, steps=1, solver="euler").x,
    "grid": lambda n: grid(n, 1.0, 3, rho=n),
    "times": lambda n: sample(network, X, times=[n, 1], solver="euler").x,
    "churn": lambda n: sample(
        network, X, T=8, steps=2, churn=Churn(n, 0, n, n, n), generator=generator()
    ).x,
    "likelihood's T": lambda n: log_likelihood(
        network, X, T=n, D=n, steps=2, generator=generator()
    ).log_p,
    "bits": lambda n: bits_per_dim(X, 2, -1, n),
    "substitution": lambda n: sample(
        network, X, T=8, steps=2, solver="euler", substitution=Substitution(n, n)
    ).x,
}  # fmt: skip
COUNTS: dict[str, Callable[..., object]] = {
    "heights' count": lambda n: heights(n, D=1).shape,
    "count": lambda n: sample_prior(n, 3, T=1).shape,
    "event": lambda n: sample_prior(3, n, T=1).shape,
    "axis": lambda n: sample_prior(3, [n, n], T=1).shape,
    "points": lambda n: len(grid(3.0, 1.0, n)),
    "latents": lambda n: len(interpolate(X[0], X[1], n)),
    "probes": lambda n: log_likelihood(network, X, T=2, steps=2, probes=n).nfe,
    "d": lambda n: bits_per_dim(X, n, -1, 1).sum(),
    "steps": lambda n: sample(network, X, T=8, steps=n, solver="heun").nfe,
}


PLACES = NUMBERS | COUNTS | {"workspace": lambda n: ReferenceSet(X0, workspace=n)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", NUMBERS)
def test_a_number_of_any_kind(place, kind):
    torch.testing.assert_close(NUMBERS[place](KINDS[kind](2)), NUMBERS[place](2.0), rtol=0, atol=0)


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("place", COUNTS)
def test_an_integer_of_any_kind(place, kind):
    assert COUNTS[place](INTEGERS[kind](2)) == COUNTS[place](2)


@pytest.mark.parametrize("kind", [np.int64, np.array, torch.tensor])
def test_a_workspace_of_any_kind(kind):
    assert ReferenceSet(X0, workspace=kind(2 << 20)).workspace == 2 << 20
    with pytest.raises(ValueError, match="workspace expects an integer ≥ 1048576, got 2"):
        ReferenceSet(X0, workspace=kind(2))


@pytest.mark.parametrize("value", NONE_OF_THEM)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_number(place, value):
    if value == "None" and place in ("max_radius", "loss", "sample", "workspace"):
        pytest.skip("None means something there")
    if place in ("t", "T", "perturb_at") and value == "tensor of one":
        pytest.skip("one height for each sample may be given")
    function = PLACES[place]
    with pytest.raises(TypeError, match=r"expects (an integer|a real number|real numbers), got"):
        function(NONE_OF_THEM[value])


@pytest.mark.parametrize("place", ["D", "gamma", "scale", "T", "sigma"])
def test_a_constant_is_not_differentiated_silently(place):
    with pytest.raises(ValueError, match=f"{place} is constant .* requires grad"):
        NUMBERS[place](torch.tensor(2.0, requires_grad=True))
    with pytest.raises(ValueError, match=f"{place} expects a number that a float can hold"):
        NUMBERS[place](10**400)
    with pytest.raises(ValueError, match=f"{place} expects .*NaN"):
        NUMBERS[place](np.float32(math.nan))


def everything(n: float, references: Tensor | ReferenceSet = X0) -> Tensor:
    return poisson_field(X, 0.5 * n, references, D=n, gamma=n, scale=n)


COMPILED: dict[str, Callable[..., Tensor]] = {
    "field": everything,
    "of a set": lambda n: everything(n, SET),
    "t": lambda n: poisson_displacement(X, n, SET)[1],
    "mean": lambda n: posterior_mean(X, n, X0, D=n),
    "density": lambda n: log_density(X, n, X0, D=n),
    "divergence": lambda n: divergence(X, n, SET, D=n),
    "two plates": lambda n: two_plate_field(X, 0.5 * n, X0, X0, L=n, D=n),
    "perturb": lambda n: perturb(X0, sigma=n, tau=n, M=n, D=n)[0],
    "perturb_at": lambda n: perturb_at(X0, n, D=n),
    "heights": lambda n: heights(4, D=n, mean=n, std=n),
    "denoiser": lambda n: Preconditioned(lambda x, c: x, D=2)(X, n),
    "prior": lambda n: sample_prior(4, 3, T=n, D=n, max_radius=n),
    "log_prior": lambda n: log_prior(X, T=n, D=n),
}


RANDOM = ("perturb", "perturb_at", "heights", "prior")


def compilations(function: Callable, values: list, random: bool) -> int:
    """How often a function is compiled for all of the values, its results being right."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(function, fullgraph=True, backend=counter)
    for value in values:
        result = run(value)
        assert result.isfinite().all()
        if not random:
            torch.testing.assert_close(result, function(value))
    return counter.frame_count


@pytest.mark.parametrize("name", COMPILED)
def test_numbers_that_change_compile_once_more_at_most(name):
    values = [0.6 + 0.37 * i for i in range(12)]
    assert compilations(COMPILED[name], values, name in RANDOM) <= 2


@pytest.mark.parametrize("kind", [int, np.float32, np.int64, np.array, torch.tensor])
def test_of_any_kind(kind):
    assert compilations(everything, [kind(2 + i) for i in range(12)], random=False) <= 2


def test_with_gradients():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x: Tensor, n: float) -> Tensor:
        v, log_mass = poisson_displacement(x, 0.5 * n, SET, D=n)
        return v.square().sum() + log_mass.sum()

    run = torch.compile(loss, fullgraph=True, backend=counter)
    x = X.clone().requires_grad_()
    for n in (0.6 + 0.37 * i for i in range(12)):
        found, expected = (torch.autograd.grad(each(x, n), x)[0] for each in (run, loss))
        torch.testing.assert_close(found, expected)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("D", [0.0, 1, math.inf])
def test_the_bounds_of_numbers_hold_in_a_compiled_function(D):
    torch._dynamo.reset()
    run = torch.compile(lambda n, D: poisson_field(X, n, X0, D=D), fullgraph=True, backend="eager")
    for n in (1.5, 2.5, 3.5):
        torch.testing.assert_close(run(n, D), poisson_field(X, n, X0, D=D))
    with pytest.raises(Exception, match=r"t expects|Observed exception"):
        run(math.nan if math.inf != D else 0.0, D)
