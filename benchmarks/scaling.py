# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.scaling`: what a call costs where processes share the references out, as a
Markdown table. Takes under two minutes; times mean something on a machine that does nothing else.

1, 2 and 4 processes of one thread each, the same queries on each rank: CIFAR-10 where PFGM_DATA
names its folder, else synthetic images. Strong scaling has one number of references for all, weak
scaling that many for each process. Efficiency is the time of one process, which needs no group,
over that of p: p times it where the work is shared out. Bytes are those that the kernel counts on
a rank's sockets while it makes one call, the most of any rank, beside the floor of 8 B (d + 2): a
partial result in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.problems import GAMMA, Shape
from benchmarks.report import figures, markdown
from pfgm_kernels import ReferenceSet, poisson_field

WORLDS, DIM, PASSES, ROUNDS, TOLERANCE = (1, 2, 4), 3072, 2, 5, 1e-5
BYTES_SENT = 200
"""Where Linux's struct tcp_info has tcpi_bytes_sent, 8 bytes."""


@dataclass(frozen=True)
class Job:
    scaling: str
    """"strong" or "weak"."""
    world: int
    batch: int
    references: int
    """Of all processes."""


@dataclass
class Measured:
    """Of one call, by its direction: seconds of each round, those of the slowest rank, and the
    bytes that a rank sends.
    """

    job: Job
    seconds: dict[str, list[float]]
    bytes_sent: dict[str, int]
    floor: int
    error: float
    """The largest difference from the field of one process, relative to its norm."""


def jobs(batch: int, references: int) -> list[Job]:
    one = [Job("strong", world, batch, references) for world in WORLDS]
    return one + [Job("weak", world, batch, references * world // 4) for world in WORLDS]


def bytes_sent() -> int:
    """By TCP from this process, over all sockets that it has."""
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(descriptor))) as each:
            info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            total += struct.unpack_from("Q", info, BYTES_SENT)[0]
    return total


def rank_of(rank: int, world: int, folder: str, given: list[Job]) -> None:
    torch.set_num_threads(1)
    group = None
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/store", timedelta(minutes=2), world, rank)
        group = dist.group.WORLD
    found = [measured(job, rank, group) for job in given]
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    if group:
        dist.barrier()
        dist.destroy_process_group()


def measured(job: Job, rank: int, group: dist.ProcessGroup | None) -> dict[str, object]:
    kind = "cifar10" if os.environ.get("PFGM_DATA") else "synthetic"
    problem = Shape(job.batch, job.references, DIM, kind).problem()
    assert problem.images is not None
    references = ReferenceSet.from_images(problem.images.tensor_split(job.world)[rank], group=group)
    field = poisson_field(problem.x, problem.t, references, gamma=GAMMA)
    error = 0.0
    if rank == 0:
        alone = poisson_field(problem.x, problem.t, problem.reference_set(), gamma=GAMMA)
        error = ((field - alone).norm(dim=1) / alone.norm(dim=1)).max().item()
    x, t = problem.x.clone().requires_grad_(), problem.t.clone().requires_grad_()

    def gradients() -> None:
        field = poisson_field(x, t, references, gamma=GAMMA)
        torch.autograd.grad(field, (x, t), problem.cotangent)

    def forward() -> None:
        poisson_field(problem.x, problem.t, references, gamma=GAMMA)

    seconds, sent = {}, {}
    for name, call in (("forward", forward), ("forward + backward", gradients)):
        call()
        before = bytes_sent()
        call()
        sent[name] = int(most(torch.tensor(float(bytes_sent() - before)), group))
        times = []
        for _ in range(ROUNDS):
            if group:
                dist.barrier()
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        seconds[name] = most(torch.tensor(times, dtype=torch.float64), group).tolist()
    floor = 8 * job.batch * (DIM + 2)
    return asdict(Measured(job, seconds, sent, floor, error))


def most(numbers: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Of all ranks."""
    if group:
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers


def run(given: list[Job]) -> list[Measured]:
    """Every job of as many processes, in processes of its own."""
    world = given[0].world
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_of, (world, folder, given), nprocs=world)
        found = json.loads(Path(folder, "found.json").read_text())
    return [Measured(**(each | {"job": Job(**each["job"])})) for each in found]


def table(found: list[Measured]) -> str:
    head = "scaling", "processes", "references", "call", "ms", "efficiency", "MB sent", "floors"
    lines: list[tuple[str, ...]] = [head]
    one = {each.job.scaling: each for each in found if each.job.world == 1}
    for each in found:
        job = each.job
        for name, seconds in each.seconds.items():
            gain = median(one[job.scaling].seconds[name]) / median(seconds)
            gain /= job.world if job.scaling == "strong" else 1
            sent = each.bytes_sent[name]
            wire = (f"{sent / 1e6:.2f}", f"{sent / each.floor:.2f}") if job.world > 1 else ("", "")
            row = job.scaling, f"{job.world}", f"{job.references:,}", name
            lines.append((*row, figures(1e3 * median(seconds)), f"{gain:.2f}", *wire))
    return markdown(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=128, help="queries of a call")
    parser.add_argument("--references", type=int, default=50_000, help="of all in strong scaling")
    parser.add_argument("--json", type=Path, help="a file for every number")
    options = parser.parse_args()
    made = jobs(options.batch, options.references)
    found: dict[Job, Measured] = {}
    for _ in range(PASSES):
        for world in WORLDS:
            for each in run([job for job in made if job.world == world]):
                known = found.setdefault(each.job, each)
                if known is not each:
                    for name, seconds in each.seconds.items():
                        known.seconds[name] += seconds
    results = [found[job] for job in made]
    worst = max(each.error for each in results)
    print(
        f"{options.batch} queries, d = {DIM}, one thread a process, {os.cpu_count()} processors, "
        f"torch {torch.__version__}; medians of {PASSES * ROUNDS} calls by the slowest rank; the "
        f"field differs from one process's by {worst:.0e} at most.\n\n" + table(results)
    )
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in results], indent=1) + "\n")
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
