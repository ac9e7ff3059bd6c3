# SPDX-License-Identifier: Apache-2.0
"""The chunks of a call: how its queries and references are cut, and what a backend gets of them.

Whatever the number of queries and references, a call takes its result, the workspace and at most
32 MiB. A quarter of the workspace and 12 MiB hold rows of queries in float64; where references
have to be copied (16-bit floats, strides) or get gradients, another quarter holds theirs; the rest
is the backend's.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from pfgm_kernels.cuts import Part, by_range, slices
from pfgm_kernels.merge import Partial, join, lose_digits, relative_logit
from pfgm_kernels.on_disk import OnDisk, Reader
from pfgm_kernels.rows import Stored
from pfgm_kernels.shards import Sharded

SLACK = 12 << 20
"""Bytes beyond the workspace for rows of queries, so that a small workspace is not slow."""
TILE = 64
"""Queries that kernels take at a time: of more, a chunk has a multiple."""
QUERY_ROWS = 16
"""Rows of d + 8 float64 that a query takes at most, here and in a backend."""
DIFFERENCES_DIM = 32
"""Up to so many columns kernels may sum float32 differences from the query. Where that is far, they
have too few digits of a mean."""
REFERENCE_ROWS = 3
"""Rows of float64 that a reference takes which is copied or gets gradients."""

FEWEST_READ = 256
"""References from files that a chunk has, if need be at the cost of reading them more often."""

References = Tensor | OnDisk | Sharded
"""(N, d), or (N, *event), and what stands for that."""


class Inputs(NamedTuple):
    """x (B, *event) and values (N, *event), or (N, d), of any floating dtype (values: or uint8
    codes into table (256,)), or what stands for them in files; t (B,); operands and ranges: see
    `ops`.
    """

    x: Tensor
    t: Tensor
    values: References
    table: Tensor
    operands: list[Tensor]
    k: float
    ranges: Tensor | None = None


class Chunks:
    """The chunks of a call, and its inputs chunk by chunk as backends take them."""

    def __init__(
        self, inputs: Inputs, workspace: int, module: ModuleType, values_grad: bool = False
    ) -> None:
        self.inputs, self.module, self.k = inputs, module, inputs.k
        x, values = inputs.x, inputs.values
        self.shards = values if isinstance(values, Sharded) else None
        self.values = values = values.part if isinstance(values, Sharded) else values
        batch, count = x.shape[0], values.shape[0]
        self.d = math.prod(values.shape[1:])
        self.dtype = result_dtype(x, values, inputs.table)
        on_disk = isinstance(values, OnDisk)
        copied = values_grad or not self._in_place
        share = workspace // 4
        self.workspace = workspace - share * (2 if copied else 1)
        ranges = inputs.ranges if batch else None
        self._absent = None
        if self.shards and ranges is not None:
            # Of a class that is not here some reference is taken, and counts for nothing.
            self._absent = ranges[:, 0] == ranges[:, 1]
            ranges = torch.where(self._absent[:, None], ranges.new_tensor([0, 1]), ranges)
        held = None if ranges is None or on_disk else getattr(module, "RANGES", None)
        most = int(ranges.diff().max()) if ranges is not None and held == "seen" else count
        if isinstance(values, OnDisk):
            most = min(most, max(1, share // values.row_bytes))
        shape = module.chunk_shape
        arguments = self.d, self.workspace, bool(inputs.operands), values_grad
        rows, references = shape(max(1, batch), most, *arguments)
        # Each chunk of queries reads the files anew: rather more of those than of the references.
        while on_disk and rows < batch and references > FEWEST_READ:
            rows, references = shape(batch, references // 2, *arguments)
        rows = min(rows, max(1, (share + SLACK) // (8 * QUERY_ROWS * (self.d + 8))))
        if copied and not on_disk:
            references = min(references, max(1, share // (8 * REFERENCE_ROWS * self.d)))
        together = held is not None and most <= references
        self._near: Tensor | None = None
        if self.shards:
            rows = self._of_all_ranks(rows, together)
            self._near = self.shards.near(x, inputs.t, self.k, share)
        if self._near is not None:  # in the place of what is read of a file at a time
            self.values = values[self._near]
            count = len(self._near)
        self._ranges = ranges if together else None
        seen = [slice(0, count)] if together else slices(count, references)
        self.parts: list[Part] = [(queries, seen) for queries in slices(batch, rows, TILE)]
        if ranges is not None and not together:
            self.parts = by_range(ranges, rows, references, TILE)
        self._last: tuple[slice, tuple[Tensor, Tensor, list[Tensor]]] | None = None
        self._read: Reader | None = None
        self._anchors: tuple[Tensor, Tensor] | None = None
        if isinstance(self.values, OnDisk):
            order = [references for _, seen in self.parts for references in seen]
            self._read = Reader(self.values, order)

    def _of_all_ranks(self, rows: int, together: bool) -> int:
        """How many queries all ranks take at a time; raises ValueError where calls differ."""
        assert self.shards
        x, t, labels = self.inputs.x, self.inputs.t, self.inputs.ranges is not None
        if labels and not together:
            raise ValueError(
                "labels of sharded references expect them in memory, a backend with kernels for "
                f"classes and a workspace for a class; got one of {self.workspace} bytes"
            )
        alike = {
            "number of queries": x.shape[0],
            "d + D": self.k,
            "call with labels or without": labels,
            "dtype of x": x.dtype,
        }
        alike |= {
            name: each.double().nan_to_num().sum().item() for name, each in (("x", x), ("t", t))
        }
        return min(row for (row,) in self.shards.agreed([rows], alike))

    @property
    def _in_place(self) -> bool:
        """Whether backends read the references where they are."""
        values = self.values
        return isinstance(values, Tensor) and values.is_contiguous() and values.element_size() != 2

    def rows(self, queries: slice) -> tuple[Tensor, Tensor]:
        """x (n, d) in the dtype that backends compute with, and t (n,) float64."""
        x = flatten(self.inputs.x[queries]).to(self.dtype)
        return x, self.inputs.t[queries].double().contiguous()

    def ranges(self, queries: slice) -> Tensor | None:
        """(n, 2), those that the backend has to keep to."""
        return None if self._ranges is None else self._ranges[queries].contiguous()

    def reference_rows(self, references: slice) -> tuple[Tensor, Tensor, list[Tensor]]:
        """values (n, d), table and operands: those of all references cut, or else prepared for a
        chunk and kept for as long as it is the same.
        """
        if self._last is None or self._last[0] != references:
            self._last = None
            table, operands = self.inputs.table, self.inputs.operands
            read = self._read or self.values.__getitem__
            values = flatten(read(references))
            if operands:
                operands = self.module.operands_of(operands, references)
            else:
                operands = self.module.prepare(values, table, self.workspace * 5 // 8)
            self._last = references, (values, table, operands)
        return self._last[1]

    def stored(self, index: Tensor) -> Stored:
        """Rows (n,) of all references as they are stored: their place there, or else copies."""
        values, table = self.values, self.inputs.table
        if self.shards:
            if self._anchors is None or self._anchors[0] is not index:
                self._anchors = index, self.shards.rows(index)
            rows = self._anchors[1]
            return Stored(rows, table, torch.arange(len(index), device=index.device))
        if isinstance(values, Tensor) and self._in_place:
            return Stored(flatten(values), table, index)
        return Stored(flatten(values[index]), table, torch.arange(len(index), device=index.device))

    def forward(self, x: Tensor, t: Tensor, queries: slice, seen: list[slice]) -> Partial:
        """The four outputs of the backend for a chunk of queries and what they see."""
        if self.shards is None:
            return self._own(x, t, queries, seen)[0]
        mine, to_anchor = self._own(x, t, queries, seen)
        assert to_anchor is not None
        if self._near is not None:
            mine = mine[0], mine[1], self._near[mine[2]], mine[3]
        absent = None if self._absent is None else self._absent[queries]
        total, rows = self.shards.join(mine, to_anchor, x, t, self.k, self.inputs.table, absent)
        self._anchors = total[2], rows
        return total

    def total(self, queries: slice, *sums: Tensor) -> None:
        """Puts sums over all references in the place of those over this rank's, (n,) or (n, d)."""
        if self.shards is None:
            return
        for each in sums:
            if self._absent is not None:
                each[self._absent[queries]] = 0.0
            self.shards.sum(each)

    def _own(
        self, x: Tensor, t: Tensor, queries: slice, seen: list[slice]
    ) -> tuple[Partial, Tensor | None]:
        """Those of this process's references, and what leads to the anchors (n, d) where that is
        asked for.
        """
        total: Partial | None = None
        to_nearest = to_anchor = nearer = None
        asked = self.shards is not None or (len(seen) > 1 and lose_digits(self.k, self.dtype))
        ranges = self.ranges(queries)
        within = [] if ranges is None else [ranges]
        for references in seen:
            values, table, operands = self.reference_rows(references)
            part = self.module.forward(x, t, values, table, operands, self.k, *within)
            if asked:
                to_anchor = Stored(values, table, part[2]).decode().sub_(x)
            if references.start > 0:
                part[2].add_(references.start)
            if total is None:
                total, to_nearest = part, to_anchor
                continue
            if to_nearest is not None and to_anchor is not None:
                nearer = relative_logit(to_nearest, to_anchor, t, self.k)
            total, closer = join(total, part, nearer)
            if to_nearest is not None and to_anchor is not None:
                to_nearest = torch.where(closer[:, None], to_anchor, to_nearest)
        assert total is not None
        return total, to_nearest


def default_workspace(device: torch.device, on_disk: bool = False) -> int:
    """Bytes. Files are read anew for every so many queries as it holds, so that more pays there."""
    if device.type == "cpu":
        return (768 if on_disk else 256) << 20
    return (2 if on_disk else 1) << 30


def result_dtype(x: Tensor, values: References, table: Tensor) -> torch.dtype:
    """That of the result, and of the queries as backends take them: float32 or float64."""
    stored = table.dtype if values.dtype == torch.uint8 else values.dtype
    return torch.promote_types(torch.promote_types(x.dtype, stored), torch.float32)


def flatten(rows: Tensor) -> Tensor:
    """(n, *event) as contiguous (n, d), 16-bit floats as float32; a view where it can be one."""
    if rows.is_floating_point() and rows.element_size() < 4:
        rows = rows.float()
    return rows.reshape(rows.shape[0], math.prod(rows.shape[1:])).contiguous()
