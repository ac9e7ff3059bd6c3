# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.gpu.fill`: Triton kernels into Triton's cache, each compiled by one of as
many processes as there are cores, before the stages that would do so one after the other.

As tests/triton/aot.py does it: the backend is called with tensors that hold no data, and what it
launches is compiled and not run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu import small, times
from tests.triton import aot

EDGES = (3, 32, 33, 128, 129, 300)
"""Dimensions at both ends of what a road is for, which the self-check and the tests look at."""


def uses() -> list[aot.Use]:
    """What the other stages call."""
    timed = [
        aot.Use(s.d, dtype, B=s.B, N=s.N)
        for s in times.SHAPES
        for dtype in (torch.float32, torch.uint8)
    ]
    checked = [
        aot.Use(s.d, getattr(torch, stored), values_grad=stored == "float32", B=s.B, N=s.N)
        for s, stored in small.SHAPES
    ]
    edges = [
        aot.Use(d, dtype, gaussian, dtype != torch.uint8, B=131, N=277)
        for d in EDGES
        for dtype in (torch.float32, torch.uint8, torch.float64)
        for gaussian in (False, True)
    ]
    return [*timed, *checked, *edges, *aot.USES.values()]


DRY_RUN = [aot.Use(16, B=40, N=300)]


def compile_share(uses: Iterable[aot.Use], number: int, count: int) -> tuple[int, int]:
    """Every count-th of the kernels that the uses launch, beginning with the given one: how many
    were compiled of how many. Raises what the last that failed raised.
    """
    from triton.runtime.jit import JITFunction

    run, seen, failure, mine = JITFunction.run, set(), None, 0

    def compile_only(
        self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any
    ) -> None:
        nonlocal failure, mine
        kernel = (self.fn.__name__, *map(kind_of, args), *sorted(map(str, options.items())))
        if kernel in seen:
            return
        seen.add(kernel)
        if len(seen) % count == number:
            mine += 1
            try:
                run(self, *args, grid=grid, warmup=True, **options)
            except Exception as error:  # the other kernels may do
                traceback.print_exc()
                failure = error

    with mock.patch.object(JITFunction, "run", compile_only):
        for use in uses:
            aot.run(use)
    if failure is not None:
        raise failure
    return mine, len(seen)


def kind_of(argument: Any) -> object:
    """Triton compiles anew for another dtype and alignment, and for integers that are 1, multiples
    of 16 or beyond 32 bits.
    """
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument >> 31
    return type(argument)


@contextlib.contextmanager
def chip(dry_run: bool) -> Iterator[None]:
    """The GPU's properties for tensors that are on no device; for a dry run those of an H100."""
    if dry_run:
        with aot.pretend(aot.CHIPS["sm_90"]):
            yield
    else:
        properties = torch.cuda.get_device_properties(0)
        with mock.patch.object(torch.cuda, "get_device_properties", return_value=properties):
            yield


def work(number: int, count: int, dry_run: bool) -> None:
    with chip(dry_run):
        mine, every = compile_share(DRY_RUN if dry_run else uses(), number, count)
    print(f"process {number}: compiled {mine} of {every} kernels", flush=True)


def main(dry_run: bool) -> int:
    count = 2 if dry_run else len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(n, count, dry_run)) for n in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return int(any(process.exitcode for process in processes))


if __name__ == "__main__":
    sys.exit(main("--dry-run" in sys.argv))
