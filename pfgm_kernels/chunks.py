# SPDX-License-Identifier: Apache-2.0
"""The loops over chunks that every backend shares, forward, backward and in forward mode.

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

from pfgm_kernels.backends import BACKENDS, eager
from pfgm_kernels.cuts import Part, by_range, slices
from pfgm_kernels.merge import Partial, join
from pfgm_kernels.on_disk import OnDisk, Reader
from pfgm_kernels.outputs import Output
from pfgm_kernels.rows import Rows, Stored, begin, finish

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

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Inputs(NamedTuple):
    """x (B, *event) and values (N, *event), or (N, d), of any floating dtype (values: or uint8
    codes into table (256,)), or what stands for them in files; t (B,); operands and ranges: see
    `ops`.
    """

    x: Tensor
    t: Tensor
    values: Tensor | OnDisk
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
        batch, count = x.shape[0], values.shape[0]
        self.d = math.prod(values.shape[1:])
        self.dtype = result_dtype(x, values, inputs.table)
        on_disk = isinstance(values, OnDisk)
        copied = values_grad or not self._in_place
        share = workspace // 4
        self.workspace = workspace - share * (2 if copied else 1)
        ranges = inputs.ranges if batch else None
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
        self._ranges = ranges if together else None
        seen = [slice(0, count)] if together else slices(count, references)
        self.parts: list[Part] = [(queries, seen) for queries in slices(batch, rows, TILE)]
        if ranges is not None and not together:
            self.parts = by_range(ranges, rows, references, TILE)
        self._last: tuple[slice, tuple[Tensor, Tensor, list[Tensor]]] | None = None
        self._read: Reader | None = None
        if isinstance(values, OnDisk):
            order = [references for _, seen in self.parts for references in seen]
            self._read = Reader(values, order)

    @property
    def _in_place(self) -> bool:
        """Whether backends read the references where they are."""
        values = self.inputs.values
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
            read = self._read or self.inputs.values.__getitem__
            values = flatten(read(references))
            if operands:
                operands = self.module.operands_of(operands, references)
            else:
                operands = self.module.prepare(values, table, self.workspace * 5 // 8)
            self._last = references, (values, table, operands)
        return self._last[1]

    def stored(self, index: Tensor) -> Stored:
        """Rows (n,) of all references as they are stored: their place there, or else copies."""
        values, table = self.inputs.values, self.inputs.table
        if isinstance(values, Tensor) and self._in_place:
            return Stored(flatten(values), table, index)
        return Stored(flatten(values[index]), table, torch.arange(len(index), device=index.device))

    def forward(self, x: Tensor, t: Tensor, queries: slice, seen: list[slice]) -> Partial:
        """The four outputs of the backend for a chunk of queries and what they see."""
        total: Partial | None = None
        ranges = self.ranges(queries)
        within = [] if ranges is None else [ranges]
        for references in seen:
            values, table, operands = self.reference_rows(references)
            part = self.module.forward(x, t, values, table, operands, self.k, *within)
            if len(seen) == 1 and references.start == 0:
                return part
            to_anchor = Stored(values, table, part[2]).decode().sub_(x)
            part[2].add_(references.start)
            if total is None:
                total, to_nearest = part, to_anchor
            else:
                total, to_nearest = join(total, part, t, self.k, (to_nearest, to_anchor))
        assert total is not None
        return total


class Saved(NamedTuple):
    """What the forward pass leaves: v − (x0_a − x) (B, d) in the dtype of the computation, which
    holds more digits of a far query than v; the anchors a (B,) and the logs of their weights (B,).
    """

    residual: Tensor
    anchor: Tensor
    anchor_log_weight: Tensor

    def rows(self, chunks: Chunks, queries: slice) -> Rows:
        x, t = chunks.rows(queries)
        anchor, log_weight = self.anchor[queries], self.anchor_log_weight[queries]
        residual, stored = self.residual[queries], chunks.stored(anchor)
        return Rows(x, t, residual, stored, log_weight, chunks.k, chunks.ranges(queries))


def field_forward(
    inputs: Inputs, output: Output, save: bool, workspace: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = BACKENDS[backend]
    chunks = Chunks(inputs, workspace, module)
    if output.name == "mean" and chunks.d <= DIFFERENCES_DIM:
        chunks.dtype = torch.float64
    result = empty_result(inputs, output)
    log_mass, residual, *anchors = empty_rows(inputs, output, save)
    # Joined at the end, rows of chunks are one launch of a GPU. On a CPU they would lie between
    # what chunks free, which could not be used again.
    on_cpu = inputs.x.device.type == "cpu"
    parts: list[list[Tensor]] = []
    for queries, seen in chunks.parts:
        x, t = chunks.rows(queries)
        v, *part = chunks.forward(x, t, queries, seen)
        rows = Rows(x, t, residual[queries], chunks.stored(part[1]), part[2], chunks.k)
        getattr(module, "finish", finish)(rows, output, v, flatten(result[queries]))
        if on_cpu:
            for all_rows, each in zip((log_mass, *anchors), part, strict=True):
                if len(all_rows) > 0:
                    all_rows[queries] = each
        else:
            parts.append(part)
    if not on_cpu:
        found = [
            each[0] if len(each) == 1 else torch.cat(each) for each in zip(*parts, strict=True)
        ]
        log_mass = found[0] if output.name == "displacement" else log_mass
        anchors = found[1:] if save else anchors
    return result, log_mass, residual, anchors[0], anchors[1]


def field_backward(
    inputs: Inputs,
    output: Output,
    saved: Saved,
    g: Tensor | None,
    g_log_mass: Tensor | None,
    values_grad: bool,
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = Chunks(inputs, workspace, BACKENDS[backend], values_grad)
    if output.name != "displacement":
        g_log_mass = None  # a traced graph has zeros for what has no rows
    dx, dt, dvalues = empty_gradients(inputs, values_grad)
    sums: Gradients = (dx, dt, None)
    wanted: Gradients = (None, None, dvalues)
    seen = chunks.parts[0][1]
    if values_grad and len(chunks.parts) > 1 < len(seen):
        # Sums over the queries and over the references: neither fit a chunk, so each has a sweep.
        _sweep(chunks, chunks.parts, output, saved, g, g_log_mass, sums)
        for references in seen:
            parts = [(queries, [references]) for queries, _ in chunks.parts]
            _sweep(chunks, parts, output, saved, g, g_log_mass, wanted)
    else:
        wanted = (dx, dt, dvalues) if values_grad else sums
        _sweep(chunks, chunks.parts, output, saved, g, g_log_mass, wanted)
    return dx, dt, dvalues


def _sweep(
    chunks: Chunks,
    parts: list[Part],
    output: Output,
    saved: Saved,
    g: Tensor | None,
    g_log_mass: Tensor | None,
    wanted: Gradients,
) -> None:
    """Gradients from some parts, to what is wanted of dx, dt and dvalues.

    dvalues needs one chunk of queries or of references.
    """
    dx, dt, dvalues = wanted
    total: Tensor | None = None
    for queries, seen in parts:
        rows = saved.rows(chunks, queries)
        g_rows = None if g is None else flatten(g[queries])
        g_m = None if g_log_mass is None else g_log_mass[queries].contiguous()
        cotangents = getattr(chunks.module, "begin", begin)(rows, output, g_rows, g_m)
        for chunk in seen:
            stored = chunks.reference_rows(chunk)
            part = chunks.module.backward(rows, *stored, cotangents, dvalues is not None)
            if dvalues is not None and len(parts) == 1:
                _write(part, dvalues[chunk])
            elif dvalues is not None:
                total = part.double() if total is None else total.add_(part)
        if dx is not None and dt is not None:
            _write(cotangents.dx, dx[queries])
            dt[queries] = cotangents.dt
    if dvalues is not None and total is not None:
        _write(total, dvalues[parts[0][1][0]])


def field_jvp(
    inputs: Inputs,
    output: Output,
    saved: Saved,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Tangents of the result and of the log mass for those of x, t and values.

    With ẋ, ṫ, ẋ0 these, p_j = (x0_j − x)·(ẋ − ẋ0_j) and l̇ any number (see `_centre`):

        l̇_j = k (p_j − t ṫ)/s_j                        (D = ∞: p_j/t² + ‖x − x0_j‖² ṫ/t³)
        pull = Σ_j w_j ((l̇_j − l̇)(x0_j − x) + ẋ0_j),   slope = Σ_j w_j (l̇_j − l̇)
        d log_mass = l̇ + slope,   dv = pull − slope · v − ẋ
    """
    x_tangent, t_tangent, values_tangent = tangents
    # References that move are left to the portable sums, and so are backends without their own.
    module = BACKENDS[backend]
    if values_tangent is not None or not hasattr(module, "jvp"):
        module, inputs = eager, inputs._replace(operands=[])
    chunks = Chunks(inputs, workspace, module, values_tangent is not None)
    result, (log_mass, *_) = empty_result(inputs, output), empty_rows(inputs, output, False)
    for queries, seen in chunks.parts:
        rows = saved.rows(chunks, queries)
        x_rows, t_rows = torch.zeros_like(rows.v), torch.zeros_like(rows.t)
        if x_tangent is not None:
            x_rows += flatten(x_tangent[queries])
        if t_tangent is not None:
            t_rows += t_tangent[queries]
        anchor_tangent = x_rows
        if values_tangent is not None:
            anchor_tangent = x_rows - flatten(values_tangent[saved.anchor[queries]])
        count: int | Tensor = sum(part.stop - part.start for part in seen)
        if rows.ranges is not None:
            count = rows.ranges[:, 1] - rows.ranges[:, 0]
        centre = _centre(rows, anchor_tangent, t_rows, chunks.k, count)
        pull, slope = torch.zeros_like(rows.v), torch.zeros_like(rows.t)
        for references in seen:
            moving: tuple[Tensor, ...] = ()
            if values_tangent is not None:
                moving = (flatten(values_tangent[references]).double(),)
            stored = chunks.reference_rows(references)
            part = module.jvp(rows, *stored, x_rows, t_rows, centre, *moving)
            pull += part[0]
            slope += part[1]
        pull -= slope[:, None] * rows.v
        tangent = output.push(pull, x_rows, t_rows, rows.v, rows.t)
        _write(tangent.masked_fill(rows.singular[:, None], 0.0), result[queries])
        if output.name == "displacement":
            log_mass[queries] = slope.add_(centre).masked_fill_(rows.singular, 0.0)
    return result, log_mass


