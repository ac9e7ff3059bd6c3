# SPDX-License-Identifier: Apache-2.0
"""Does the op compile: torch.library's checks, and whole graphs forward and backward?"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from cases import seeded
from oracle import (
    FLOAT64,
    assert_displacement,
    assert_field,
    assert_gradients,
    differentiate,
    solve,
)
from torch import Tensor

from pfgm_kernels import ReferenceSet, poisson_displacement, poisson_field

STORED = {
    "float32": lambda x0: (x0, x0.new_empty(0)),
    "float64": lambda x0: (x0.double(), x0.new_empty(0)),
    "uint8": lambda x0: (x0.abs().mul(80).to(torch.uint8), torch.linspace(-1, 1, 256)),
}


def tensors(backend, d: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = seeded()
    x, x0 = (torch.randn(n, d, generator=generator).to(dtype) for n in (5, 60))
    t = (d**0.75 * (1 + torch.rand(5, generator=generator))).to(dtype)
    return [tensor.to(backend.device) for tensor in (x, t, x0)]


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    ("d", "k"), [(3, 4.0), pytest.param(40, math.inf, marks=pytest.mark.exhaustive)]
)
def test_opcheck(backend, stored, d, k):
    x, t, x0 = tensors(backend, d, torch.float32)
    values, table = STORED[stored](x0)
    arguments = (x, t, values, table.to(backend.device), [], k, None)
    options = (1 << 20, backend.name)
    for output in (("displacement", 0.0, 1.0), ("field", 5.0, 3.0), ("mean", 0.0, 1.0)):
        check = torch.library.opcheck
        check(torch.ops.pfgm.field_forward.default, (*arguments, *output, False, *options))
        everything = (*arguments, *output, True, *options)
        check(torch.ops.pfgm.field_forward.default, everything)
        result, log_mass, *saved = torch.ops.pfgm.field_forward(*everything)
        cotangents = (result.clone(), log_mass.clone() if len(log_mass) else None)
        inputs = (*arguments, *output, *saved)
        for values_grad in {False, stored != "uint8"}:
            gradient = (*inputs, *cotangents, values_grad, *options)
            check(torch.ops.pfgm.field_backward.default, gradient)
        tangents = (x.clone(), t.clone(), values.clone() if stored != "uint8" else None)
        check(torch.ops.pfgm.field_jvp.default, (*inputs, *tangents, *options))


@pytest.mark.parametrize(
    ("references", "dynamic", "compiler"),
    [
        pytest.param("tensor", False, "inductor", marks=pytest.mark.exhaustive),
        ("tensor", True, "aot_eager"),
        ("set", False, "aot_eager"),
        ("set", True, "aot_eager"),
        ("images", False, "aot_eager"),
    ],
)
def test_a_whole_graph(backend, references, dynamic, compiler):
    """fullgraph=True: forward and backward without a break, equal to the oracle."""
    if compiler == "inductor" and len(torch.__file__.split()) > 1:
        pytest.skip("torch.compile cannot link on a CPU where a space is in the path of torch")
    torch._dynamo.reset()
    x, t, x0 = tensors(backend, 40)
    images = (40 * x0 + 128).round().clamp(0, 255).to(torch.uint8)
    if references == "images":
        x0 = (-3 + 6 * images.double() / 255).float().double()
    stored = {
        "tensor": lambda: x0.requires_grad_(),
        "set": lambda: ReferenceSet(x0),
        "images": lambda: ReferenceSet.from_images(images, -3.0, 3.0),
    }[references]()
    x, t = x.requires_grad_(), t.requires_grad_()

    @partial(torch.compile, fullgraph=True, dynamic=dynamic, backend=compiler)
    def run(x: Tensor, t: Tensor, x0: Tensor | ReferenceSet) -> tuple[Tensor, Tensor, Tensor]:
        v, log_mass = poisson_displacement(x, t, x0, backend=backend.name)
        field = poisson_field(2 * x, t, x0, gamma=5.0, scale=3.0, backend=backend.name)
        return v * 2, log_mass, field

    v, log_mass, field = run(x, t, stored)
    truth = solve(x.cpu(), t.cpu(), x0.cpu())
    assert_displacement(v.detach().cpu() / 2, truth, FLOAT64)
    doubled = solve(2 * x.cpu(), t.cpu(), x0.cpu())
    assert_field(field.detach().cpu(), doubled, FLOAT64, 5.0, 3.0)
    inputs = [x, t, x0] if references == "tensor" else [x, t]
    gradients = torch.autograd.grad([v, log_mass], inputs, [v.detach(), log_mass.detach()])
    g_v, g_m = 2 * v.detach().cpu(), log_mass.detach().cpu()
    expected = differentiate(truth, x.cpu(), x0.cpu(), g_v, g_m)
    assert_gradients(expected, *(g.cpu() for g in gradients))


def test_other_sizes_and_numbers(backend):
    """One compiled function, called with other batch sizes and a number for t."""
    torch._dynamo.reset()
    field_fn = partial(poisson_field, backend=backend.name)
    run = torch.compile(field_fn, fullgraph=True, backend="aot_eager")
    x, _, x0 = tensors(backend, 3)
    for batch in (5, 3, 2, 1):
        for t in (1.0, 2.5):
            field = run(x[:batch], t, x0).cpu()
            assert_field(field, solve(x[:batch].cpu(), t, x0.cpu()), FLOAT64)
