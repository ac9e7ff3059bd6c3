# SPDX-License-Identifier: Apache-2.0
"""Does forward mode give the tangents by definition, from every way in?"""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, build, seeded, truth
from oracle import FLOAT64, GRADIENT, assert_tangents, jvp, solve
from torch import Tensor
from torch.autograd import forward_ad

from pfgm_kernels import ReferenceSet

MIB = 1 << 20
TOLERANCES = {torch.float32: GRADIENT, torch.float64: FLOAT64}


def tangents_of(*tensors: Tensor) -> list[Tensor]:
    return [
        torch.randn(tensor.shape, dtype=tensor.dtype, generator=seeded(seed))
        for seed, tensor in enumerate(tensors)
    ]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("moving", [False, True], ids=["x, t", "x, t, x0"])
def test_named_cases(backend, name, dtype, moving):
    case = build(name)
    everything = [a.to(dtype) for a in (case.x, case.t, case.x0)]
    primals = everything if moving else everything[:2]
    tangents = tangents_of(*primals)
    (v, _), (dv, dlog_mass) = torch.func.jvp(
        lambda x, t, x0=case.x0: backend.displacement(x, t, x0, D=case.D),
        tuple(primals),
        tuple(tangents),
    )
    assert dv.dtype == v.dtype == dtype
    expected = jvp(truth(name), case.x, case.x0, *tangents, D=case.D)
    assert_tangents(expected, dv, dlog_mass, TOLERANCES[dtype])


@pytest.mark.parametrize("D", [0, 1, 2.5, math.inf])
@pytest.mark.parametrize("d", [3, 40, 300])
def test_it_agrees_with_reverse_mode(backend, d, D):
    """⟨g, J ẋ⟩ = ⟨Jᵀ g, ẋ⟩ for each output, in float64."""
    generator = seeded(d)
    x, x0 = (torch.randn(n, d, dtype=torch.float64, generator=generator) for n in (5, 40))
    t = d**0.25 * (1 + torch.rand(5, dtype=torch.float64, generator=generator))
    t = t if math.isinf(D) else t * math.sqrt(d + D)
    primals = (x, t, x0)
    tangents = tangents_of(*primals)
    for run in (backend.displacement, backend.field, backend.mean):
        options = {"gamma": 2.0, "scale": 3.0} if run == backend.field else {}

        def outputs(*inputs: Tensor, run=run, options=options) -> tuple[Tensor, ...]:
            result = run(*inputs, D=D, **options)
            return result if isinstance(result, tuple) else (result,)

        results, pushed = torch.func.jvp(outputs, primals, tuple(tangents))
        cotangents = tangents_of(*results)
        leaves = [a.clone().requires_grad_() for a in primals]
        pulled = torch.autograd.grad(outputs(*leaves), leaves, cotangents)
        forward = sum((a * b).sum() for a, b in zip(pushed, cotangents, strict=True))
        reverse = sum((a * b).sum() for a, b in zip(pulled, tangents, strict=True))
        size = sum((a * b).abs().sum() for a, b in zip(pulled, tangents, strict=True))
        assert abs(forward - reverse) <= 1e-12 * size


def small() -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor([[0.5]]), torch.tensor([1.0]), torch.tensor([[-1.0], [1.0]])


@pytest.mark.parametrize("references", ["tensor", "set"])
def test_the_field_of_two_points(backend, references):
    """By hand: s = 3.25 and 1.25, w = s⁻¹ up to a factor."""
    x, _, x0 = small()
    stored = x0 if references == "tensor" else ReferenceSet(x0)
    _, tangent = torch.func.jvp(
        lambda x: backend.field(x, 1.0, stored), (x,), (torch.ones_like(x),)
    )
    torch.testing.assert_close(tangent, torch.tensor([[-0.30722, 0.01707]]), atol=1e-5, rtol=0)


def test_every_way_in(backend):
    x, t, x0 = small()
    x_tangent, t_tangent = torch.ones_like(x), torch.full_like(t, 2.0)
    _, by_jvp = torch.func.jvp(lambda x, t: backend.field(x, t, x0), (x, t), (x_tangent, t_tangent))
    with forward_ad.dual_level():
        dual = backend.field(
            forward_ad.make_dual(x, x_tangent), forward_ad.make_dual(t, t_tangent), x0
        )
        by_level = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(by_level, by_jvp)
    jacobians = torch.func.jacfwd(lambda x, t: backend.field(x, t, x0), (0, 1))(x, t)
    columns = jacobians[0][:, :, 0, 0] + 2 * jacobians[1][:, :, 0]
    torch.testing.assert_close(columns, by_jvp)
    for index, primal in enumerate((x, t, x0)):
        arguments = [x, t, x0]

        def alone(moved: Tensor, index=index, arguments=arguments) -> Tensor:
            return backend.field(*arguments[:index], moved, *arguments[index + 1 :])

        forward = torch.func.jacfwd(alone)(primal)
        reverse = torch.autograd.functional.jacobian(alone, primal)
        torch.testing.assert_close(forward, reverse)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_number_for_t_and_half_precision(backend, requires_grad):
    """The tangent has the dtype of the result, whether a graph is recorded or not."""
    generator = seeded()
    x, x0 = (torch.randn(n, 3, generator=generator).half() for n in (4, 9))
    x_tangent = torch.ones_like(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(requires_grad), x_tangent)
        v, log_mass = backend.displacement(dual, 1.5, x0)
        assert v.requires_grad == requires_grad
        dv, dlog_mass = (forward_ad.unpack_dual(a).tangent for a in (v, log_mass))
    t = torch.full((4,), 1.5)
    expected = jvp(solve(x, t, x0), x, x0, x_tangent, torch.zeros(4))
    assert (dv.dtype, dlog_mass.dtype) == (torch.float32, torch.float64)
    assert_tangents(expected, dv.detach(), dlog_mass.detach(), GRADIENT)