def _centre(
    rows: Rows, tangent: Tensor, t_tangent: Tensor, k: float, count: int | Tensor
) -> Tensor:
    """What the tangents of the logits are relative to (n,), for that of x − x0_a (n, d) and t (n,).

    The anchor's tangent: those of references that share the weight hardly differ from it. But zero
    where very many that lie much farther have the weight, so that its share of the sums cancels.
    """
    to_anchor, t = rows.anchor_x0 - rows.x, rows.t
    pull, square = (to_anchor * tangent).sum(1), to_anchor.square().sum(1)
    if math.isinf(k):
        return (pull + square * t_tangent / t) / t.square()
    slope = k * (pull - t * t_tangent) / (square + t.square())
    # The weights' mean beside the anchor's says how many times the anchor's s the others' are; the
    # anchor's tangent is then `ratio` times theirs.
    weight = rows.anchor_log_weight.exp()
    ratio = (weight * count) ** (2 / k)
    return torch.where(ratio > 4 * (1 + ratio * weight), 0.0, slope)


def result_dtype(x: Tensor, values: Tensor | OnDisk, table: Tensor) -> torch.dtype:
    """That of the result, and of the queries as backends take them: float32 or float64."""
    stored = table.dtype if values.dtype == torch.uint8 else values.dtype
    return torch.promote_types(torch.promote_types(x.dtype, stored), torch.float32)


