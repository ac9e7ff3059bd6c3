# SPDX-License-Identifier: Apache-2.0
"""Does what only a GPU can show hold: capture in a graph, streams, several devices?"""

from __future__ import annotations

import pytest
import torch
from cases import seeded
from oracle import assert_displacement, float32_contract, solve
from torch import Tensor

from pfgm_kernels import ReferenceSet, choice, poisson_displacement, proof
from pfgm_kernels.backends import BACKENDS

DIMS = [3, 64, 300]  # one for each path


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    reason = BACKENDS[request.param].unsupported_reason(torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)
    return request.param


def problem(d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = seeded(seed)
    x0, x = (torch.randn(n, d, generator=generator) for n in (300, 40))
    return x, d**0.75 * (0.5 + torch.rand(40, generator=generator)), x0


def check(v: Tensor, backend: str, x: Tensor, t: Tensor, x0: Tensor) -> None:
    truth = solve(x, t, x0)
    assert truth.effective_sample_size.max() > 2
    assert_displacement(v.detach().cpu(), truth, float32_contract(backend))


@pytest.mark.parametrize("d", DIMS)
def test_a_graph_replays_the_op(backend, d):
    """Captured once, for queries of one kind; replayed for others."""
    x, t, x0 = problem(d)
    references = ReferenceSet(x0.cuda(), backend=backend)
    queries, times = x.cuda(), t.cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles what capture could not
        poisson_displacement(queries, times, references)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        v, _ = poisson_displacement(queries, times, references)
    for seed, factor in ((1, 1.0), (2, 1e-3)):
        x, t, _ = problem(d, seed)
        x[0], t = x0[0], factor * t
        queries.copy_(x)
        times.copy_(t)
        graph.replay()
        torch.testing.assert_close(v, poisson_displacement(queries, times, references)[0])
        if factor == 1:
            check(v, backend, x, t, x0)


@pytest.mark.parametrize("d", DIMS)
def test_a_stream_of_ones_own(backend, d):
    """Nothing runs on another stream, where it would not wait for its inputs."""
    x, t, x0 = problem(d)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        queries, times, rows = (part.cuda(non_blocking=True) for part in (x, t, x0))
        v, _ = poisson_displacement(queries, times, rows, backend=backend)
    stream.synchronize()
    check(v, backend, x, t, x0)


@pytest.mark.parametrize("d", DIMS)
def test_the_second_of_two_devices(backend, d):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    x, t, x0 = (part.to("cuda:1") for part in problem(d))
    x.requires_grad_()
    v, _ = poisson_displacement(x, t, x0, backend=backend)
    (dx,) = torch.autograd.grad(v.sum(), x)
    assert v.device == dx.device == x.device
    assert torch.cuda.current_device() == 0
    check(v, backend, x.detach().cpu(), t.cpu(), x0.cpu())


@pytest.mark.parametrize("d", DIMS)
def test_kernels_prove_themselves_before_a_graph_is_captured(monkeypatch, tmp_path, backend, d):
    monkeypatch.setattr(proof, "_verdicts", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "preferred", lambda *_: (backend, "eager"))
    x, t, x0 = problem(d)
    queries, times, rows = (part.cuda() for part in (x, t, x0))
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.ones_like(queries)
        with pytest.raises(RuntimeError, match="yet to prove itself"):
            poisson_displacement(queries, times, rows)
    check(poisson_displacement(queries, times, rows)[0], backend, x, t, x0)
    assert [verdict.passed for verdict in proof._verdicts.values()] == [True]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        v, _ = poisson_displacement(queries, times, rows)
    graph.replay()
    check(v, backend, x, t, x0)