@pytest.mark.parametrize("d", [3, 40])
def test_chunks(backend, d):
    """Of references and of queries; 1 MiB makes several of both."""
    if backend.interpreted:
        pytest.skip("eager's sums, in chunks that are too many for it to compute the rest")
    generator = seeded(d)
    x, x0 = torch.randn(70, d, generator=generator), torch.randn(9_000, d, generator=generator)
    t = torch.full((70,), math.sqrt(d + 1) * d**0.25)
    primals, tangents = (x, t), tuple(tangents_of(x, t))
    references = ReferenceSet(x0, workspace=MIB, backend=backend.name)
    _, (dv, dlog_mass) = torch.func.jvp(
        lambda x, t: backend.displacement(x, t, references), primals, tangents
    )
    assert_tangents(jvp(solve(x, t, x0), x, x0, *tangents), dv, dlog_mass, GRADIENT)


@pytest.mark.parametrize("d", [2, 40])
def test_rows_at_the_singular_point_and_rows_that_are_not_finite(backend, d):
    x0 = torch.randn(6, d, generator=seeded(d))
    x, t = x0[:4] + torch.tensor([0.0, 0.5, math.nan, 0.0])[:, None], torch.tensor([0.0, 1, 1, 1])
    tangents = (torch.ones_like(x), torch.ones_like(t))
    _, (dv, dlog_mass) = torch.func.jvp(
        lambda x, t: backend.displacement(x, t, x0), (x, t), tangents
    )
    assert torch.equal(dv[0], torch.zeros(d))
    assert dlog_mass[0] == 0
    assert dv[2].isnan().all()
    assert dlog_mass[2].isnan()
    rest = [1, 3]
    expected = jvp(solve(x[rest], t[rest], x0), x[rest], x0, *(a[rest] for a in tangents))
    assert_tangents(expected, dv[rest], dlog_mass[rest], GRADIENT)


WAYS = {
    "vmap": lambda f, x: torch.func.vmap(lambda row: f(row[None]))(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda row: f(row[None]).sum()))(
        x
    ),
    "vmap of jvp": lambda f, x: torch.func.vmap(
        lambda row: torch.func.jvp(f, (row[None],), (row[None],))[1]
    )(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "is_grads_batched": lambda f, x: torch.autograd.grad(
        f(y := x.clone().requires_grad_()), y, f(x).expand(4, *f(x).shape), is_grads_batched=True
    ),
    "vectorized jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "vectorized forward jacobian": lambda f, x: torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
    "grad of grad": lambda f, x: torch.func.grad(
        lambda x: torch.func.grad(lambda x: f(x).sum())(x).sum()
    )(x),
    "double backward": lambda f, x: torch.autograd.functional.jvp(f, x, torch.ones_like(x)),
    "forward over reverse": lambda f, x: torch.func.jvp(
        torch.func.grad(lambda x: f(x).sum()), (x,), (x,)
    ),
    "reverse over forward": lambda f, x: torch.func.grad(
        lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1].sum()
    )(x),
    "forward over forward": lambda f, x: torch.func.jvp(
        lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1], (x,), (x,)
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("references", ["tensor", "set"])
def test_what_is_not_supported_says_what_to_do(backend, way, references):
    x, _, x0 = small()
    stored = x0 if references == "tensor" else ReferenceSet(x0)
    for run in (backend.field, backend.mean):
        with pytest.raises(NotImplementedError, match=r"use torch.func.jacfwd|take differences"):
            WAYS[way](lambda x, run=run: run(x, 1.0, stored), x)


def test_dual_gradients_are_refused(backend):
    """Forward over reverse by forward_ad: the tangent must not be lost on the way back."""
    x, _, x0 = small()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_(), torch.ones_like(x))
        output = backend.field(dual, 1.0, x0)
        with pytest.raises(NotImplementedError, match="differentiable once"):
            torch.autograd.grad(output.sum(), x)
