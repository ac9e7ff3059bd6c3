# SPDX-License-Identifier: Apache-2.0
"""Is log_likelihood the log density of the flow?"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import integrate
from sklearn.datasets import load_digits
from torch import Tensor

from pfgm_kernels import poisson_field
from pfgm_kernels.flow import bits_per_dim, encode, log_likelihood, log_prior

Ds = [1, 2.5, 128, math.inf]


def data(count: int, d: int) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    x0 = torch.randn(count, d, dtype=torch.float64, generator=generator)
    return x0 - x0.mean(0)  # the prior's centre is the origin


def queries(x0: Tensor, t: float, D: float) -> Tensor:
    """Points about as far from the data as those of the flow at t."""
    generator = torch.Generator().manual_seed(9)
    noise = torch.randn(len(x0), x0.shape[1], dtype=torch.float64, generator=generator)
    return x0 + t / (1 if math.inf == D else math.sqrt(D)) * noise


def squares(x: Tensor, x0: Tensor) -> Tensor:
    return (x[:, None] - x0).square().sum(2)


def log_density(x: Tensor, t: float, x0: Tensor, D: float) -> Tensor:
    """log (1/N) Σ_j p_t(x | x0_j), each normalised over R^d, in float64."""
    d = x0.shape[1]
    if math.inf == D:
        logs = -squares(x, x0) / (2 * t * t) - d / 2 * math.log(2 * math.pi * t * t)
    else:
        logs = -(d + D) / 2 * (squares(x, x0) + t * t).log() + D * math.log(t)
        logs += math.lgamma((d + D) / 2) - math.lgamma(D / 2) - d / 2 * math.log(math.pi)
    return logs.logsumexp(1) - math.log(len(x0))


def divergence(x: Tensor, t: Tensor, x0: Tensor, D: float) -> Tensor:
    """div_x (x − μ) / t = (d − tr ∂μ/∂x) / t with μ = Σ_j w_j x0_j, in float64."""
    d, x, t = x0.shape[1], x.double(), t.double()
    s = squares(x, x0) + (0 if math.inf == D else t[:, None] ** 2)
    logits = -s / (2 * t[:, None] ** 2) if math.inf == D else -(d + D) / 2 * s.log()
    weights = logits.softmax(1)
    mean = weights @ x0
    rates = -1 / t[:, None].square().expand_as(s) if math.inf == D else -(d + D) / s
    # (x − x0_j)·(x0_j − μ)
    products = (x + mean) @ x0.T - x0.square().sum(1) - (x * mean).sum(1, keepdim=True)
    trace = (weights * rates * products).sum(1)
    return (d - trace) / t


def field(x0: Tensor, D: float):
    return lambda x, t: poisson_field(x, t, x0, D=D)


@pytest.mark.parametrize("D", Ds)
@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_closed_forms_of_this_file(d, D):
    """The density is one, and the divergence is that of the field."""
    x0 = data(4, d)
    x, t = queries(x0, 0.7, D), torch.full((4,), 0.7, dtype=torch.float64)

    def slope(x: Tensor) -> Tensor:
        row = poisson_field(x[None], 0.7, x0, D=D)[0]
        return row[:-1] / row[-1]

    jacobians = torch.stack([torch.autograd.functional.jacobian(slope, row) for row in x])
    expected = jacobians.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(divergence(x, t, x0, D), expected, rtol=1e-9, atol=1e-9)
    if d == 1:
        points = [-math.inf, *sorted(x0[:, 0].tolist()), math.inf]

        def density(x: float) -> float:
            return log_density(torch.tensor([[x]], dtype=torch.float64), 0.7, x0, D).exp().item()

        parts = [integrate.quad(density, a, b)[0] for a, b in itertools.pairwise(points)]
        assert sum(parts) == pytest.approx(1, abs=1e-6)


def far(D: float) -> float:
    """A T at which the data's field is the prior's to 1e-4 nats."""
    return 3e3 if math.inf > D else 1e3


@pytest.mark.parametrize("D", Ds)
@pytest.mark.parametrize("d", [1, 2, 8])
@pytest.mark.parametrize("t_min", [0.1, 1.0])
def test_the_density_of_the_flow(t_min, d, D):
    x0 = data(6, d)
    x = queries(x0, t_min, D)
    options = {"T": far(D), "D": D, "t_min": t_min, "rtol": 1e-5}
    found = log_likelihood(
        field(x0, D), x, divergence=lambda x, t: divergence(x, t, x0, D), **options
    )
    assert found.log_p.dtype == torch.float64
    assert found.log_p.shape == (6,)
    expected = log_density(x, t_min, x0, D)
    assert (found.log_p - expected).abs().max() <= 1e-3 * d
    assert expected.std() > 0.05
    assert found.nfe > 20
    if d == 2:
        exact = log_likelihood(field(x0, D), x, divergence="exact", **options)
        torch.testing.assert_close(exact.log_p, found.log_p, rtol=1e-9, atol=1e-9)
        assert exact.nfe == found.nfe


@pytest.mark.parametrize("solver", ["heun", "euler", "heun_euler", "per_sample"])
def test_every_solver(solver):
    x0 = data(6, 2)
    x = queries(x0, 0.3, 1)
    options: dict[str, object] = {"solver": solver, "steps": 200}
    if solver == "per_sample":
        options = {"per_sample": True, "rtol": 1e-6}
    for how in ("exact", lambda x, t: divergence(x, t, x0, 1)):
        found = log_likelihood(field(x0, 1), x, T=1e3, t_min=0.3, divergence=how, **options)
        error = (found.log_p - log_density(x, 0.3, x0, 1)).abs().max()
        assert error <= (0.2 if solver == "euler" else 2e-3)
    if solver != "per_sample":
        assert found.nfe == {"heun": 400, "euler": 200, "heun_euler": 399}[solver]


@pytest.mark.parametrize("D", [1, math.inf])
def test_hutchinson_has_the_right_mean(D):
    """64 probes: one each for 64 copies of a point, whose spread says what the mean may be off."""
    x0, d = data(6, 12), 12
    x = queries(x0, 0.5, D)[:1]
    exact = log_density(x, 0.5, x0, D)
    options = {"T": far(D), "D": D, "t_min": 0.5, "rtol": 1e-4}
    generator = torch.Generator().manual_seed(2)
    each = log_likelihood(field(x0, D), x.expand(64, d), generator=generator, **options).log_p
    assert each.std() > 1e-3
    assert abs(each.mean() - exact) <= 4 * each.std() / 8 + 1e-3 * d
    together = log_likelihood(
        field(x0, D), x, probes=16, generator=torch.Generator().manual_seed(3), **options
    ).log_p
    assert abs(together - exact) <= 3 * each.std() / 4 + 1e-3 * d
    assert abs(together - exact) > 0


def test_a_probe_of_one_dimension_is_exact():
    """±1 squared is 1."""
    x0 = data(5, 1)
    x, options = queries(x0, 0.2, 1), {"T": 1e3, "t_min": 0.2, "rtol": 1e-6}
    exact = log_likelihood(field(x0, 1), x, divergence="exact", **options).log_p
    torch.testing.assert_close(log_likelihood(field(x0, 1), x, **options).log_p, exact)


def test_the_latent_is_that_of_encode_and_has_the_priors_density():
    x0 = data(5, 3).view(5, 3, 1)
    x = x0 + 0.1
    options = {"T": 40.0, "t_min": 0.1, "solver": "heun", "steps": 50}
    found = log_likelihood(field(x0, 1), x, divergence="exact", **options)
    latent = encode(field(x0, 1), x, **options).x
    torch.testing.assert_close(found.latent, latent, rtol=1e-12, atol=1e-10)
    log_p, latent, nfe = found
    assert (log_p is found.log_p, nfe) == (True, 100)
    # Straight lines of one source: x grows by T / t_min, its density falls by that, d times.
    one = torch.zeros(1, 2, dtype=torch.float64)
    found = log_likelihood(field(one, 1), one + 0.3, divergence="exact", **options)
    expected = log_prior(found.latent, T=40) + 2 * math.log(40 / 0.1)
    torch.testing.assert_close(found.log_p, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.latent, (one + 0.3) * 400)


def test_float32_stays_so_but_for_the_sum():
    x0 = data(6, 4)
    x = queries(x0, 0.5, 1)
    asked = set()

    def single(x: Tensor, t: Tensor) -> Tensor:
        asked.update((x.dtype, t.dtype))
        return poisson_field(x, t, x0.float())

    options = {"T": 1e3, "t_min": 0.5, "rtol": 1e-5}
    for how in ("hutchinson", "exact"):
        wide = log_likelihood(
            field(x0, 1), x, divergence=how, generator=torch.Generator().manual_seed(0), **options
        )
        narrow = log_likelihood(
            single,
            x.float(),
            divergence=how,
            generator=torch.Generator().manual_seed(0),
            **options,
        )
        assert (narrow.log_p.dtype, narrow.latent.dtype) == (torch.float64, torch.float32)
        torch.testing.assert_close(narrow.log_p, wide.log_p, rtol=0, atol=2e-3)
    assert asked == {torch.float32}


def test_a_network_with_labels():
    """Its parameters get no gradients, and labels go with their samples."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    network = network.double()

    def labelled(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert len(labels) == len(x)
        mean = network(torch.cat([x, t[:, None], labels[:, None]], 1))
        return torch.cat([mean - x, -t[:, None]], 1)

    x = torch.randn(5, 2, dtype=torch.float64)
    labels = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    options = {"T": 10.0, "t_min": 0.5, "rtol": 1e-6, "divergence": "exact"}
    whole = log_likelihood(labelled, x, labels=labels, per_sample=True, **options)
    assert not whole.log_p.requires_grad
    assert network[0].weight.grad is None
    for row in range(5):
        one = slice(row, row + 1)
        alone = log_likelihood(labelled, x[one], labels=labels[one], **options)
        torch.testing.assert_close(whole.log_p[one], alone.log_p, rtol=1e-9, atol=1e-9)
    swapped = log_likelihood(labelled, x, labels=labels.flip(0), per_sample=True, **options)
    assert (swapped.log_p - whole.log_p).abs().max() > 1e-3


def digits() -> Tensor:
    return torch.tensor(load_digits().data, dtype=torch.float64) / 8 - 1


def test_bits_per_dim_of_digits():
    """Under the exact field of all of them."""
    x0 = digits()
    x0 -= x0.mean(0)
    generator = torch.Generator().manual_seed(0)
    x = x0[:8] + 0.1 * torch.randn(8, 64, dtype=torch.float64, generator=generator)
    found = log_likelihood(
        field(x0, 1),
        x,
        T=1e3,
        t_min=0.1,
        rtol=1e-5,
        divergence=lambda x, t: divergence(x, t, x0, 1),
    )
    bits = bits_per_dim(found.log_p, 64, -1, 1)
    assert torch.isfinite(bits).all()
    expected = bits_per_dim(log_density(x, 0.1, x0, 1), 64, -1, 1)
    assert (bits - expected).abs().max() <= 1e-3 / math.log(2)
    assert 0 < bits.mean() < 8


def test_bits_per_dim_of_a_known_density():
    # Uniform over [low, high + one value): log2 of 256 values are 8 bits.
    for low, high in ((-1.0, 1.0), (0.0, 1.0), (0.0, 255.0)):
        width = (high - low) / 255
        log_p = torch.full((3,), -12 * math.log(256 * width), dtype=torch.float64)
        torch.testing.assert_close(
            bits_per_dim(log_p, 12, low, high), torch.full((3,), 8.0, dtype=torch.float64)
        )
    published = bits_per_dim(torch.zeros(1), 3072, -1, -1 + 2 * 255 / 256)
    torch.testing.assert_close(published, torch.tensor([7.0], dtype=torch.float64))


def test_progress_and_times():
    x0 = data(5, 2)
    for options in ({"times": [10.0, 3.0, 0.5]}, {"T": 10.0, "t_min": 0.5, "rtol": 1e-4}):
        fractions: list[float] = []
        found = log_likelihood(field(x0, 1), x0 + 0.1, progress=fractions.append, **options)
        assert (fractions[0], fractions[-1]) == (0, 1)
        assert fractions == sorted(fractions)
        assert found.nfe == 4 or "T" in options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"divergence": "skilling"}, ValueError, "divergence expects hutchinson, exact or a func"),
        ({"probes": 0}, ValueError, "probes expects an integer ≥ 1, got 0"),
        ({"D": 0}, ValueError, "D expects a number > 0, got 0"),
        ({"T": None}, TypeError, "T expects a real number, got NoneType and no times"),
        ({"x": torch.full((3, 2), math.inf)}, ValueError, "x expects finite values, got NaN"),
        (
            {"divergence": lambda x, t: x},
            ValueError,
            r"divergence's output expects shape \(B,\) = \(3,\), got \(3, 2\)",
        ),
        ({"divergence": lambda x, t: None}, ValueError, r"\(B,\) = \(3,\), got NoneType"),
        (
            {"field_fn": lambda x, t: torch.cat([-x, -t[:, None]], 1).detach()},
            ValueError,
            "divergence='hutchinson' expects a field_fn with gradients, got one without",
        ),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    arguments = {"field_fn": field(data(3, 2), 1), "x": torch.zeros(3, 2), "T": 10, **options}
    with pytest.raises(error, match=message):
        log_likelihood(**arguments)


@pytest.mark.parametrize("solver", ["heun", "rk45"])
def test_a_divergence_that_breaks_down_is_reported(solver):
    def broken(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(torch.arange(3) == 1, math.nan, 1.0) * t

    message = r"div dx/dt is not finite at t = 0.0\d+ for 1 of 3 samples$"
    with pytest.raises(FloatingPointError, match=message):
        log_likelihood(
            field(data(3, 2), 1), data(3, 2), T=10, t_min=0.01, solver=solver, divergence=broken
        )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bits_per_dim(1.0, 3, 0, 1), TypeError, "log_p expects a tensor, got float"),
        (lambda: bits_per_dim(torch.ones(1), 0, 0, 1), ValueError, "d expects an integer ≥ 1"),
        (lambda: bits_per_dim(torch.ones(1), 3, 1, 1), ValueError, "expects finite low < high"),
    ],
)
def test_bits_per_dim_checks_its_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
