# SPDX-License-Identifier: Apache-2.0
"""Is log_density the normalised density of the empirical flow, with its derivatives?"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from cases import build, seeded, truth
from oracle import LOG_MASS
from torch import Tensor

from pfgm_kernels import ReferenceSet, log_density
from pfgm_kernels.flow import log_prior

DIMENSIONS = [0.5, 1, 2, 128, math.inf]


def formula(x: Tensor, t: Tensor, x0: Tensor, D: float) -> Tensor:
    """log (1/N) Σ_j p_t(x | x0_j) in float64, written out."""
    d, t = x.shape[1], t.double()[:, None].abs()
    squares = (x.double()[:, None] - x0.double()).square().sum(2)
    if math.isinf(D):
        logs = -squares / (2 * t**2) - d / 2 * (2 * math.pi * t**2).log()
    else:
        constant = math.lgamma((d + D) / 2) - math.lgamma(D / 2) - d / 2 * math.log(math.pi)
        logs = constant + D * t.log() - (d + D) / 2 * (squares + t**2).log()
    return logs.logsumexp(1) - math.log(len(x0))


def inputs(d: int, D: float) -> list[Tensor]:
    generator = seeded(d)
    x, x0 = (torch.randn(n, d, dtype=torch.float64, generator=generator) for n in (5, 30))
    t = d**0.25 * (1 + torch.rand(5, dtype=torch.float64, generator=generator))
    return [x, t if math.isinf(D) else t * math.sqrt(d + D), x0]


@pytest.mark.parametrize("D", [1, 2, 128, math.inf])
@pytest.mark.parametrize("t", [0.1, 1, 10])
@pytest.mark.parametrize("d", [1, 2])
def test_it_integrates_to_one(d, t, D):
    """Over all of R^d, by x = a tan φ in d = 1 and by polar coordinates of radius a tan φ in d = 2,
    in which p has no tail. The references are a few widths a of the kernel apart.
    """
    width = t if math.isinf(D) else t / math.sqrt(D)
    x0 = width * torch.tensor([[-1.0, 0.5], [0.2, 1.0], [1.5, -0.7]], dtype=torch.float64)[:, :d]
    count = 2000 if d == 1 else 400
    step = math.pi / (count if d == 1 else 2 * count)
    angle = step * (torch.arange(count, dtype=torch.float64) + 0.5) - (math.pi / 2) * (d == 1)
    radius, stretch = width * angle.tan(), width * step / angle.cos().square()
    if d == 1:
        p = log_density(radius[:, None], t, x0, D=D).exp()
        total = (p * stretch).sum()
    else:
        turn = 2 * math.pi / 64 * torch.arange(64, dtype=torch.float64)
        direction = torch.stack([turn.cos(), turn.sin()], 1)
        x = (radius[:, None, None] * direction).view(-1, 2)
        p = log_density(x, t, x0, D=D).exp().view(count, 64)
        total = (p.mean(1) * 2 * math.pi * radius * stretch).sum()
    assert abs(total - 1) < 1e-5


@pytest.mark.parametrize("D", DIMENSIONS)
@pytest.mark.parametrize("d", [1, 3, 40])
def test_value_and_derivatives(backend, d, D):
    """Either sign of t; first derivatives in both modes."""
    x, t, x0 = inputs(d, D)
    t[::2] *= -1
    leaves = [a.requires_grad_() for a in (x, t, x0)]
    found, expected = backend.log_density(x, t, x0, D=D), formula(x, t, x0, D)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn(5, dtype=torch.float64, generator=seeded(1))
    gradients = torch.autograd.grad(found, leaves, g)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, leaves, g), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-11)
    primals = tuple(a.detach() for a in leaves)
    _, tangent = torch.func.jvp(partial(backend.log_density, D=D), primals, primals)
    _, wanted = torch.func.jvp(lambda *a: formula(*a, D), primals, primals)
    torch.testing.assert_close(tangent, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("D", [1, 2.5, math.inf])
def test_gradcheck(backend, D):
    if backend.interpreted and backend.name == "triton":
        pytest.skip("it takes hundreds of calls; test_value_and_derivatives compares values")
    x, t, x0 = (a[:4].requires_grad_() for a in inputs(3, D))
    assert torch.autograd.gradcheck(
        partial(backend.log_density, D=D), (x, t, x0), check_forward_ad=True
    )


@pytest.mark.parametrize(
    "name", ["normal d=64", "normal d=3072", "D=128 d=784", "D=inf d=784", "all t d=2"]
)
def test_in_float32(backend, name):
    """As the log mass, of references stored either way."""
    case = build(name)
    d, D, t = case.d, case.D, case.t.double()
    constant = -d / 2 * math.log(2 * math.pi) - d * t.log()
    if math.isfinite(D):
        constant = math.lgamma((d + D) / 2) - math.lgamma(D / 2) + D * t.log()
        constant -= d / 2 * math.log(math.pi)
    expected = truth(name).log_mass + constant - math.log(len(case.x0))
    allowed = LOG_MASS + 8 * torch.finfo(torch.float64).eps * truth(name).log_mass.abs()
    for references in (case.x0, ReferenceSet(case.x0)):
        found = backend.log_density(case.x, case.t, references, D=D)
        assert ((found - expected).abs() <= allowed).all()


def test_one_reference_at_the_origin_is_the_prior():
    x = 30 * torch.randn(7, 2, 3, generator=seeded())
    for D in DIMENSIONS:
        density = log_density(x, 5.0, torch.zeros(1, 2, 3), D=D)
        torch.testing.assert_close(density, log_prior(x, T=5.0, D=D), rtol=0, atol=1e-9)


@pytest.mark.parametrize("d", [2, 40])
def test_at_height_zero(backend, d):
    """+∞ on a reference, with gradients that are not NaN, −∞ elsewhere; NaN for D = ∞."""
    x, t, x0 = inputs(d, 1)
    x[0], t[:2] = x0[3], 0
    x.requires_grad_(), t.requires_grad_()
    found = backend.log_density(x, t, x0)
    assert found[:2].tolist() == [math.inf, -math.inf]
    torch.testing.assert_close(found[2:], formula(x, t, x0, 1)[2:], rtol=1e-12, atol=0)
    dx, dt = torch.autograd.grad(found.sum(), [x, t])
    assert (dx[0] == 0).all()
    assert dt[0] == 0
    assert dx[1:].isfinite().all()
    assert backend.log_density(x, t, x0, D=math.inf)[:2].isnan().all()


@pytest.mark.parametrize("references", ["tensor", "set"])
def test_a_whole_graph(backend, references):
    torch._dynamo.reset()
    x, t, x0 = (a.to(backend.device) for a in inputs(40, 1))
    stored = ReferenceSet(x0) if references == "set" else x0.requires_grad_()
    x.requires_grad_()
    run = torch.compile(backend.log_density, fullgraph=True, backend="aot_eager")
    compiled, eager = run(x, t, stored, D=2.0), backend.log_density(x, t, stored, D=2.0)
    torch.testing.assert_close(compiled, eager, rtol=1e-14, atol=1e-14)
    (gradient,) = torch.autograd.grad(compiled.sum(), x)
    assert gradient.equal(torch.autograd.grad(eager.sum(), x)[0])


def test_refusals():
    x, t, x0 = inputs(3, 1)
    for D in (0, -1, math.nan):
        with pytest.raises(ValueError, match="D expects"):
            log_density(x, t, x0, D=D)
    with pytest.raises(ValueError, match="t expects a number other than 0"):
        log_density(x, 0.0, x0, D=math.inf)
    with pytest.raises(TypeError, match=r"x expects a tensor.*list"):
        log_density([1.0], t, x0)
    (gradient,) = torch.autograd.grad(
        log_density(x.requires_grad_(), t, x0).sum(), x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()
