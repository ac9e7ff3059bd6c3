# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.instruction_sets`: the field with each instruction set of this processor,
taking turns, as a Markdown table. Fails where one of them misses the accuracy contract.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from statistics import median

import torch
from torch import Tensor

from benchmarks.measure import Result, race
from benchmarks.peers import Field
from benchmarks.problems import Problem, Shape
from benchmarks.providers import OUR_TOLERANCES, Provider, ours
from benchmarks.report import figures, markdown, title
from pfgm_kernels import _C

TITLES = {
    "avx512vnni": "AVX-512 + VNNI",
    "avx512": "AVX-512",
    "avx2": "AVX2",
    "portable": "portable",
}


def shapes() -> list[Shape]:
    """Images are real ones where PFGM_DATA names their folder."""
    real = bool(os.environ.get("PFGM_DATA"))
    return [
        Shape(1024, 16384, 2, "normal"),
        Shape(512, 8192, 64, "normal"),
        Shape(512, 8192, 784, "mnist" if real else "synthetic"),
        Shape(128, 4096, 3072, "cifar10" if real else "synthetic"),
    ]


@contextmanager
def switched_to(instruction_set: str) -> Iterator[None]:
    before = _C.build_info()["instruction set"]
    _C.use_instruction_set(instruction_set)
    try:
        yield
    finally:
        _C.use_instruction_set(before)


def available() -> list[str]:
    """The instruction sets that this processor and this build have, best first."""
    found = []
    for name in TITLES:
        with suppress(ValueError), switched_to(name):
            found.append(name)
    return found


def provider(instruction_set: str) -> Provider:
    """Ours with a ReferenceSet; each call switches to the instruction set and back."""

    def prepare(problem: Problem, gradient: bool) -> Field:
        with switched_to(instruction_set):
            prepared = ours("cpu", prepared=True)(problem, gradient)

        def field(x: Tensor, t: Tensor) -> Tensor:
            with switched_to(instruction_set):
                return prepared(x, t)

        return field

    return Provider(TITLES[instruction_set], prepare, OUR_TOLERANCES, ours=True)


def main() -> int:
    providers = [provider(name) for name in available()]
    lines, right = [("", *map(str, providers))], True
    for shape in shapes():
        results = race(shape.problem(), "forward", providers)
        lines.append((title(asdict(shape)), *map(cell, results)))
        right &= all(result.status == "timed" for result in results)
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; median ms of a field by "
        "ReferenceSet, and the worst error of a row against float64 (relative, divided by its "
        f"condition number; at most {OUR_TOLERANCES[0]:.0e} or it is wrong and not timed).\n\n"
        + markdown(lines)
    )
    return 0 if right else 1


def cell(result: Result) -> str:
    if result.status == "timed":
        return f"{figures(1e3 * median(result.seconds))}, {result.error:.0e}"
    return f"{result.status}, {result.note or f'{result.error:.0e}'}"


if __name__ == "__main__":
    sys.exit(main())
