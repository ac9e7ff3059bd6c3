# SPDX-License-Identifier: Apache-2.0
"""Do denoisers and fields turn into one another, and is the preconditioning that of EDM?"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from pfgm_kernels import poisson_displacement, poisson_field, posterior_mean
from pfgm_kernels.flow import (
    Preconditioned,
    Substitution,
    as_denoiser,
    as_field,
    field_of_pfgm,
    sample,
    sample_prior,
)

EVENT = (2, 3)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def queries(count: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x (count, 2, 3), t (count,) from 0.005 to 50, and references (20, 2, 3)."""
    generator = seeded()
    x0 = torch.randn(20, *EVENT, dtype=torch.float64, generator=generator)
    t = torch.logspace(math.log10(0.005), math.log10(50), count, dtype=torch.float64)
    noise = torch.randn(count, *EVENT, dtype=torch.float64, generator=generator)
    x = x0[:count] + t[:, None, None] * noise
    return x.to(dtype), t.to(dtype), x0.to(dtype)


class Spy(nn.Module):
    """A network that remembers what it was called with."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, dtype=dtype)
        nn.init.normal_(self.linear.weight, generator=seeded())
        nn.init.normal_(self.linear.bias, generator=seeded(4))

    def forward(self, *arguments: Tensor) -> Tensor:
        self.arguments = arguments
        x, condition = arguments[:2]
        return (self.linear(x.flatten(1)) * (1 + condition[:, None])).view(x.shape)


@pytest.mark.parametrize("sigma_data", [0.5, 1.7])
@pytest.mark.parametrize("D", [1, 2.5, 128, math.inf])
def test_preconditioning_is_that_of_edm(D, sigma_data):
    (x, t, _), network = queries(), Spy()
    found = Preconditioned(network, D=D, sigma_data=sigma_data)(x, t)
    for i in range(len(x)):
        sigma = t[i].item() / (1 if math.isinf(D) else math.sqrt(D))
        total = math.sqrt(sigma**2 + sigma_data**2)
        into, condition = network.arguments
        torch.testing.assert_close(into[i], x[i] / total, rtol=1e-13, atol=0)
        assert condition[i].item() == pytest.approx(math.log(sigma) / 4, rel=1e-13)
        output = network(x[i : i + 1] / total, condition[i : i + 1])[0]
        network.arguments = (into, condition)
        expected = sigma_data**2 / total**2 * x[i] + sigma * sigma_data / total * output
        torch.testing.assert_close(found[i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("D", [1, 2048, math.inf])
def test_the_coefficients_hold_in_float32(D):
    """To 1e-6 of those in float64, the differences near the data and far from it included."""
    network = Spy()
    x, t, _ = queries(count=19)
    t = t * (1 if math.isinf(D) else math.sqrt(D))
    expected = Preconditioned(network, D=D)(x.float().double(), t.float().double())
    found = Preconditioned(network.float(), D=D)(x.float(), t.float())
    assert found.dtype == torch.float32
    error = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < 1e-6


def test_labels_are_the_third_argument_where_given():
    (x, t, _), network = queries(), Spy()
    denoiser, labels = Preconditioned(network, D=2), torch.arange(7)
    denoiser(x, t)
    assert len(network.arguments) == 2
    for call in (
        lambda: denoiser(x, t, labels),
        lambda: denoiser(x, t, labels=labels),
        lambda: as_field(denoiser)(x, t, labels=labels),
        lambda: as_denoiser(as_field(denoiser))(x, t, labels=labels),
    ):
        network.arguments = ()
        call()
        assert network.arguments[2] is labels


def test_a_height_may_be_a_number():
    x, _, _ = queries()
    denoiser = Preconditioned(Spy(), D=2)
    each = torch.full((7,), 0.3, dtype=torch.float64)
    for way in (denoiser, as_field(denoiser), as_denoiser(as_field(denoiser))):
        expected = way(x, each)
        assert torch.equal(way(x, 0.3), expected)
        assert torch.equal(way(x, torch.tensor(0.3, dtype=torch.float64)), expected)


def test_autocast_gives_float32():
    x, t, _ = queries(dtype=torch.float32)
    network = Spy(torch.float32)
    seen = []
    network.linear.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    denoiser = Preconditioned(network, D=2)
    exact = denoiser(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        found = denoiser(x, t)
        field = as_field(lambda x, t: denoiser(x, t).bfloat16())(x, t)
    assert seen[:2] == [torch.float32, torch.bfloat16]
    assert found.dtype == field.dtype == torch.float32
    assert torch.equal(field[:, -1], -t)
    assert not torch.equal(found, exact)
    # Of the network's output alone: c_skip x keeps its digits.
    near = t < 0.01
    torch.testing.assert_close(found[near], exact[near], rtol=0, atol=3e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_taken_in_float32(dtype):
    x, t, _ = queries(dtype=torch.float32)
    denoiser = Preconditioned(Spy(torch.float32), D=2)
    x = x.to(dtype)
    assert torch.equal(denoiser(x, t), denoiser(x.float(), t))
    assert torch.equal(as_field(denoiser)(x, t), as_field(denoiser)(x.float(), t))
    zero = as_field(lambda x, t: x)
    assert zero(x, t).dtype == as_denoiser(zero)(x, t).dtype == torch.float32
    assert torch.equal(as_denoiser(lambda x, t: zero(x, t).to(dtype))(x, t.to(dtype)), x.float())


@pytest.mark.parametrize("D", [1, 128, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_field_of_the_posterior_mean_is_the_poisson_field(D, dtype):
    x, t, x0 = queries(dtype=dtype)
    field = as_field(lambda x, t: posterior_mean(x, t, x0, D=D))(x, t)
    assert field.dtype == dtype
    assert torch.equal(field[:, -1], -t)
    v, _ = poisson_displacement(x.double(), t.double(), x0.double(), D=D)
    unit = torch.cat([v.flatten(1), -t.double()[:, None]], 1)
    unit = unit / unit.norm(dim=1, keepdim=True)
    error = (field / field.norm(dim=1, keepdim=True) - unit).norm(dim=1)
    # The mean's rounding is one of eps ‖x‖ in its difference from x, and (v, −t) is ≥ t.
    allowed = torch.finfo(dtype).eps * x.flatten(1).norm(dim=1) / t
    assert (error <= allowed + 8 * torch.finfo(dtype).eps).all()
    expected = poisson_field(x, t, x0, D=D)
    assert ((expected - unit).norm(dim=1) < 1e-5).all()


@pytest.mark.parametrize("options", [{}, {"gamma": 5.0, "scale": math.sqrt(6)}])
@pytest.mark.parametrize("D", [1, 128, math.inf])
def test_the_denoiser_of_a_field_is_the_posterior_mean(D, options):
    """Whatever the field's normalisation."""
    x, t, x0 = queries()
    found = as_denoiser(lambda x, t: poisson_field(x, t, x0, D=D, **options))(x, t)
    torch.testing.assert_close(found, posterior_mean(x, t, x0, D=D), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trips(dtype):
    x, t, _ = queries(dtype=dtype)
    eps = torch.finfo(dtype).eps
    denoiser = Preconditioned(Spy(dtype), D=3)
    there = as_field(denoiser)
    back = as_denoiser(there)(x, t)
    assert back.dtype == dtype
    size = x.abs() + denoiser(x, t).abs()
    assert ((back - denoiser(x, t)).abs() <= 4 * eps * size).all()
    again = as_field(as_denoiser(there))(x, t)
    assert torch.equal(again[:, -1], there(x, t)[:, -1])
    assert ((again - there(x, t))[:, :-1].abs() <= 8 * eps * size.flatten(1)).all()


def test_gradients_pass_through_both_ways():
    x, t, _ = queries(3)
    t = t.clamp(0.1, 2)
    denoiser = Preconditioned(Spy(), D=3)
    way = as_denoiser(as_field(denoiser))
    inputs = x.requires_grad_(), t.requires_grad_()
    assert torch.autograd.gradcheck(way, inputs)
    loss = as_field(denoiser)(x, t).square().sum()
    (gradient,) = torch.autograd.grad(loss, denoiser.network.linear.weight)
    assert gradient.abs().max() > 0


def test_a_denoiser_is_sampled_from_as_the_field_is():
    _, _, x0 = queries()
    x = sample_prior(9, EVENT, T=20, generator=seeded(), dtype=torch.float64)
    found = sample(as_field(lambda x, t: posterior_mean(x, t, x0)), x, T=20, steps=20)
    expected = sample(lambda x, t: poisson_field(x, t, x0), x, T=20, steps=20)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-7, atol=1e-7)


