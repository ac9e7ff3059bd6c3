# SPDX-License-Identifier: Apache-2.0
"""Ranks of a group that hold references, and what each returns."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lives import ends, fork, said
from torch import Tensor

SMALL = 1 << 20


def run(folder: Path, world: int, work: Callable[..., dict], *given: Any) -> list[dict]:
    """What `work(folder, rank, world, *given)` returns on each rank of a group."""
    codes = ends(fork(folder / "ranks", rank_of, [(work, folder, *given)] * world))
    assert codes == [0] * world, said(folder / "ranks", 0)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def rank_of(work: Callable[..., dict], folder: Path, *given: Any) -> None:
    torch.set_num_threads(1)
    join(60)
    rank = dist.get_rank()
    torch.save(work(folder, rank, dist.get_world_size(), *given), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def join(timeout: float) -> None:
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    options = {} if dist.is_torchelastic_launched() else alone
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout), **options)


def part(rows: Tensor, rank: int, world: int) -> Tensor:
    """Uneven ones: of each two ranks the second has but a few rows."""
    sizes = [len(rows) // world * (2 if i % 2 == 0 else 1) // 2 or 1 for i in range(world)]
    cuts = [min(sum(sizes[: i + 1]), len(rows) - world + i + 1) for i in range(world - 1)]
    return rows.tensor_split(cuts)[rank]
