# SPDX-License-Identifier: Apache-2.0
"""What is measured, case by case, so that one that breaks the device or never ends takes no other
along: the process then replaces itself by a fresh one that goes on with the next case.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from benchmarks.gpu.results import BAD, GOOD, Entry, Results, key
from benchmarks.problems import Problem, Shape
from pfgm_kernels.backends import BACKENDS

KERNELS = ("triton", "cuda")
"""The backends with kernels for a GPU."""
STORED = ("float32", "uint8")

Measure = Callable[["Case"], Entry]


class UsedUpError(Exception):
    """What is measured wants a process in which nothing was measured before."""


@dataclass(frozen=True)
class Case:
    """One direction of one shape, with references stored as float32 or 8-bit, by one backend."""

    shape: Shape
    stored: str
    direction: str
    backend: str

    def __str__(self) -> str:
        return f"{self.backend} {self.shape} {self.stored} {self.direction}"

    def entry(self, what: str) -> Entry:
        return {"what": what, **asdict(self)}

    def refusal(self, device: torch.device) -> str | None:
        """Why the backend cannot run it."""
        return BACKENDS[self.backend].unsupported_reason(device)


@dataclass(frozen=True)
class Options:
    """What stages that measure are told."""

    device: torch.device
    dry_run: bool
    json: Path | None
    backends: tuple[str, ...]
    start: int
    patience: float
    runs: int


def options(arguments: list[str] | None = None) -> Options:
    """Of the command line, with the device ready: the GPU, or for a dry run the CPU, where Triton's
    kernels are interpreted and CUDA's emulated.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, help="adds results to this file")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, on tiny shapes")
    parser.add_argument("--backend", choices=KERNELS, help="this one alone")
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--patience", type=float, default=40, help="seconds for a case")
    parser.add_argument("--runs", type=int, default=3, help="that have to be equal")
    given = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("highest")  # whatever the environment says about TF32
    device = torch.device("cpu" if given.dry_run else "cuda")
    if given.dry_run:
        from tests.cuda import emulated
        from tests.triton import interpreted

        emulated.install(emulated.build())
        interpreted.install()
    backends = (given.backend,) if given.backend else KERNELS
    return Options(
        device, given.dry_run, given.json, backends, given.start, given.patience, given.runs
    )


def work_through(what: str, cases: Sequence[Case], measure: Measure, options: Options) -> int:
    """Adds an entry for each case, with what `measure` says of it, but for those that the JSON has
    as good. The exit status: 1 where one is bad or none is good.
    """
    results = None if options.json is None else Results(options.json)
    known = {key(e): e["status"] for e in results.latest(what)} if results else {}

    def record(case: Case, outcome: Entry) -> None:
        entry = case.entry(what) | outcome
        known[key(entry)] = entry["status"]
        print(f"{case}: {entry['status']} {entry.get('reason', '')}", flush=True)
        if results:
            results.append(entry)

    def give_up(case: Case, number: int) -> None:
        record(case, {"status": "hung", "reason": f"not done within {options.patience:.0f} s"})
        go_on(number + 1)

    fresh = True
    for number, case in enumerate(cases[options.start :], options.start):
        if known.get(key(case.entry(what))) in GOOD:
            continue
        print(f"{case} ...", flush=True)
        watch = threading.Timer(options.patience, give_up, (case, number))
        watch.daemon = True
        watch.start()
        try:
            outcome = outcome_of(case, measure, options.device)
        except UsedUpError as error:
            outcome = {"status": "failed", "reason": str(error)}
            if not fresh:
                go_on(number)
        finally:
            watch.cancel()
        fresh = False
        record(case, outcome)
        if outcome["status"] == "failed" and broken(options.device):
            go_on(number + 1)
    states = [known.get(key(case.entry(what))) for case in cases]
    return int(any(s in BAD for s in states) or not any(s in GOOD for s in states))


def outcome_of(case: Case, measure: Measure, device: torch.device) -> Entry:
    """What `measure` says, or why it could not."""
    reason = case.refusal(device)
    if reason is not None:
        return {"status": "refused", "reason": reason}
    try:
        return measure(case)
    except AssertionError as error:
        return {"status": "wrong", "reason": str(error)}
    except UsedUpError:
        raise
    except Exception as error:  # the other cases may tell more
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:1000]}


def broken(device: torch.device) -> bool:
    """Whether nothing will run on the device any more in this process."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return True
    return False


def go_on(number: int) -> None:
    """With that case, in a fresh process: of an error of a kernel a process never recovers."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], f"--start={number}"])


@lru_cache(2)
def problem_of(shape: Shape, rounded: bool, device: torch.device) -> Problem:
    """With the references of "normal" data rounded to 8 bits, where asked for."""
    problem = shape.problem(device)
    if not rounded:
        return problem
    codes = (127.5 + 32 * problem.x0).round().clamp(0, 255).to(torch.uint8)
    x0 = (-1 + 2 * codes.double() / 255).float()
    return Problem(problem.x * 64 / 255, problem.t * 64 / 255, x0, problem.cotangent, codes)
