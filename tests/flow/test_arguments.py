# SPDX-License-Identifier: Apache-2.0
"""Do arguments reach the field, and gradients come back through the sampler?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pfgm_kernels import poisson_field
from pfgm_kernels.flow import Churn, Substitution, encode, sample

SOLVERS = ("euler", "heun", "heun_euler", "rk45", "per_sample")
X = torch.linspace(-2, 2, 8, dtype=torch.float64).view(4, 2)
X0 = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def options_of(solver: str) -> dict[str, object]:
    if solver == "per_sample":
        return {"T": 2.0, "t_min": 0.5, "rtol": 1e-6, "per_sample": True}
    return {"T": 2.0, "t_min": 0.5, "solver": solver, "steps": 4}


def guided(x: Tensor, t: Tensor, *, labels: Tensor, strength: float, names: list[str]) -> Tensor:
    """A field that differs by label: that of X0 about a place of its own."""
    assert len(labels) == len(x)
    assert names == ["a", "b", "c", "d"]
    assert strength == 1.5
    return poisson_field(x - strength * labels[:, None], t, X0)


@pytest.mark.parametrize("integrate", [sample, encode])
@pytest.mark.parametrize("solver", SOLVERS)
def test_arguments_reach_the_field(integrate, solver):
    labels = torch.tensor([0, 2, 1, 2])
    more = {"strength": 1.5, "names": ["a", "b", "c", "d"]}
    found = integrate(guided, X, labels=labels, **more, **options_of(solver)).x
    if solver == "rk45":  # its steps are those of all samples together
        return
    for row, label in enumerate(labels):
        expected = integrate(
            lambda x, t, label=label: poisson_field(x - 1.5 * label, t, X0),
            X[row : row + 1],
            **options_of(solver),
        ).x
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("integrate", [sample, encode])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("event", [(2,), (1, 2)])
def test_gradients_through_the_sampler(integrate, solver, event):
    """With respect to x, to an argument and to the references, against differences."""
    torch.manual_seed(0)
    shift = torch.tensor(0.3, dtype=torch.float64)

    def result(x: Tensor, x0: Tensor, shift: Tensor) -> Tensor:
        return integrate(
            lambda x, t, shift: poisson_field(x - shift, t, x0),
            x,
            differentiable=True,
            shift=shift,
            **options_of(solver),
        ).x

    inputs = [X.view(4, *event), X0.view(5, *event), shift]
    inputs = [value.clone().requires_grad_() for value in inputs]
    # Differences of rk45 are those of other steps too, of the size of its tolerance.
    adaptive = solver in ("rk45", "per_sample")
    loose = {"eps": 1e-4, "atol": 1e-3, "rtol": 1e-3} if adaptive else {}
    assert torch.autograd.gradcheck(result, inputs, fast_mode=True, **loose)


@pytest.mark.parametrize("integrate", [sample, encode])
@pytest.mark.parametrize("solver", SOLVERS)
def test_without_being_asked_for_there_are_none(integrate, solver):
    x = X.clone().requires_grad_()
    for x0 in (X0, X0.clone().requires_grad_()):
        found = integrate(lambda x, t, x0=x0: poisson_field(x, t, x0), x, **options_of(solver)).x
        assert not found.requires_grad
    with torch.no_grad():
        options = options_of(solver) | {"differentiable": True}
        assert not integrate(lambda x, t: poisson_field(x, t, X0), x, **options).x.requires_grad


@pytest.mark.parametrize("solver", SOLVERS)
def test_values_are_the_same_with_gradients(solver):
    def field(x: Tensor, t: Tensor) -> Tensor:
        return poisson_field(x, t, X0, gamma=0.5, scale=2**0.5)

    options = options_of(solver) | {"substitution": Substitution(0.5, below=1.0)}
    x = X.clone().requires_grad_()
    found = sample(field, x, differentiable=True, **options).x
    torch.testing.assert_close(found, sample(field, X, **options).x, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).any()


def test_gradients_through_churn():
    """The noise is constant: the gradient is that of the shifted states."""
    x = X.clone().requires_grad_()

    def moved(x: Tensor) -> Tensor:
        options = options_of("heun") | {"churn": Churn(2.0), "seeds": range(4)}
        return sample(lambda x, t: poisson_field(x, t, X0), x, differentiable=True, **options).x

    assert torch.autograd.gradcheck(moved, [x], fast_mode=True)


def test_the_path_has_gradients():
    x = X.clone().requires_grad_()
    found = sample(
        lambda x, t: poisson_field(x, t, X0),
        x,
        differentiable=True,
        keep_path=True,
        **options_of("heun"),
    )
    (gradient,) = torch.autograd.grad(found.path[2].sum(), x)
    assert (gradient != 0).any()


def test_a_network_is_trained_through_the_sampler():
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2).double()

    def field(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([network(torch.cat([x, t[:, None]], 1)), -t[:, None]], 1)

    sample(field, X, differentiable=True, **options_of("heun")).x.square().sum().backward()
    assert network.weight.grad is not None
    assert (network.weight.grad != 0).all()