def published_pfgm(x: Tensor, z: Tensor, x0: Tensor, gamma: float = 5.0) -> tuple[Tensor, Tensor]:
    """What a published PFGM network learns: F_x in the shape of x and F_z, of √d E/(‖E‖ + γ)."""
    v, _ = poisson_displacement(x, z, x0)
    norm = (v.flatten(1).square().sum(1) + z * z).sqrt() + gamma
    factor = math.sqrt(x[0].numel()) / norm
    return factor[:, None, None] * v, -factor * z


def test_a_published_pfgm_network_goes_in():
    x, t, x0 = queries()
    field_fn = field_of_pfgm(lambda x, z: published_pfgm(x, z, x0))
    expected = poisson_field(x, t, x0, gamma=5.0, scale=math.sqrt(6))
    torch.testing.assert_close(field_fn(x, t), expected, rtol=1e-12, atol=1e-12)
    mean = as_denoiser(field_fn)(x, t)
    torch.testing.assert_close(mean, posterior_mean(x, t, x0), rtol=1e-9, atol=1e-9)


def test_its_t_component_is_substituted():
    """Where it is off at small t, the samples are those of the exact field."""
    _, _, x0 = queries()
    x0 = x0.clamp(-1, 1)
    x = sample_prior(9, EVENT, T=20, max_radius=100, generator=seeded(), dtype=torch.float64)

    def network(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        field_x, field_z = published_pfgm(x, z, x0)
        return field_x, torch.where(z < 1, 4 * field_z, field_z)

    expected = sample(lambda x, t: poisson_field(x, t, x0), x, T=20, steps=30).x
    options = {"T": 20, "steps": 30}
    wrong = sample(field_of_pfgm(network), x, **options).x
    right = sample(field_of_pfgm(network), x, substitution=Substitution(5.0, 1.0), **options).x
    torch.testing.assert_close(right, expected, rtol=1e-6, atol=1e-6)
    assert (wrong - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: Preconditioned(3, D=1), TypeError, "network expects a function or module, got"),
        (lambda x: Preconditioned(Spy(), D=0), ValueError, "D expects a number > 0, got 0"),
        (
            lambda x: Preconditioned(Spy(), D=1, sigma_data=0),
            ValueError,
            "sigma_data expects a finite number > 0, got 0",
        ),
        (
            lambda x: Preconditioned(lambda x, c: x[:, 0], D=1)(x, 1.0),
            ValueError,
            r"the network's output expects shape \(B, \*event\) = \(7, 2, 3\), got \(7, 3\)",
        ),
        (lambda x: Preconditioned(Spy(), D=1)(x, 0.0), ValueError, "t expects a finite number > 0"),
        (
            lambda x: Preconditioned(Spy(), D=1)(x, torch.ones(6)),
            ValueError,
            r"t expects a number, a 0-dim tensor or shape \(7,\), got \(6,\)",
        ),
        (
            lambda x: Preconditioned(Spy(), D=1)(x.int(), 1.0),
            TypeError,
            "x expects a floating-point tensor of 16, 32 or 64 bits, got",
        ),
        (
            lambda x: as_field(lambda x, t: x.flatten(1))(x, 1.0),
            ValueError,
            r"the denoiser's output expects shape \(B, \*event\) = \(7, 2, 3\), got \(7, 6\)",
        ),
        (
            lambda x: as_denoiser(lambda x, t: x.flatten(1))(x, 1.0),
            ValueError,
            r"the field expects shape \(B, d \+ 1\) = \(7, 7\), got \(7, 6\)",
        ),
        (
            lambda x: as_denoiser(lambda x, t: None)(x, 1.0),
            ValueError,
            "the field expects shape .* got NoneType",
        ),
        (
            lambda x: field_of_pfgm(lambda x, t: x)(x, 1.0),
            TypeError,
            "network expects to return F_x and F_z, got Tensor",
        ),
        (
            lambda x: field_of_pfgm(lambda x, t: (x, x))(x, 1.0),
            ValueError,
            r"the network's F_z expects shape \(B,\) = \(7,\), got \(7, 2, 3\)",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    x, _, _ = queries()
    with pytest.raises(error, match=message):
        call(x)