def empty_result(inputs: Inputs, output: Output) -> Tensor:
    x, values = inputs.x, inputs.values
    dtype = result_dtype(x, values, inputs.table)
    return x.new_empty(output.shape(x, math.prod(x.shape[1:])), dtype=dtype)


def empty_rows(inputs: Inputs, output: Output, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_mass, and what is saved (see `Saved`); of no rows where they are not wanted."""
    x = inputs.x
    batch, d = x.shape[0], math.prod(x.shape[1:])
    saved = batch if save else 0
    return (
        x.new_empty(batch if output.name == "displacement" else 0, dtype=torch.float64),
        x.new_empty((saved, d), dtype=result_dtype(x, inputs.values, inputs.table)),
        x.new_empty(saved, dtype=torch.int64),
        x.new_empty(saved, dtype=torch.float64),
    )


def empty_gradients(inputs: Inputs, values_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dt and dvalues, each like what it is the gradient of; dvalues has no rows if it is not
    wanted."""
    x, t, values = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (inputs.x, inputs.t, inputs.values[: None if values_grad else 0])
    )
    return x, t, values


def flatten(rows: Tensor) -> Tensor:
    """(n, *event) as contiguous (n, d), 16-bit floats as float32; a view where it can be one."""
    if rows.is_floating_point() and rows.element_size() < 4:
        rows = rows.float()
    return rows.reshape(rows.shape[0], math.prod(rows.shape[1:])).contiguous()


def _write(rows: Tensor, out: Tensor) -> None:
    """rows (n, d) to out (n, *event) of any floating dtype, of which `flatten` may be a copy."""
    out.copy_(rows.view(out.shape))
