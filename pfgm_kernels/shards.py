# SPDX-License-Identifier: Apache-2.0
"""References of which each process of a group holds a part."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pfgm_kernels import roll_call
from pfgm_kernels.backends._values import decode
from pfgm_kernels.classes import Classes
from pfgm_kernels.merge import Partial, relative_logit
from pfgm_kernels.on_disk import OnDisk

QUERIES = ("replicated", "local")
RANGES = 6
"""Where functions of `ops` have the ranges of the queries among their arguments."""
HEADER = 512
"""Bytes that ranks compare at a time: always as many, so that calls that differ can."""


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
        classes: Classes | None,
        group: dist.ProcessGroup,
        queries: str,
    ) -> None:
        self.part, self.group, self.queries = part, group, queries
        self.dtype, self.device = part.dtype, part.device
        self.roll = roll_call.of(group)
        self.rank, self.world = self.roll.rank, self.roll.world
        self.roll.sets += 1
        self._number, self._asked = self.roll.sets, "ReferenceSet"
        alike = {
            "dtype": part.dtype,
            "event shape": tuple(event_shape),
            "low and high": table[[0, -1]].tolist() if len(table) else None,
            "queries": queries,
            "set with labels or without": classes is not None,
            "set with a sketch or without": isinstance(part, OnDisk) and part.near is not None,
        }
        with self.roll.call():
            here = len(classes.counts) if classes else 0
            found = self.agreed([len(part), here], alike)
            counts = [count for count, _ in found]
            self.start = sum(counts[: self.rank])
            self.shape = torch.Size([sum(counts), math.prod(event_shape)])
            self.classes = classes
            if classes:
                of_all = classes.counts.new_zeros(max(most for _, most in found))
                of_all[:here] = classes.counts
                self.sum(of_all)
                self.classes = classes.among(of_all)

    def __len__(self) -> int:
        return self.shape[0]

    def agreed(self, own: Sequence[int], alike: Mapping[str, object]) -> list[list[int]]:
        """Every rank's own numbers. Raises ValueError, on each, where ranks are not alike in what
        is to be the same, by its name.
        """
        same = {
            "number of calls": self.roll.calls,
            "set of those made": self._number,
            "function": self._asked,
            **alike,
        }
        text = json.dumps([[*own], {name: str(value)[:48] for name, value in same.items()}])
        header = torch.tensor(
            list(text.encode().ljust(HEADER)), dtype=torch.uint8, device=self.device
        )
        found = [json.loads(bytes(each)) for each in self.gathered(header).tolist()]
        (_, first), *others = found
        for rank, (_, other) in enumerate(others, 1):
            for name in [*first, *other]:
                if first.get(name) != other.get(name):
                    raise self.roll.alike(
                        ValueError(
                            f"ranks of sharded references expect one {name}, got "
                            f"{first.get(name)} on rank 0 and {other.get(name)} on rank {rank}"
                        )
                    )
        return [numbers for numbers, _ in found]

    def gathered(self, tensor: Tensor) -> Tensor:
        """(world, *shape) from tensors of one shape."""
        return self.roll.gather(tensor)

    def sum(self, *tensors: Tensor) -> None:
        """Puts the sums over the ranks in their place."""
        for tensor in tensors:
            self.roll.sum(tensor)

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, as a call by itself."""
        with self.roll.call():
            self._asked = "sum"
            self.agreed([], {"shape": tuple(tensor.shape)})
            total = tensor.clone()
            self.sum(total)
        return total

    def call(
        self, name: str, function: Callable[..., Any], args: Sequence[Any], rows: set[int]
    ) -> Any:
        """What a function of `ops` gives; rows: which of its arguments have a row a query."""
        run = self._answer
        if "torch._dynamo" in sys.modules:  # which is not to trace collectives
            run = torch.compiler.disable(run)
        return run(name, function, args, rows)

    def _answer(
        self, name: str, function: Callable[..., Any], args: Sequence[Any], rows: set[int]
    ) -> Any:
        with self.roll.call():
            self._asked = name
            if self.queries == "local":
                return self._for_all(function, args, rows)
            return function(*args)

    def rows(self, index: Tensor) -> Tensor:
        """Rows (n, d) of all references, 16 bits as float32, from the ranks that have them."""
        place = index - self.start
        mine = (place >= 0) & (place < len(self.part))
        rows = self.part[place.clamp(0, len(self.part) - 1)]
        rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        rows = rows * mine[:, None].to(rows.dtype)
        self.sum(rows)
        return rows

    def near(self, x: Tensor, t: Tensor, k: float, workspace: int) -> Tensor | None:
        """(m,) those of this rank's references that the queries (B, *event) need, by its sketch;
        None where they are all, or there is no sketch.
        """
        if not isinstance(self.part, OnDisk) or self.part.near is None or len(x) == 0:
            return None
        squares = self.gathered(self.part.near.nearest(x, workspace)).amin(0)
        found: Tensor | None = self.part.near.near_any(x, t, k, squares, len(self), workspace)
        return found

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

    def _for_all(self, function: Callable[..., Any], args: Sequence[Any], rows: set[int]) -> Any:
        """What the function gives for this rank's queries, where each rank has its own.

        The queries' ranges are here their classes (B, 1), of which each rank has its own range.
        """
        given = {i: args[i] for i in rows if isinstance(args[i], Tensor)}
        count = len(args[0])
        kinds = " ".join(f"{i}:{str(each.dtype)[6:]}" for i, each in sorted(given.items()))
        counts = [each[0] for each in self.agreed([count], {"kind of arguments": kinds})]
        start, most = sum(counts[: self.rank]), max(counts)

        def everyones(tensor: Tensor) -> Tensor:
            padded = tensor.new_zeros(most, *tensor.shape[1:])
            padded[:count] = tensor
            found = self.gathered(padded)
            return torch.cat([part[:n] for part, n in zip(found, counts, strict=True)])

        whole = {i: everyones(given[i]) for i in sorted(given)}
        order = back = None
        if RANGES in whole and self.classes is not None:
            classes = whole[RANGES][:, 0].clamp(max=len(self.classes.counts) - 1)
            order = classes.argsort(stable=True)  # those of a class together
            back = order.argsort()
            whole[RANGES] = self.classes.starts[classes[:, None] + classes.new_tensor([0, 1])]
            whole = {i: each[order] for i, each in whole.items()}
        results = function(*(whole.get(i, each) for i, each in enumerate(args)))

        def own(tensor: Tensor) -> Tensor:
            if len(tensor) != sum(counts):
                return tensor
            tensor = tensor if back is None else tensor[back]
            return tensor[start : start + count]

        return own(results) if isinstance(results, Tensor) else tuple(map(own, results))
