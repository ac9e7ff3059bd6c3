# SPDX-License-Identifier: Apache-2.0
"""What the op does for each query, whatever the references: before and after a backend's sums.

    finish    v → the result and the residual v − (x0_a − x) that derivatives start from
    begin     the cotangents of the result → those of v and the log mass, and what reaches x and t
              not by way of the weights

Here in PyTorch; a backend with functions of these names does it in one launch each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pfgm_kernels.backends._values import decode
from pfgm_kernels.outputs import Output


@dataclass(frozen=True)
class Stored:
    """Rows of the stored references, values[index]."""

    values: Tensor
    """(m, d) contiguous float32, float64 or uint8 codes into the table"""
    table: Tensor
    """(256,) float32, else (0,)"""
    index: Tensor
    """(n,) int64"""

    def decode(self) -> Tensor:
        """As float64 (n, d)."""
        return decode(self.values[self.index], self.table)


@dataclass(frozen=True)
class Rows:
    """A chunk of queries with what the forward pass leaves of it (`ops`)."""

    x: Tensor
    """(n, d) float32 or float64"""
    t: Tensor
    """(n,) float64"""
    residual: Tensor
    """(n, d), the dtype of the result; where `finish` is to write it, or of no rows"""
    anchor: Stored
    anchor_log_weight: Tensor
    """(n,) float64"""
    k: float
    ranges: Tensor | None = None
    """(n, 2) int64, see `ops`; None where all see all that the backend is given"""

    @cached_property
    def anchor_x0(self) -> Tensor:
        return self.anchor.decode()

    @cached_property
    def v(self) -> Tensor:
        return self.anchor_x0 - self.x + self.residual

    @cached_property
    def singular(self) -> Tensor:
        """The singular point (n,), t = 0 on a reference, which has zero derivatives."""
        return (self.t == 0) & (self.anchor_x0 == self.x).all(1) & math.isfinite(self.k)


class Cotangents(NamedTuple):
    """Of a chunk of queries; float64. Backends add their sums to dx and dt."""

    g: Tensor
    """(n, d), of v"""
    g_m: Tensor
    """(n,), of the log mass"""
    projection: Tensor
    """(n,) g·v"""
    anchor_square: Tensor
    """(n,) ‖x − x0_a‖²"""
    dx: Tensor
    """(n, d)"""
    dt: Tensor
    """(n,)"""

    @staticmethod
    def empty(rows: Rows, columns: int = 0) -> Cotangents:
        """columns: of the rows of g, where these are to be longer than d."""
        n, d = rows.x.shape
        g, dx = (rows.t.new_empty(n, max(d, c))[:, :d] for c in (columns, d))
        numbers = [torch.empty_like(rows.t) for _ in range(4)]
        return Cotangents(g, numbers[0], numbers[1], numbers[2], dx, numbers[3])


def finish(rows: Rows, output: Output, v: Tensor, result: Tensor) -> None:
    """Writes the result (n, columns) of v (n, d) float64, and the residual where it has rows."""
    output.write(v, rows.x, rows.t, result)
    if len(rows.residual):
        torch.sub(v, rows.anchor.decode().sub_(rows.x), out=rows.residual)


def begin(rows: Rows, output: Output, g: Tensor | None, g_m: Tensor | None) -> Cotangents:
    """g (n, columns) of any floating dtype and g_m (n,) float64; None for zeros."""
    if g is None:
        g = rows.x.new_zeros(output.shape(rows.x, rows.x.shape[1]))
    singular = rows.singular
    g_v, dx, dt = output.pull(g.double(), rows.v, rows.t)
    g_v, dx = (each.masked_fill(singular[:, None], 0.0) for each in (g_v, dx))
    g_m = torch.zeros_like(dt) if g_m is None else g_m.masked_fill(singular, 0.0)
    projection = (g_v * rows.v).sum(1)
    anchor_square = (rows.anchor_x0 - rows.x).square().sum(1)
    return Cotangents(g_v, g_m, projection, anchor_square, dx, dt)
