# SPDX-License-Identifier: Apache-2.0
"""Is the op a good citizen of autograd: gradcheck, refusals, determinism, modes?"""

from __future__ import annotations

import math
import threading

import pytest
import torch
from cases import seeded
from oracle import assert_gradients, differentiate, solve
from torch import Tensor

from pfgm_kernels import ReferenceSet


def inputs(event: tuple[int, ...], count: int = 7, batch: int = 3) -> list[Tensor]:
    generator = seeded()
    x, x0 = (
        torch.randn(n, *event, dtype=torch.float64, generator=generator) for n in (batch, count)
    )
    t = 0.5 + math.prod(event) ** 0.75 * torch.rand(batch, dtype=torch.float64, generator=generator)
    return [tensor.requires_grad_() for tensor in (x, t, x0)]


@pytest.mark.parametrize("event", [(), (2,), (2, 2, 3), (37,)])
@pytest.mark.parametrize("D", [0, 1, 2.5, math.inf])
def test_gradcheck(backend, event, D):
    if backend.interpreted and backend.name == "triton":
        pytest.skip("it takes hundreds of calls; test_gradients.py compares values")
    arguments = inputs(event)
    assert torch.autograd.gradcheck(
        lambda x, t, x0: backend.displacement(x, t, x0, D=D),
        arguments,
        fast_mode=(event, D) != ((2,), 1),
        check_forward_ad=True,
    )
    assert torch.autograd.gradcheck(
        lambda x, t, x0: backend.mean(x, t, x0, D=D),
        arguments,
        fast_mode=True,
        check_forward_ad=True,
    )
    for gamma in (0.0, 5.0):
        assert torch.autograd.gradcheck(
            lambda x, t, x0, gamma=gamma: backend.field(x, t, x0, D=D, gamma=gamma, scale=3.0),
            arguments,
            fast_mode=True,
            check_forward_ad=True,
        )


@pytest.mark.parametrize("wanted", ["x", "t", "x0"])
def test_one_input_alone(backend, wanted):
    everything = inputs((40,))
    v, log_mass = backend.displacement(*everything)
    both = torch.autograd.grad(v.sum() + log_mass.sum(), everything)
    index = ["x", "t", "x0"].index(wanted)
    alone = [a.detach().requires_grad_(i == index) for i, a in enumerate(everything)]
    v, log_mass = backend.displacement(*alone)
    (v.sum() + log_mass.sum()).backward()
    assert [a.grad is None for a in alone] == [i != index for i in range(3)]
    torch.testing.assert_close(alone[index].grad, both[index], rtol=1e-13, atol=1e-13)


def test_the_same_tensor_as_query_and_reference(backend):
    x, t, _ = inputs((3,), batch=6)
    v, log_mass = backend.displacement(x, t, x)
    g_v, g_m = torch.ones_like(v), torch.ones_like(log_mass)
    (gradient,) = torch.autograd.grad([v, log_mass], x, [g_v, g_m])
    parts = differentiate(solve(x, t, x), x, x, g_v, g_m)
    torch.testing.assert_close(gradient, parts.dx + parts.dx0, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("d", "count", "batch"), [(2, 1500, 130), (20, 700, 130), (100, 300, 130)])
def test_results_are_deterministic(backend, d, count, batch):
    """Bit for bit, in torch's default mode, whatever the threads do."""
    if backend.interpreted:
        batch //= 10  # it has one thread, and takes minutes for more
    arguments = inputs((d,), count, batch)
    torch.use_deterministic_algorithms(False)  # the module's poison turns it on
    runs = []
    for _ in range(2 if backend.interpreted else 4):
        v, log_mass = backend.displacement(*arguments)
        gradients = torch.autograd.grad(v.sum() + log_mass.sum(), arguments)
        runs.append([v, log_mass, *gradients])
    torch.use_deterministic_algorithms(True, warn_only=True)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))


def test_no_graph_without_need(backend):
    x, t, x0 = inputs((3,))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            v, log_mass = backend.displacement(x, t, x0)
            assert not v.requires_grad
            assert not log_mass.requires_grad
            assert not backend.field(x, t, x0).requires_grad
    with torch.inference_mode():
        references = ReferenceSet(x0.detach().clone())
    v, _ = backend.displacement(x.detach(), 1.0, references)
    torch.testing.assert_close(v, backend.displacement(x, 1.0, x0)[0].detach())


def test_calls_from_several_threads(backend):
    """The extension releases the GIL: concurrent calls must not share scratch memory."""
    if backend.interpreted:
        pytest.skip("interpreted and emulated kernels keep their place in global variables")
    arguments = [inputs((40,), 300, 20 + 10 * i) for i in range(4)]
    results: list[tuple[Tensor, ...]] = [()] * 4

    def work(i: int) -> None:
        for _ in range(5):
            v, log_mass = backend.displacement(*arguments[i])
            results[i] = (v, *torch.autograd.grad(v.sum() + log_mass.sum(), arguments[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (x, t, x0), (v, *gradients) in zip(arguments, results, strict=True):
        truth = solve(x, t, x0)
        torch.testing.assert_close(v.detach(), truth.v, rtol=1e-9, atol=1e-9)
        ones = torch.ones(len(x), dtype=torch.float64)
        assert_gradients(differentiate(truth, x, x0, torch.ones_like(x), ones), *gradients)
