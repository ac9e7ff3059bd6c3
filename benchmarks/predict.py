# SPDX-License-Identifier: Apache-2.0
"""How long the kernels that a call launches should take: a prediction, part of roofline.md.

Each launch (launches.py) is taken apart by a model of its kernel (models.py, models_cuda.py), and
takes as long as what takes longest of it, at rates that kernels like ours were seen to reach.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

from benchmarks.chips import CHIPS, Chip
from benchmarks.launches import Launch, Problem, default_backend, record
from benchmarks.models import TRITON, Work
from benchmarks.models_cuda import CUDA
from benchmarks.routing import (
    CIFAR10,
    CIFAR10_8BIT,
    CUDA_8BIT,
    CUDA_CIFAR10,
    LEFT_64,
    NONE,
    NORMAL_64,
    Routing,
)


@dataclass(frozen=True)
class Rates:
    """What kernels reach, of the peaks of chips.py, and times in seconds.

    wgmma: Triton on Hopper, where it issues these; mma: of either backend on other chips;
    mma_hopper: of the CUDA kernels, which issue mma.sync, on Hopper. lookups: in a table of 256
    floats in the first-level cache, a second and multiprocessor. step: see models.py. launch: from
    the end of a kernel to the start of the next, where the host is ahead, or in a CUDA graph.
    """

    wgmma: float = 0.5
    mma: float = 0.75
    mma_hopper: float = 0.35
    memory: float = 0.85
    cache: float = 1
    float32: float = 0.7
    float64: float = 0.8
    lookups: float = 8 * 1.7e9
    step: float = 0.4e-6
    launch: float = 1e-6

    def tensor(self, chip: Chip, backend: str) -> float:
        if chip.capability[0] != 9:
            return self.mma
        return self.wgmma if backend == "triton" else self.mma_hopper


RATES = Rates()
EAGER_LAUNCH = 3e-6
"""A launch, where the GPU waits for the host."""
LETTERS = {
    "tensor": "T",
    "float32": "F",
    "float64": "D",
    "memory": "M",
    "cache": "C",
    "lookups": "L",
    "steps": "S",
}
CASES: list[tuple[Problem, dict[str, Routing]]] = [
    (problem, {"forward": forward, "backward": backward})
    for problem, forward, backward in (
        (Problem(512, 50_000, 3072), CIFAR10, CIFAR10),
        (Problem(512, 50_000, 3072, "uint8"), CIFAR10_8BIT, CIFAR10_8BIT),
        (Problem(128, 50_000, 3072), CIFAR10, CIFAR10),
        (Problem(128, 50_000, 3072, "uint8"), CIFAR10_8BIT, CIFAR10_8BIT),
        (Problem(4096, 50_000, 3072, "uint8"), CIFAR10_8BIT, CIFAR10_8BIT),
        (Problem(512, 8192, 64), LEFT_64, NORMAL_64),
        (Problem(1024, 16_384, 2), NONE, NONE),
        (Problem(1024, 16_384, 16), NONE, NONE),
        (Problem(4096, 50_000, 2), NONE, NONE),
    )
]
"""With how their queries are routed, by direction."""
BY_CUDA = ((CIFAR10, CUDA_CIFAR10), (CIFAR10_8BIT, CUDA_8BIT))
"""How `cuda` routes what `triton` routes so."""
SHOWN = CASES[:2]
"""Those whose kernels are listed."""


@dataclass(frozen=True)
class Kernel:
    """All launches of a kernel in one direction of a call; seconds without launching."""

    name: str
    launches: int
    programs: int
    waves: float
    work: Work
    seconds: float
    bound: str


def time_of(work: Work, chip: Chip, backend: str, rates: Rates = RATES) -> tuple[float, str]:
    """Seconds of one launch, and which of LETTERS takes them."""
    held = chip.multiprocessors * work.resident
    units = {
        "tensor": (work.tensor / chip.bfloat16 + work.integer / chip.int8)
        / (rates.tensor(chip, backend) * 1e12),
        "float32": work.float32 / (rates.float32 * chip.float32 * 1e12),
        "float64": work.float64 / (rates.float64 * chip.float64_units * 1e12),
        "lookups": work.lookups / (rates.lookups * chip.multiprocessors),
    }
    if work.working:  # a multiprocessor that has one program more than others makes all wait
        each = work.working / chip.multiprocessors
        units = {unit: seconds * math.ceil(each) / each for unit, seconds in units.items()}
    units["memory"] = work.memory / (rates.memory * chip.bandwidth * 1e12)
    units["cache"] = work.cache / (rates.cache * chip.cache * 1e12)
    units["steps"] = rates.step * max(work.longest, work.steps / held)
    bound = max(units, key=lambda unit: units[unit])
    return units[bound], bound


@functools.cache
def launches_on(
    problem: Problem, backend: str, capability: tuple[int, int], multiprocessors: int
) -> dict[str, tuple[list[Launch], int]]:
    """By direction: launches of the backend, and how many PyTorch makes."""
    recorded = record(problem, backend, capability, multiprocessors)
    return {name: (found.own, sum(found.calls.values())) for name, found in recorded.items()}


def kernels_of(
    problem: Problem,
    routing: Routing,
    chip: Chip,
    backend: str,
    direction: str = "forward",
    rates: Rates = RATES,
) -> list[Kernel]:
    """In the order of their first launches."""
    own, _ = launches_on(problem, backend, chip.capability, chip.multiprocessors)[direction]
    models = TRITON if backend == "triton" else CUDA
    found: dict[str, list[Kernel]] = {}
    for launch in own:
        sizes = SimpleNamespace(programs=launch.programs, **launch.sizes)
        work = models[launch.kernel](sizes, routing)
        seconds, bound = time_of(work, chip, backend, rates)
        waves = launch.programs / (chip.multiprocessors * work.resident)
        kernel = Kernel(launch.kernel, 1, launch.programs, waves, work, seconds, bound)
        found.setdefault(launch.kernel, []).append(kernel)
    return [_together(launches) for launches in found.values()]


def _together(launches: list[Kernel]) -> Kernel:
    """Work and programs are those of the launch that takes longest."""
    worst = max(launches, key=lambda kernel: kernel.seconds)
    seconds = sum(kernel.seconds for kernel in launches)
    return Kernel(
        worst.name, len(launches), worst.programs, worst.waves, worst.work, seconds, worst.bound
    )


def routed(routing: Routing, backend: str) -> Routing:
    other = (there for here, there in BY_CUDA if backend == "cuda" and here is routing)
    return next(other, routing)


def total(
    problem: Problem,
    routing: Routing,
    chip: Chip,
    backend: str,
    direction: str = "forward",
    rates: Rates = RATES,
) -> float:
    """Seconds of a call, PyTorch's launches counted as launches that take no time else."""
    own, torchs = launches_on(problem, backend, chip.capability, chip.multiprocessors)[direction]
    kernels = kernels_of(problem, routing, chip, backend, direction, rates)
    return sum(k.seconds for k in kernels) + rates.launch * (len(own) + torchs)


