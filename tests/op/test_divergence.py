# SPDX-License-Identifier: Apache-2.0
"""Is the divergence of the velocity v / (−t) what it is by definition, and are its gradients?"""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, build, seeded, truth
from images import eq_11_queries, synthetic_images
from oracle import FLOAT64, GRADIENT, solve, trace
from torch import Tensor
from torch.autograd import forward_ad

from pfgm_kernels import ReferenceSet

MIB = 1 << 20
DIMENSIONS = [0, 1, 2.5, 128, math.inf]


def tolerance(backend, dtype: torch.dtype) -> float:
    """On GPUs the trace is what k leaves of float32 gradients."""
    if dtype == torch.float64:
        return 10 * FLOAT64
    return GRADIENT * (2 if backend.name in ("cuda", "triton") else 1)


def inputs(d: int, D: float, batch: int = 5, count: int = 40) -> list[Tensor]:
    """Float64 queries for which references share the weight."""
    generator = seeded(d)
    x, x0 = (torch.randn(n, d, dtype=torch.float64, generator=generator) for n in (batch, count))
    t = d**0.25 * (1 + torch.rand(batch, dtype=torch.float64, generator=generator))
    return [x, t if math.isinf(D) else t * math.sqrt(d + D), x0]


def assert_divergence(
    actual: Tensor, x: Tensor, t: Tensor, x0: Tensor, D: float, tolerance: float, **options
) -> None:
    """Within the tolerance of d and the trace's terms, over |t|."""
    solved = options.get("solved") or solve(x, t, x0, D)
    value, terms = trace(solved, x, x0, D)
    d = x[0].numel()
    allowed = tolerance * (d + terms)
    error = (actual * solved.t - (d - value)).abs()
    assert actual.dtype == torch.float64
    assert (error <= allowed).all(), f"{(error / allowed).max():.2e} times what is allowed"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_named_cases(backend, name, dtype):
    case = build(name)
    found = backend.divergence(case.x.to(dtype), case.t, case.x0.to(dtype), D=case.D)
    arguments = case.x, case.t, case.x0, case.D, tolerance(backend, dtype)
    assert_divergence(found, *arguments, solved=truth(name))


