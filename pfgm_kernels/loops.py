# SPDX-License-Identifier: Apache-2.0
"""The loops over chunks that every backend shares, forward, backward and in forward mode."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pfgm_kernels.backends import BACKENDS, eager
from pfgm_kernels.chunks import DIFFERENCES_DIM, Chunks, Inputs, flatten, result_dtype
from pfgm_kernels.cuts import Part
from pfgm_kernels.outputs import Output
from pfgm_kernels.rows import Rows, begin, finish

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


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
        if chunks.shards:  # what does not come of references counts once
            direct = cotangents.dx.clone(), cotangents.dt.clone()
            cotangents.dx.zero_()
            cotangents.dt.zero_()
        for chunk in seen:
            stored = chunks.reference_rows(chunk)
            part = chunks.module.backward(rows, *stored, cotangents, dvalues is not None)
            if dvalues is not None and len(parts) == 1:
                _write(part, dvalues[chunk])
            elif dvalues is not None:
                total = part.double() if total is None else total.add_(part)
        if dx is not None and dt is not None:
            if chunks.shards:
                chunks.total(queries, cotangents.dx, cotangents.dt)
                cotangents.dx.add_(direct[0])
                cotangents.dt.add_(direct[1])
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
        if chunks.shards:
            count = torch.zeros_like(rows.t) + count
            chunks.total(queries, count)
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
        chunks.total(queries, pull, slope)
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
    x, t = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (inputs.x, inputs.t)
    )
    if not isinstance(inputs.values, Tensor):  # which are constant
        return x, t, x.new_empty((0, 1))
    values = inputs.values if values_grad else inputs.values[:0]
    return x, t, torch.empty_like(values, memory_format=torch.contiguous_format)


def _write(rows: Tensor, out: Tensor) -> None:
    """rows (n, d) to out (n, *event) of any floating dtype, of which `flatten` may be a copy."""
    out.copy_(rows.view(out.shape))
