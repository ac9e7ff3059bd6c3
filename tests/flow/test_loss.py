# SPDX-License-Identifier: Apache-2.0
"""Are the losses those of Eqs. (10) and (12), value and gradient?"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pfgm_kernels import ReferenceSet, poisson_field
from pfgm_kernels.flow import PRESETS, FieldLoss, UnnormalizedLoss, constants, perturb


class Spy:
    """A linear network that remembers its queries."""

    def __init__(self, d: int, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.randn(d + 1, d + 1, dtype=dtype, generator=generator) / d
        self.weight.requires_grad_()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.x, self.t = x, t
        return torch.cat([x.flatten(1), t[:, None]], 1) @ self.weight


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def normalized_oracle(x, t, x0, D, gamma, scale) -> Tensor:
    """The target of Eq. (12) in float64 by direct differences: −Normalize(E[…])."""
    x, t, x0 = x.flatten(1).double(), t.double(), x0.flatten(1).double()
    vectors = torch.cat([x[:, None] - x0, t[:, None, None].expand(-1, len(x0), 1)], 2)
    if math.isinf(D):
        logits = -(x[:, None] - x0).square().sum(2) / (2 * t[:, None] ** 2)
    else:
        logits = -(x.shape[1] + D) / 2 * vectors.square().sum(2).log()
    mean = (logits.softmax(1)[:, :, None] * vectors).sum(1)
    return -scale * mean / (mean.norm(dim=1, keepdim=True) + gamma)


@pytest.mark.parametrize(
    ("event", "options"),
    [
        ((2,), {}),
        ((3, 4, 4), {}),
        ((3, 4, 4), {"D": 2.5, "gamma": 0.0, "scale": 3.0, "M": 100, "restrict_M": False}),
        ((1,), {"gamma": 0.5, "sigma": 0.1, "tau": 0.01}),
        ((5,), {"D": math.inf, "gamma": 1.0}),
    ],
)
def test_field_loss_is_eq_12(event, options):
    x0 = torch.randn(40, *event, dtype=torch.float64, generator=seeded())
    loss_fn, network = FieldLoss(x0, **options), Spy(math.prod(event))
    loss = loss_fn(network, x0[:16], seeded())
    loss.backward()

    d = math.prod(event)
    target = normalized_oracle(
        network.x, network.t, x0, loss_fn.D, loss_fn.gamma, options.get("scale", math.sqrt(d))
    )
    weight = network.weight.detach().clone().requires_grad_()
    inputs = torch.cat([network.x.flatten(1), network.t[:, None]], 1)
    expected = ((inputs @ weight - target) ** 2).sum() / (16 * (d + 1))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(network.weight.grad, weight.grad, rtol=1e-8, atol=1e-10)


OPTIONS = [{"D": 3}, {"sigma": 0.2}, {"tau": 0.01}, {"M": 37}, {"restrict_M": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("kind", [FieldLoss, UnnormalizedLoss])
def test_queries_are_those_of_perturb(kind, options):
    """Each option reaches them, and each changes them."""
    x0 = torch.randn(40, 3, dtype=torch.float64, generator=seeded())
    options = {"M": 291} | options
    loss_fn = FieldLoss(x0, **options) if kind is FieldLoss else UnnormalizedLoss(**options)
    network = Spy(3)
    loss_fn(network, x0, seeded())
    x, t = perturb(x0, generator=seeded(), **options)
    assert torch.equal(network.x, x)
    assert torch.equal(network.t, t)
    assert not torch.equal(x, perturb(x0, generator=seeded())[0])


def test_defaults_are_those_of_the_data():
    x0 = torch.randn(30, 2, 8, generator=seeded())
    loss_fn, rule = FieldLoss(x0), constants(x0)
    assert (loss_fn.D, loss_fn.gamma, loss_fn.scale) == (1, rule.gamma, 4.0)
    assert loss_fn.perturb.keywords == {"D": 1, **rule.noise}
    other = FieldLoss(x0, sigma=0.1, tau=0.01, M=3.5)
    assert other.perturb.keywords["M"] == 3.5
    assert FieldLoss(x0, sigma=0.1, gamma=2).perturb.keywords["M"] == constants(x0, sigma=0.1).M
    assert FieldLoss(x0, gamma=0, M=3).gamma == 0


def test_defaults_without_data_are_those_of_cifar10():
    assert UnnormalizedLoss().perturb.keywords == {"D": 1, **PRESETS["cifar10"].noise}


def test_the_whole_reference_counts_not_the_batch():
    x0 = torch.randn(30, 2, generator=seeded())
    network = Spy(2, torch.float32)
    noise = {"sigma": 1.0, "M": 20}  # so wide that every query sees all the references
    whole = FieldLoss(x0, **noise)(network, x0[:5], seeded())
    part = FieldLoss(x0[:5], **noise)(network, x0[:5], seeded())
    assert (whole - part).abs() > 0.01 * whole


def test_a_reference_set_is_a_tensor_of_references():
    x0 = torch.randn(30, 2, 3, generator=seeded())
    network = Spy(6, torch.float32)
    expected = FieldLoss(x0)(network, x0[:8], seeded())
    assert torch.equal(FieldLoss(ReferenceSet(x0))(network, x0[:8], seeded()), expected)


def test_the_field_itself_has_no_loss():
    x0 = torch.randn(30, 6, generator=seeded())
    loss_fn = FieldLoss(x0)

    def field(x: Tensor, t: Tensor) -> Tensor:
        return poisson_field(x, t, x0, gamma=loss_fn.gamma, scale=loss_fn.scale)

    assert loss_fn(field, x0, seeded()) == 0


def test_a_generator_makes_the_loss_repeatable():
    x0 = torch.randn(30, 6, dtype=torch.float64, generator=seeded())
    loss_fn, network = FieldLoss(x0), Spy(6)
    assert loss_fn(network, x0, seeded()) == loss_fn(network, x0, seeded())
    assert loss_fn(network, x0) != loss_fn(network, x0)


@pytest.mark.parametrize(("event", "D"), [((2,), 1), ((2, 2), 1), ((3,), 2.5)])
def test_unnormalized_loss_is_eq_10(event, D):
    x0 = torch.randn(16, *event, dtype=torch.float64, generator=seeded())
    network = Spy(math.prod(event))
    # sigma = 1 keeps the targets of order 1, so that a wrong one cannot hide behind a large one.
    loss = UnnormalizedLoss(D=D, sigma=1.0, M=50)(network, x0, seeded())
    difference = network.x.flatten(1) - x0.flatten(1)
    squared = difference.square().sum(1) + network.t.square()
    vectors = torch.cat([difference, network.t[:, None]], 1)
    target = vectors / squared[:, None] ** ((difference.shape[1] + D) / 2)
    assert 1e-3 < target.norm(dim=1).median() < 10
    expected = (network(network.x, network.t) + target).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_eq_10_is_formed_in_float64():
    """The power k of a distance in float32 would multiply its rounding by k = 21."""
    x0 = 3 * torch.randn(200, 20, generator=seeded())
    found = {}

    def network(x: Tensor, t: Tensor) -> Tensor:
        found.update(x=x, t=t, output=torch.zeros(len(x), 21, requires_grad=True))
        return found["output"]

    loss = UnnormalizedLoss(sigma=0.3, M=20)(network, x0, seeded())
    assert loss.dtype == torch.float32
    loss.backward()
    target = -found["output"].grad.double() * (200 * 21 / 2)
    vectors = torch.cat([found["x"].double() - x0.double(), found["t"].double()[:, None]], 1)
    expected = -vectors * vectors.square().sum(1, keepdim=True) ** (-21 / 2)
    assert ((target - expected).abs() <= 3e-7 * expected.abs()).all()


def test_a_network_of_another_shape_is_named():
    x0 = torch.ones(4, 3)
    for loss_fn in (FieldLoss(x0), UnnormalizedLoss()):
        with pytest.raises(ValueError, match=r"\(B, d \+ 1\) = \(4, 4\), got \(4, 3\)"):
            loss_fn(lambda x, t: x, x0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gamma": -1}, ValueError, "gamma expects a finite number ≥ 0, got -1"),
        ({"scale": 0}, ValueError, "scale expects a finite number > 0, got 0"),
        ({"D": 0}, ValueError, "D expects a number > 0, got 0"),
        ({"sigma": None}, TypeError, "sigma expects a real number, got NoneType"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        FieldLoss(torch.ones(3, 2), **options)


def test_eq_10_needs_a_finite_d():
    with pytest.raises(ValueError, match="D expects a finite number > 0, got inf"):
        UnnormalizedLoss(D=math.inf)