@pytest.mark.parametrize("D", DIMENSIONS)
@pytest.mark.parametrize("d", [1, 3, 40])
def test_against_vector_jacobian_products(backend, d, D):
    x, t, x0 = inputs(d, D)
    x.requires_grad_()
    velocity = backend.displacement(x, t, x0, D=D)[0] / -t[:, None]
    expected = sum(
        torch.autograd.grad(velocity[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(d)
    )
    assert solve(x, t, x0, D).effective_sample_size.max() > 2
    found = backend.divergence(x.detach(), t, x0, D=D)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("D", [1, 128, 1e6, math.inf])
@pytest.mark.parametrize("d", [1, 16, 25, 257])
def test_far_from_the_data(backend, d, D):
    """Where references share the weight; for D = ∞ on GPUs about as far as noise takes a query."""
    generator = seeded(d)
    x0, away = (torch.randn(n, d, generator=generator) for n in (70, 9))
    near = math.isinf(D) and backend.name in ("cuda", "triton")
    distance = torch.logspace(0, 2 if near else 8, 9)
    x = x0[:9] + away * (distance / away.norm(dim=1))[:, None]
    t = (distance * math.sqrt(d)).sqrt() if math.isinf(D) else (D * distance).sqrt()
    found = backend.divergence(x, t, x0, D=D)
    assert_divergence(found, x, t, x0, D, tolerance(backend, torch.float32))


@pytest.mark.parametrize("m", [150, 200, 225, 260])
def test_8_bit_images(backend, m):
    codes = synthetic_images()
    references = ReferenceSet.from_images(codes, workspace=8 * MIB)
    x0 = (2 * codes.double() / 255 - 1).float()
    x, t = eq_11_queries(x0[5:9].flatten(1), m, seed=m)
    found = backend.divergence(x.view(-1, *x0.shape[1:]), t, references)
    assert_divergence(found, x, t, x0, 1, tolerance(backend, torch.float32))


def test_chunks_and_the_mirror_image(backend):
    """With a workspace that takes many chunks of both, and t < 0."""
    x, t, x0 = inputs(40, 1, batch=70, count=3000)
    if backend.interpreted:
        x, t, x0 = x[:9], t[:9], x0[:300]
    whole = backend.divergence(x, t, x0)
    chunked = backend.divergence(x, t, ReferenceSet(x0, workspace=MIB))
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=0)
    assert backend.divergence(x, -t, x0).equal(-whole)
    numbers = backend.divergence(x, 2.0, x0)
    assert numbers.equal(backend.divergence(x, torch.full_like(t, 2.0), x0))


@pytest.mark.parametrize("d", [2, 40, 300])
def test_special_points(backend, d):
    """t = 0 is infinite, a query that is not finite is NaN, and no other row is."""
    x, t, x0 = (a.float() for a in inputs(d, 1, batch=6))
    x[0], t[:2] = x0[3], 0
    x[2, 0], x[3, -1], t[4] = math.nan, math.inf, math.nan
    found = backend.divergence(x, t, x0)
    assert found[0] == math.inf
    assert found[1].isinf()
    assert found[2:5].isnan().all()
    assert_divergence(found[5:], x[5:], t[5:], x0, 1, tolerance(backend, torch.float32))
    assert backend.divergence(x, t, x0, D=math.inf)[:5].isnan().all()


@pytest.mark.parametrize("D", DIMENSIONS)
@pytest.mark.parametrize("d", [1, 3, 20])
def test_gradcheck(backend, d, D):
    if backend.interpreted and backend.name == "triton":
        pytest.skip("it takes hundreds of calls; the gradients are the same on all backends")
    arguments = [a.requires_grad_() for a in inputs(d, D, batch=3, count=6)]
    assert torch.autograd.gradcheck(
        lambda x, t, x0: backend.divergence(x, t, x0, D=D), arguments, fast_mode=d > 1
    )


@pytest.mark.parametrize("D", [1, math.inf])
def test_gradients_from_chunks(backend, D):
    """The same from many chunks as from one, for 16-bit input too; none from the singular point."""
    x, t, x0 = inputs(40, D, batch=12, count=1000)
    x0 = x0.float() if backend.name != "eager" else x0.half()
    if D == 1:
        x[0], t[0] = x0[3], 0

    def gradients(references) -> list[Tensor]:
        leaves = [a.clone().requires_grad_() for a in (x, t)]
        leaves += [references] if isinstance(references, Tensor) else []
        found = backend.divergence(leaves[0], leaves[1], references, D=D)
        return torch.autograd.grad(found[1:].sum(), leaves)

    dx, dt, dx0 = gradients(x0.requires_grad_())
    assert (dx.dtype, dt.dtype, dx0.dtype) == (torch.float64, torch.float64, x0.dtype)
    assert dx0.isfinite().all()
    assert (dx[0] == 0).all()
    small = gradients(ReferenceSet(x0.detach(), workspace=MIB))
    for chunked, whole in zip(small, (dx, dt), strict=True):
        torch.testing.assert_close(chunked[1:], whole[1:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("d", [3, 40, 300])
def test_no_queries_and_one_reference(backend, d):
    x, _, x0 = (a.requires_grad_() for a in inputs(d, 1))
    found = backend.divergence(x[:0], 1.0, x0)
    dx, dx0 = torch.autograd.grad(found.sum(), [x, x0])
    assert found.shape == (0,)
    assert (dx == 0).all()
    assert (dx0 == 0).all()
    alone = backend.divergence(x.detach(), 2.0, x0[:1].detach())
    torch.testing.assert_close(alone, torch.full_like(alone, d / 2), rtol=1e-9, atol=0)


def test_refusals(backend):
    x, t, x0 = inputs(3, 1)
    x.requires_grad_()
    found = backend.divergence(x, t, x0)
    (gradient,) = torch.autograd.grad(found.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()
    with pytest.raises(NotImplementedError, match="no forward mode"):
        torch.func.jvp(lambda x: backend.divergence(x, t, x0), (x.detach(),), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward mode"):
        backend.divergence(forward_ad.make_dual(x.detach(), torch.ones_like(x)), t, x0)
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(lambda x: backend.divergence(x, t, x0))(x.detach()[None])


@pytest.mark.parametrize("references", ["tensor", "set"])
def test_a_whole_graph(backend, references):
    torch._dynamo.reset()
    x, t, x0 = (a.to(backend.device) for a in inputs(40, 1))
    stored = ReferenceSet(x0) if references == "set" else x0.requires_grad_()
    x.requires_grad_()
    run = torch.compile(backend.divergence, fullgraph=True, backend="aot_eager")
    compiled, eager = run(x, t, stored), backend.divergence(x, t, stored)
    assert compiled.equal(eager)
    leaves = [x] if references == "set" else [x, x0]
    for a, b in zip(
        *(torch.autograd.grad(f.sum(), leaves) for f in (compiled, eager)), strict=True
    ):
        assert a.equal(b)


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.uint8])
def test_opcheck(backend, stored):
    reason = backend.reason()
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")
    x, t, x0 = (a.float().to(backend.device) for a in inputs(3, 1))
    codes = stored == torch.uint8
    values = x0.abs().mul(80).to(stored) if codes else x0.to(stored)
    table = torch.linspace(-1, 1, 256 if codes else 0, device=backend.device)
    arguments = (x, t, values, table, [], 4.0, None)
    check = torch.library.opcheck
    check(torch.ops.pfgm.field_trace.default, (*arguments, MIB, backend.name))
    for values_grad in {False, not codes}:
        rest = (torch.ones_like(t, dtype=torch.float64), values_grad, MIB)
        check(torch.ops.pfgm.field_trace_backward.default, (*arguments, *rest))
