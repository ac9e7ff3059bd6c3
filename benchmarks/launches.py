# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.launches`: how many kernels a call launches on a GPU. No GPU is needed.

The op runs on tensors that hold no data, and what it would launch is recorded: the backend's own
kernels and those of the PyTorch functions around them, one for each call that computes something.
The kernels of the backend `cuda` are those that the emulated entry points say they would launch
(tests/cuda).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pfgm_kernels import loops
from pfgm_kernels.backends import BACKENDS, _native
from pfgm_kernels.chunks import Inputs, default_workspace
from pfgm_kernels.loops import Saved
from pfgm_kernels.outputs import Output

H100 = (9, 0), 132  # capability and multiprocessors
NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view")


@dataclass(frozen=True)
class Problem:
    """A call with displacement and log mass that keeps what its gradients need; t is float32."""

    batch: int
    count: int
    dim: int
    stored: str = "float32"
    """or "uint8" """
    prepared: bool = True
    """a ReferenceSet, or a plain tensor"""


GOALS: dict[Problem, tuple[int, int]] = {
    Problem(64, 1024, 2): (8, 10),
    Problem(64, 1024, 16): (8, 10),
    Problem(1024, 16_384, 2): (8, 10),
    Problem(1024, 16_384, 16): (8, 10),
    Problem(4096, 50_000, 2): (10, 12),
    Problem(100_000, 16_384, 2): (20, 24),
    Problem(100_000, 16_384, 16): (20, 24),
    Problem(512, 8192, 64): (14, 18),
    Problem(128, 50_000, 3072): (14, 18),
    Problem(512, 50_000, 3072): (28, 36),
    Problem(4096, 50_000, 3072): (220, 280),
    Problem(512, 50_000, 3072, prepared=False): (120, 150),
}
"""Launches of the forward and the backward pass, at most."""
OTHERS = [
    Problem(64, 1024, 16, "uint8"),
    Problem(512, 8192, 64, "uint8"),
    Problem(128, 50_000, 3072, "uint8"),
    Problem(512, 50_000, 3072, "uint8"),
]


@dataclass(frozen=True)
class Launch:
    """One kernel of a backend. sizes: what it is called with, by the names of its parameters:
    numbers, and of tensors the bytes of an element; of a kernel of `cuda` what its entry point is
    called with.
    """

    kernel: str
    programs: int
    sizes: dict[str, int]


CUDA_KERNELS: dict[tuple[str, bool], tuple[str, ...]] = {
    ("field_forward_cuda", False): (
        *("nearest", "anchor", "direct_sum", "direct_finish", "exact", "exact_combine"),
    ),
    ("field_backward_cuda", False): (
        *("direct_sum", "direct_finish_backward", "exact", "exact_combine"),
    ),
    ("field_forward_cuda", True): (
        *("split", "compare", "route", "weigh", "list", "rest", "sum"),
        *("exact", "exact_combine", "combine"),
    ),
    ("field_backward_cuda", True): (
        *("split", "compare", "route", "split", "compare", "weigh", "list", "rest", "sum"),
        *("exact", "exact_combine", "combine"),
    ),
    ("prepare_references_cuda", False): ("crowd",),
    ("prepare_references_cuda", True): ("origin", "split", "summarise"),
}
"""What the entry points launch, in this order, without and with products of matrices."""


@dataclass(frozen=True)
class Recorded:
    """One direction of a call."""

    own: list[Launch]
    """of the backend"""
    calls: dict[str, int]
    """of PyTorch functions that launch a kernel, by name"""
    allocations: int
    host_us: float


@dataclass(frozen=True)
class Launches:
    batch: int
    count: int
    dim: int
    stored: str
    prepared: bool
    direction: str
    backend: str
    launches: int
    kernels: dict[str, int]
    """launches of the backend, by kernel"""
    calls: dict[str, int]
    """of PyTorch functions that launch a kernel, by name"""
    allocations: int
    """tensors that PyTorch made"""
    host_us: float
    """of Python around them, on this CPU"""
    goal: int | None


