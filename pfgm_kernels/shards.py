# SPDX-License-Identifier: Apache-2.0
"""References of which each process of a group holds a part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pfgm_kernels.backends._values import decode
from pfgm_kernels.merge import Partial, relative_logit
from pfgm_kernels.on_disk import DTYPES, OnDisk

QUERIES = ("replicated", "local")
AXES = 8


class Sharded:
    """What stands for a tensor of references (N, d): the rows of all ranks, one rank after another.

    Every call is one of all ranks. What each finds among its own references is put together by the
    rule of `merge`: (log mass, displacement) relative to the nearest reference of all, whose row
    the rank that has it hands out.

    queries: "replicated", the same on each rank, or "local", each rank's own, which are gathered,
    answered by all and handed back.
    """

    requires_grad = False

    def __init__(
        self,
        part: Tensor | OnDisk,
        table: Tensor,
        event_shape: torch.Size,
        group: dist.ProcessGroup,
        queries: str,
    ) -> None:
        self.part, self.group, self.queries = part, group, queries
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.dtype, self.device = part.dtype, part.device
        axes = [*event_shape][:AXES]
        kinds = [*DTYPES.values(), torch.bfloat16]
        ends = [table[0].item(), table[-1].item()] if len(table) else [0.0, 0.0]
        mine = [len(part), kinds.index(part.dtype), *ends, QUERIES.index(queries), len(axes), *axes]
        found = self.agreed(
            mine + [0] * (AXES - len(axes)),
            "its own number of references", "dtype", "low", "high", "queries",
            *["event shape"] * (AXES + 1),
            free=1,
        )  # fmt: skip
        counts = [int(row[0]) for row in found]
        self.start = sum(counts[: self.rank])
        self.shape = torch.Size([sum(counts), math.prod(event_shape)])

    def __len__(self) -> int:
        return self.shape[0]

    def class_counts(self, counts: Tensor) -> Tensor:
        """How many references of each class there are in all, from those here (C,)."""
        most = max(int(row[0]) for row in self.agreed([len(counts)], "number of classes", free=1))
        total = counts.new_zeros(most)
        total[: len(counts)] = counts
        self.sum(total)
        return total

    def agreed(self, numbers: Sequence[float], *names: str, free: int = 0) -> list[list[float]]:
        """The numbers of every rank. Raises ValueError, on each, where ranks differ in others than
        the first ``free`` ones, and says in what.
        """
        mine = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        found = self.gathered(mine).tolist()
        for i, name in enumerate(names):
            if i < free:
                continue
            for rank, row in enumerate(found):
                if row[i] != found[0][i] and not (math.isnan(row[i]) and math.isnan(found[0][i])):
                    raise ValueError(
                        f"ranks of sharded references expect one {name}, got {found[0][i]:g} on "
                        f"rank 0 and {row[i]:g} on rank {rank}"
                    )
        return found

    def gathered(self, tensor: Tensor) -> Tensor:
        """(world, *shape) from tensors of one shape."""
        out = [torch.empty_like(tensor) for _ in range(self.world)]
        with lost_ranks():
            dist.all_gather(out, tensor.contiguous(), group=self.group)
        return torch.stack(out)

    def sum(self, *tensors: Tensor) -> None:
        """Puts the sums over the ranks in their place."""
        for tensor in tensors:
            with lost_ranks():
                dist.all_reduce(tensor, group=self.group)

    def rows(self, index: Tensor) -> Tensor:
        """Rows (n, d) of all references, 16 bits as float32, from the ranks that have them."""
        place = index - self.start
        mine = (place >= 0) & (place < len(self.part))
        rows = self.part[place.clamp(0, len(self.part) - 1)]
        rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        rows = rows * mine[:, None].to(rows.dtype)
        self.sum(rows)
        return rows

    def join(
        self,
        mine: Partial,
        to_anchor: Tensor,
        x: Tensor,
        t: Tensor,
        k: float,
        table: Tensor,
        absent: Tensor | None,
    ) -> tuple[Partial, Tensor]:
        """The partial result of all ranks from each one's own, and the rows (n, d) of its anchors.

        to_anchor: (n, d) from the queries to this rank's anchors. absent: (n,), of which queries
        this rank has no reference to see.
        """
        v, log_mass, anchor, log_weight = mine
        square = to_anchor.square().sum(1)
        if absent is not None:
            square = square.masked_fill(absent, math.inf)
        numbers = torch.stack([square, log_mass + log_weight, (anchor + self.start).double()])
        found = self.gathered(numbers)
        owner = found[:, 0].argmin(0)
        _, logit, index = found.gather(0, owner.expand(1, 3, -1))[0]
        rows = self.rows(index.long())
        to_nearest = decode(rows, table) - x
        mass = relative_logit(to_nearest, to_anchor, t, k) - log_weight
        if absent is not None:
            mass = mass.masked_fill(absent, -math.inf)
        total = self.gathered(mass).logsumexp(0)
        v = (mass - total).exp()[:, None] * v
        self.sum(v)
        return (v, logit + total, index.long(), -total), rows

    def for_all(self, function: Callable[..., Any], args: Sequence[Any], rows: set[int]) -> Any:
        """What `function` of `ops` gives for this rank's queries, where each rank has its own.

        rows: which of the arguments have a row a query.
        """
        count = len(args[0])
        counts = [int(row[0]) for row in self.agreed([count], "number of queries", free=1)]
        start, most = sum(counts[: self.rank]), max(counts)

        def everyones(tensor: Tensor) -> Tensor:
            padded = tensor.new_zeros(most, *tensor.shape[1:])
            padded[:count] = tensor
            found = self.gathered(padded)
            return torch.cat([part[:n] for part, n in zip(found, counts, strict=True)])

        whole = [
            everyones(each) if i in rows and isinstance(each, Tensor) else each
            for i, each in enumerate(args)
        ]
        results = function(*whole)

        def own(tensor: Tensor) -> Tensor:
            return tensor[start : start + count] if len(tensor) == sum(counts) else tensor

        return own(results) if isinstance(results, Tensor) else tuple(map(own, results))


def is_lost(error: RuntimeError) -> bool:
    """Whether it says that another rank is gone: gloo's errors have no type of their own, but name
    its sources.
    """
    return "/gloo/" in str(error) or isinstance(error, dist.DistError)


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Raises ConnectionError where another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise ConnectionError(
            "a rank that holds references is lost: it was killed, ended with an error, which it "
            "tells itself, or was silent for the timeout of the group"
        ) from error