WORDS = f"""\
# Predictions

How long should what the backends launch take? **None of this has been measured**: it is a
prediction from the grids that are launched (`python -m benchmarks.launches`) and models of the
kernels (`models.py`, `models_cuda.py`), by which changes are chosen before there is a GPU, and
against which measurements are to be held. On Hopper by Triton 3.9 or later: earlier ones take the
first pass in smaller tiles (`configurations.py`), which takes longer. Each kernel takes as long as
what takes longest of it:

- **T** tensor cores, at {100 * RATES.wgmma:.0f} % of the peak by Triton on Hopper (published Triton
  kernels there: 37 % without TMA, 46–59 % in nearest-centroid search, 69–85 % for the best with
  products of three bfloat16 parts), {100 * RATES.mma_hopper:.0f} % by `mma.sync` on Hopper (as
  FlashAttention 2), {100 * RATES.mma:.0f} % on other chips (the lower end of what is reached on an
  A100);
- **M** memory, at {100 * RATES.memory:.0f} %; **C** the L2 cache, whose bandwidth is known from
  public microbenchmarks only, and not well; **F**, **D** the float32 and float64 units, at
  {100 * RATES.float32:.0f} and {100 * RATES.float64:.0f} % of the rate of multiply-adds, by
  instructions; **L** look-ups of 8-bit values in the table of what they stand for, eight a cycle;
- **S** steps that wait for one another, a load and what depends on it, {1e6 * RATES.step:g} µs each
  (a load from the L2 takes some 260 cycles, from memory some 500): those of the longest program, or
  those of all programs over as many as the chip holds at a time.

Of programs that are alike and long each multiprocessor does a whole number. References shared by
programs that run together come from memory once. A launch costs {1e6 * RATES.launch:g} µs where the
host is ahead or in a CUDA graph, else about {1e6 * EAGER_LAUNCH:g}; PyTorch's functions in the call
(one to six) count as launches alone. The last table says how far other assumptions move the sums.
"""