class Calls(TorchDispatchMode):
    """Counts PyTorch's calls that launch a kernel, and the tensors that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.allocations = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        returns = function._schema.returns
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if isinstance(out, Tensor | tuple | list) and not views:
            self.calls[name] += name not in NO_LAUNCH
            self.allocations += sum(r.alias_info is None for r in returns)
        return out


@contextlib.contextmanager
def pretended_gpu(
    backend: str, capability: tuple[int, int], multiprocessors: int
) -> Iterator[list[Launch]]:
    """Launches of the backend are recorded, and do nothing."""
    found: list[Launch] = []
    with contextlib.ExitStack() as stack:
        if backend == "triton":
            _record_triton(stack, found, capability, multiprocessors)
        else:
            _record_cuda(stack, found, multiprocessors)
        yield found


def _record_triton(
    stack: contextlib.ExitStack,
    found: list[Launch],
    capability: tuple[int, int],
    multiprocessors: int,
) -> None:
    from triton.runtime.jit import JITFunction

    from pfgm_kernels.backends.triton import configurations

    def run(self: Any, *arguments: Any, grid: tuple[int, ...], **options: Any) -> None:
        sizes = dict(zip(self.arg_names, arguments, strict=False)) | options
        for name, value in sizes.items():
            sizes[name] = value.element_size() if isinstance(value, Tensor) else value
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        found.append(Launch(name.removesuffix("_kernel"), math.prod(grid), sizes))

    gpu = SimpleNamespace(
        major=capability[0], minor=capability[1], multi_processor_count=multiprocessors
    )
    for function in (configurations.kind, configurations.multiprocessors):
        function.cache_clear()
        stack.callback(function.cache_clear)
    stack.enter_context(mock.patch.object(JITFunction, "run", run))
    properties = mock.patch.object(torch.cuda, "get_device_properties", return_value=gpu)
    stack.enter_context(properties)
    known = mock.patch.object(torch.cuda, "get_device_capability", return_value=capability)
    stack.enter_context(known)


def _record_cuda(stack: contextlib.ExitStack, found: list[Launch], multiprocessors: int) -> None:
    from tests.cuda import emulated

    extension = emulated.build()  # that of the package asks for a device
    extension.set_multiprocessors(multiprocessors)
    stack.callback(extension.set_multiprocessors, 4)

    def launch(entry: str, **arguments: Any) -> int:
        if "workspace" in arguments:
            return 0
        told = (ctypes.c_int64 * 32)()  # more than any entry point launches
        somewhere = 1 << 20  # an address: nothing is read
        pointers = {
            name: somewhere if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        size = getattr(extension, entry)(**pointers, launches=ctypes.addressof(told))
        sizes = {
            name: value.element_size() if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        sizes["backward"] = entry == "field_backward_cuda"
        products = arguments["dim"] > BACKENDS["cuda"].MAX_DIRECT_DIM
        once = (entry.removesuffix("_cuda").removeprefix("field_"),)  # finish, begin
        kernels = CUDA_KERNELS.get((entry, products), once)
        programs = told[1 : 1 + told[0]]
        found.extend(
            Launch(kernel, blocks, sizes) for kernel, blocks in zip(kernels, programs, strict=True)
        )
        return size

    stack.enter_context(mock.patch.object(_native, "launch", launch))


def default_backend(d: int) -> str:
    return "cuda" if d <= BACKENDS["cuda"].MAX_DIRECT_DIM else "triton"


def record(
    problem: Problem,
    backend: str,
    capability: tuple[int, int] = H100[0],
    multiprocessors: int = H100[1],
    timed: bool = False,
) -> dict[str, Recorded]:
    """What the forward and the backward pass launch on such a GPU."""
    module = BACKENDS[backend]
    codes = problem.stored == "uint8"
    empty = functools.partial(torch.empty, device="meta")
    values = empty(problem.count, problem.dim, dtype=getattr(torch, problem.stored))
    table = empty(256 if codes else 0)
    x, t = empty(problem.batch, problem.dim), empty(problem.batch)
    output, workspace = Output("displacement", 0.0, 1.0), default_workspace(torch.device("cuda"))
    found = {}
    with pretended_gpu(backend, capability, multiprocessors) as launched:
        operands = module.prepare(values, table, values.nbytes) if problem.prepared else []
        inputs = Inputs(x, t, values, table, operands, problem.dim + 1.0)

        def forward() -> tuple[Tensor, ...]:
            return loops.field_forward(inputs, output, True, workspace, backend)

        v, log_mass, *saved = forward()

        def backward() -> tuple[Tensor, ...]:
            cotangents = torch.empty_like(v), torch.empty_like(log_mass)
            rows = Saved(*saved)
            return loops.field_backward(
                inputs, output, rows, *cotangents, False, workspace, backend
            )

        for direction, run in (("forward", forward), ("backward", backward)):
            launched.clear()
            with Calls() as calls:
                run()
            own, numbers = list(launched), +calls.calls
            host = _host_us(run) if timed else math.nan
            found[direction] = Recorded(own, dict(numbers), calls.allocations, host)
    return found


def count(problem: Problem, backend: str) -> list[Launches]:
    """Forward and backward."""
    found = []
    for direction, recorded in record(problem, backend, timed=True).items():
        goal = GOALS.get(problem)
        found.append(
            Launches(
                **asdict(problem),
                direction=direction,
                backend=backend,
                launches=len(recorded.own) + sum(recorded.calls.values()),
                kernels=dict(Counter(launch.kernel for launch in recorded.own)),
                calls=recorded.calls,
                allocations=recorded.allocations,
                host_us=recorded.host_us,
                goal=goal and goal[direction == "backward"],
            )
        )
    return found


def _host_us(run: Any) -> float:
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return round(1e6 * best, 1)


def table(found: list[Launches]) -> str:
    lines = [
        "| B × N, d | stored | prepared | direction | backend | launches | goal | own kernels "
        "| PyTorch calls | allocations | host, µs |",
        "| --- | --- | --- | --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for f in found:
        shape = f"{f.batch:,} × {f.count:,}, d = {f.dim:,}"
        own = sum(f.kernels.values())
        cells: list[object] = [
            shape,
            f.stored,
            "yes" if f.prepared else "no",
            f.direction,
            f.backend,
        ]
        cells += [f.launches, f.goal or "", own, f.launches - own, f.allocations]
        cells += [f"{f.host_us:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="a list of objects, with every count")
    parser.add_argument("--all", action="store_true", help="of both backends wherever they can")
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"
    found: list[Launches] = []
    for problem in (*GOALS, *OTHERS):
        names = ("cuda", "triton") if options.all else (default_backend(problem.dim),)
        for backend in names:
            found += count(problem, backend)
    print(json.dumps([asdict(f) for f in found], indent=1) if options.json else table(found))


if __name__ == "__main__":
    main()
