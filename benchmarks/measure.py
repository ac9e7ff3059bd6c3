# SPDX-License-Identifier: Apache-2.0
"""How it is measured: correctness first, then memory, then time, the providers alternating."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers import Field, RefusedError
from benchmarks.problems import Problem
from benchmarks.providers import Provider
from pfgm_kernels.memory import PeakMemory

DIRECTIONS = ("forward", "gradient")
"""The field, or the field and its gradients for x and t together, as a training step needs them."""
SECONDS, PATIENCE = 1.0, 2.0
MIN_ROUNDS, MAX_ROUNDS = 3, 50
"""A provider plays for SECONDS and MIN_ROUNDS, but not beyond PATIENCE seconds or MAX_ROUNDS."""
GPU_SECONDS = 0.3
"""Instead of SECONDS on a GPU, where nobody else computes and times vary little."""
GPU_ROUND, GPU_CALLS = 0.01, 20
"""Calls follow one another for as many seconds, but no more than GPU_CALLS: a round on a GPU."""
WHOLE_BYTES = 2 << 30
WHOLE_SECONDS, LONGEST = 2.0, 6.0
"""A provider that needs more for all queries at once is run on the checked queries alone; it is
refused where these take longer than LONGEST.
"""

Call = Callable[[], tuple[Tensor, ...]]


@dataclass
class Result:
    """One provider on one problem. status: "timed", or not: "wrong", "refused" or "failed".

    queries: how many of the problem's B were run; `seconds` are scaled by B / queries.
    """

    provider: str
    ours: bool
    tolerance: float
    status: str = "timed"
    note: str = ""
    queries: int = 0
    error: float | None = None
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)


def race(problem: Problem, direction: str, providers: Sequence[Provider]) -> list[Result]:
    """Checks every provider, then times those that passed, in rounds of shuffled order, so that
    whatever else the machine does hits all of them alike.
    """
    results, entries, device = [], [], problem.x.device
    for provider in providers:
        result, call = qualify(problem, direction, provider)
        results.append(result)
        if call is not None:
            entries.append((result, call, calls_a_round(call, device)))
    order = random.Random(0)
    gc.collect()
    least = GPU_SECONDS if device.type == "cuda" else SECONDS
    while entries := [entry for entry in entries if not _done(entry[0].seconds, least)]:
        order.shuffle(entries)
        for result, call, count in entries:
            result.seconds.append(timed(call, device, count))
    for result in results:
        result.seconds = [s * len(problem.x) / result.queries for s in result.seconds]
    return results


def calls_a_round(call: Call, device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return max(1, min(GPU_CALLS, int(GPU_ROUND / timed(call, device))))


def _done(seconds: list[float], least: float) -> bool:
    enough = sum(seconds) >= least and len(seconds) >= MIN_ROUNDS
    return enough or sum(seconds) >= PATIENCE or len(seconds) >= MAX_ROUNDS


def qualify(problem: Problem, direction: str, provider: Provider) -> tuple[Result, Call | None]:
    """Prepares a provider, runs it once, and checks that run's values and peak memory.

    Returns the result so far, and the call to time: None where it was refused or is wrong.
    """
    gradient = direction == "gradient"
    result = Result(provider.name, provider.ours, provider.tolerances[gradient])
    exact, device = problem.exact, problem.x.device
    try:
        prepared = provider.prepare(problem, gradient)
        queries, chunk, result.note = _portion(problem, gradient, provider, prepared)
        result.queries = len(queries)
        # One query first: libraries loaded, code generated and threads started are not temporaries.
        first = queries if provider.one_batch_size else queries[:1]
        _call(problem, gradient, prepared, first, len(first))()
        call = _call(problem, gradient, prepared, queries, chunk)
        with PeakMemory(device) as peak:
            outputs = call()
        result.peak_bytes = peak.extra_bytes
    except (RefusedError, torch.OutOfMemoryError) as refusal:
        result.status, result.note = "refused", str(refusal).splitlines()[0]
        return result, None
    except Exception as error:  # a library or kernel that does not work here must not stop the race
        result.status, result.note = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
        return result, None
    if len(queries) == len(problem.x):
        outputs = tuple(output[exact.rows] for output in outputs)
    result.error = exact.gradient_error(*outputs) if gradient else exact.forward_error(*outputs)
    if not result.error <= result.tolerance:
        result.status = "wrong"
        return result, None
    return result, call


def _portion(
    problem: Problem, gradient: bool, provider: Provider, prepared: Field
) -> tuple[Tensor, int, str]:
    """The queries that the provider is run on, how many at a time, and a note if not all."""
    batch, device = len(problem.x), problem.x.device
    everything, rows = torch.arange(batch, device=device), problem.exact.rows
    if provider.temporaries is None:
        return everything, batch, ""
    per_query = provider.temporaries(problem, gradient)
    gibibytes = f"{batch * per_query / 2**30:.1f} GiB"
    free = _free_bytes(device) // 2
    if per_query > free:
        raise RefusedError(
            f"out of memory: {per_query / 2**30:.1f} GiB a query, {gibibytes} at once"
        )
    few = rows[: torch.get_num_threads()]
    trial = _call(problem, gradient, prepared, few, 1)
    trial()
    seconds = timed(trial, device) / len(few)
    if len(rows) * seconds > LONGEST:
        raise RefusedError(f"too slow: about {batch * seconds:,.0f} s a call")
    fits = batch * per_query <= min(WHOLE_BYTES, free)
    if fits and batch * seconds <= WHOLE_SECONDS:
        return everything, batch, ""
    whole = f"all at once: {f'about {batch * seconds:,.0f} s' if fits else gibibytes}"
    chunk = min(len(rows), max(1, min(WHOLE_BYTES, free) // per_query))
    return rows, chunk, f"{len(rows)} of {batch} queries, scaled; {whole}"


def _call(problem: Problem, gradient: bool, prepared: Field, queries: Tensor, chunk: int) -> Call:
    """The computation as one function: (the field (b, d + 1),), or the gradients (b, d), (b,)."""
    inputs = (problem.x[queries], problem.t[queries], problem.cotangent[queries])
    parts = list(zip(*(tensor.split(chunk) for tensor in inputs), strict=True))

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (_joined([prepared(x, t) for x, t, _ in parts]),)

    def gradients() -> tuple[Tensor, ...]:
        pairs = []
        for x, t, cotangent in parts:
            leaves = (x.detach().requires_grad_(), t.detach().requires_grad_())
            pairs.append(torch.autograd.grad(prepared(*leaves), leaves, cotangent))
        return tuple(_joined(column) for column in zip(*pairs, strict=True))

    return gradients if gradient else forward


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def timed(call: Call, device: torch.device, count: int = 1) -> float:
    """Seconds of one call. On a GPU by its own clock, of `count` calls that follow one another: as
    in training the host prepares one while the GPU computes the one before.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