def page() -> str:
    """The second part of roofline.md."""
    calls = table(("B × N, d", "references", "", *(chip.name for chip in CHIPS)), _calls())
    headings = ("references", "float64", "tiles", "many", "dense", "blocks", "most")
    data = table(
        headings,
        [
            _routing("CIFAR-10", CIFAR10),
            _routing("CIFAR-10, 8-bit", CIFAR10_8BIT),
            _routing("… by `cuda`", CUDA_8BIT),
            _routing("CIFAR-10 by `cuda`", CUDA_CIFAR10),
            _routing("normal, 8,192 with d = 64, backward", NORMAL_64),
            _routing("… forward", LEFT_64),
        ],
    )
    shown = [", ".join(_shape(problem)) for problem, _ in SHOWN]
    moved = table(("assumption", *shown), _sensitivity())
    return "\n".join(
        [
            f"{WORDS}\n## Calls\n\nA call with displacement, log mass and what gradients need, "
            "references prepared; its backward pass, for queries. By the backend that is the "
            "default at that d; in brackets by `cuda` where that is not it. Wanted on an H100 at "
            "512 × 50,000, d = 3,072: 1.6 ms (float32) and 1 ms (8-bit), then 0.5.\n",
            calls,
            "## What the data have kernels do\n\nOf 512 queries (`python -m benchmarks.routing` "
            "counts them), of a query the mean: references taken by direct differences in float64; "
            "tiles of 256 with such. Queries that more than 64 references may matter to; those "
            "that the second product sums, since its error is certain to be small; blocks of 128 "
            "queries that have one. Most references in float64. Up to d = 32 there are none. "
            "CIFAR-10 by `triton`: by the rule of its kernels on distances in float64.\n",
            data,
            *_kernels(),
            "## What the assumptions move\n\nThe calls whose kernels are above, on an H100.\n",
            moved,
        ]
    )


def _calls() -> Iterator[tuple[str, ...]]:
    for problem, routings in CASES:
        backends = [default_backend(problem.dim)]
        if problem.dim > 128:  # between, `cuda` makes two passes of three parts: not counted yet
            backends.append("cuda")
        for direction, routing in routings.items():
            cells = []
            for chip in CHIPS:
                times = [
                    time(total(problem, routed(routing, backend), chip, backend, direction))
                    for backend in backends
                ]
                cells.append(" ".join([times[0], *(f"({other})" for other in times[1:])]))
            yield (*_shape(problem), direction, *cells)


def _shape(problem: Problem) -> tuple[str, str]:
    stored = "8-bit" if problem.stored == "uint8" else problem.stored
    return f"{problem.batch:,} × {problem.count:,}, d = {problem.dim:,}", stored


def _routing(name: str, r: Routing) -> tuple[str, ...]:
    shares = [f"{100 * share:.3g} %" for share in (r.many, r.dense, r.blocks)]
    return name, f"{r.candidates:,.0f}", f"{r.tiles:.3g}", *shares, f"{r.most:,}"


def _kernels() -> Iterator[str]:
    h100 = CHIPS[1]
    for problem, routings in SHOWN:
        for backend in ("triton", "cuda"):
            routing = routed(routings["forward"], backend)
            yield (
                f"## {', '.join(_shape(problem))}, {backend}, forward\n\nOf the longest launch of "
                f"each kernel on an {h100.name}: programs, waves, megabytes of memory and through "
                "the L2, gigaoperations by tensor cores, in float32 and in float64. Then all its "
                "launches.\n"
            )
            names = [chip.name for chip in CHIPS]
            on = {chip.name: kernels_of(problem, routing, chip, backend) for chip in CHIPS}
            rows = []
            for i, kernel in enumerate(on[h100.name]):
                work = kernel.work
                products = work.tensor + work.integer
                rows.append(
                    (
                        f"{kernel.name} × {kernel.launches}",
                        f"{kernel.programs:,}",
                        f"{kernel.waves:.2f}",
                        *(f"{n / 1e6:,.0f}" for n in (work.memory, work.cache)),
                        *(f"{n / 1e9:,.0f}" for n in (products, work.float32, work.float64)),
                        *(
                            f"{time(on[name][i].seconds)} {LETTERS[on[name][i].bound]}"
                            for name in names
                        ),
                    )
                )
            launching = []
            for chip in CHIPS:
                whole = total(problem, routing, chip, backend)
                launching.append(time(whole - sum(k.seconds for k in on[chip.name])))
            rows.append(("launching", *[""] * 7, *launching))
            sums = [f"**{time(total(problem, routing, chip, backend))}**" for chip in CHIPS]
            rows.append(("sum", *[""] * 7, *sums))
            headings = ("kernel", "programs", "waves", "MB", "L2 MB", "T", "F", "D", *names)
            yield table(headings, rows)


def _sensitivity() -> Iterator[tuple[str, ...]]:
    for name, rates in {
        "as above": RATES,
        "tensor cores at 37 % of the peak": Rates(wgmma=0.37),
        "… at 60 %": Rates(wgmma=0.6),
        "an L2 cache of half the bandwidth": Rates(cache=0.5),
        "… of twice": Rates(cache=2),
        "steps of 0.2 µs": Rates(step=0.2e-6),
        "steps of 0.8 µs": Rates(step=0.8e-6),
        "a launch of 3 µs": Rates(launch=EAGER_LAUNCH),
    }.items():
        yield (
            name,
            *(
                time(total(problem, routings["forward"], CHIPS[1], "triton", rates=rates))
                for problem, routings in SHOWN
            ),
        )


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{figures(1e6 * seconds)} µs"
    return f"{figures(1e3 * seconds)} ms"


def figures(value: float) -> str:
    """Three significant figures."""
    return f"{float(f'{value:.3g}'):,.7g}"
