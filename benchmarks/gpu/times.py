# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.gpu.times time`: how long the field and its gradients take, on shapes in
the order of worth. What is timed is checked first, and again when a CUDA graph has replayed it.

`kernels` instead says which kernels a call launches: in a process of its own, since what
torch.profiler leaves behind makes all that comes after it slower. `once` calls the case of the
number `--start` once, for a profiler that looks on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.cases import (
    KERNELS,
    STORED,
    Case,
    Options,
    UsedUpError,
    options,
    problem_of,
    work_through,
)
from benchmarks.gpu.results import Entry
from benchmarks.measure import Call, calls_a_round, timed
from benchmarks.problems import GAMMA, Problem, Shape
from pfgm_kernels import ReferenceSet, poisson_field
from tests.op import oracle

SHAPES = [
    Shape(512, 50_000, 3072, "synthetic"),
    Shape(128, 50_000, 3072, "synthetic"),
    Shape(1024, 16_384, 16, "normal"),
    Shape(512, 8192, 64, "normal"),
    Shape(4096, 50_000, 2, "normal"),
    Shape(64, 1024, 2, "normal"),
    Shape(4096, 50_000, 3072, "synthetic"),
]
TINY = [Shape(9, 70, 48, "synthetic"), Shape(5, 40, 3, "normal")]
"""Of a dry run."""
DIRECTIONS = ("forward", "backward")
ROUNDS, PROFILED = 10, 3
"""Rounds that are timed, and calls that torch.profiler sees; in a dry run two and one."""


def cases(dry_run: bool, backends: Sequence[str] = KERNELS) -> list[Case]:
    return [
        Case(shape, stored, direction, backend)
        for shape in (TINY if dry_run else SHAPES)
        for stored in STORED
        for direction in DIRECTIONS
        for backend in backends
    ]


def main(what: str, given: Options) -> int:
    selected = cases(given.dry_run, given.backends)
    if what == "once":
        return call_once(selected[given.start], given)
    measure = {"time": time_case, "kernels": list_kernels}[what]
    return work_through(what, selected, lambda case: measure(case, given), given)


class Computation:
    """What is called for a case, and whether what comes of it is right."""

    def __init__(self, case: Case, device: torch.device) -> None:
        rounded = case.stored == "uint8" and case.shape.source == "normal"
        self.case, self.problem = case, problem_of(case.shape, rounded, device)
        named = case.shape.source != "normal" or case.shape.d <= 16
        self.tolerance = oracle.float32_contract(case.backend, named)
        if case.direction == "backward":
            self.tolerance = oracle.GRADIENT
        self.references = references_of(self.problem, case)

    def call(self) -> Call:
        """The field, or the gradients of a field that is computed now, on the current stream."""
        if self.case.direction == "forward":

            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (self._field(self.problem.x, self.problem.t),)

            return forward
        leaves = [part.detach().requires_grad_() for part in (self.problem.x, self.problem.t)]
        field, cotangent = self._field(*leaves), self.problem.cotangent
        return lambda: torch.autograd.grad(field, leaves, cotangent, retain_graph=True)

    def _field(self, x: Tensor, t: Tensor) -> Tensor:
        scale, backend = self.problem.scale, self.case.backend
        return poisson_field(x, t, self.references, gamma=GAMMA, scale=scale, backend=backend)

    def judge(self, results: tuple[Tensor, ...]) -> Entry:
        """Whether the results are right, and to what error."""
        exact = self.problem.exact
        rows = [result[exact.rows] for result in results]
        error = (exact.forward_error if len(rows) == 1 else exact.gradient_error)(*rows)
        entry = {"status": "timed", "error": error, "tolerance": self.tolerance}
        if error <= self.tolerance:
            return entry
        reason = f"the result is off by {error:.1e}, expected at most {self.tolerance:.0e}"
        return entry | {"status": "wrong", "reason": reason}


def references_of(problem: Problem, case: Case) -> ReferenceSet:
    if case.stored == "uint8":
        assert problem.images is not None
        return ReferenceSet.from_images(problem.images, backend=case.backend)
    return ReferenceSet(problem.x0, backend=case.backend)


def time_case(case: Case, given: Options) -> Entry:
    computation, device = Computation(case, given.device), given.device
    call = computation.call()
    entry = computation.judge(call())
    if entry["status"] == "wrong":
        return entry
    rounds = 2 if given.dry_run else ROUNDS
    entry |= {"seconds": rounds_of(call, device, rounds), "graph_seconds": None}
    if device.type != "cuda":
        return entry | {"graph_reason": "a CPU has no graphs"}
    try:
        replay, results = capture(computation.call, device)
    except RuntimeError as error:
        return entry | {"status": "failed", "reason": f"it cannot be captured: {error}"[:1000]}
    replay()
    replayed = computation.judge(results)
    if replayed["status"] == "wrong":
        return replayed | {"reason": f"replayed as a graph, {replayed['reason']}"}
    return entry | {"graph_seconds": rounds_of(replay, device, rounds)}


def rounds_of(call: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    count = calls_a_round(call, device)
    return [timed(call, device, count) for _ in range(rounds)]


def capture(
    prepare: Callable[[], Call], device: torch.device
) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """A CUDA graph of what `prepare` makes: its replay, and where that leaves the results."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # a backward pass runs on the stream of its forward pass
        call = prepare()
        call()
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        results = call()
    for result in results:
        result.fill_(float("nan"))
    return graph.replay, results


def list_kernels(case: Case, given: Options) -> Entry:
    """The GPU's kernels, copies and fills; on a CPU PyTorch's operations."""
    on_gpu, calls = given.device.type == "cuda", 1 if given.dry_run else PROFILED
    call = Computation(case, given.device).call()
    call()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        for _ in range(calls):
            call()
        if on_gpu:
            torch.cuda.synchronize(given.device)
    time, kind = "self_cpu_time_total", DeviceType.CPU
    if on_gpu:
        time, kind = "self_device_time_total", DeviceType.CUDA
    kernels = [
        {
            "name": event.key,
            "launches": event.count / calls,
            "seconds": getattr(event, time) / calls / 1e6,
        }
        for event in found.key_averages()
        if event.device_type == kind
    ]
    if not kernels:  # seen of a second profile of a process
        raise UsedUpError("torch.profiler saw no kernel")
    kernels.sort(key=lambda kernel: -kernel["seconds"])
    return {"status": "listed", "kernels": kernels}


def call_once(case: Case, given: Options) -> int:
    """Compiled, and then once between cudaProfilerStart and cudaProfilerStop."""
    print(case, flush=True)
    call = Computation(case, given.device).call()
    call()
    if given.device.type == "cuda":
        torch.cuda.synchronize(given.device)
        with torch.cuda.profiler.profile():
            call()
            torch.cuda.synchronize(given.device)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], options(sys.argv[2:])))
