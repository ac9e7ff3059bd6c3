# SPDX-License-Identifier: Apache-2.0
"""One chunk of queries and references, and the launches that both passes share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from pfgm_kernels.backends.triton import exact, products, route
from pfgm_kernels.backends.triton.configurations import blocks, multiprocessors
from pfgm_kernels.backends.triton.maths import PITCH, bits_of
from pfgm_kernels.backends.triton.operands import Operands, Split, split

SEVERAL = 8
"""Tiles that a program of distances_kernel looks at where in most of them no reference is meant."""
MOST_SPLITS = 8
"""Sums over references that the second product is split into, 4 bytes each of a query's column."""


@dataclass(frozen=True)
class Call:
    """x (B, d) float32 or float64, t (B,) float64, values (N, d) float32, float64 or uint8 codes
    into table (256,), and what direct differences in float64 keep to: ranges (B, 2) int64.
    """

    x: Tensor
    t: Tensor
    values: Tensor
    table: Tensor
    k: float
    ranges: Tensor | None = None

    @property
    def B(self) -> int:
        return self.x.shape[0]

    @property
    def N(self) -> int:
        return self.values.shape[0]

    @property
    def d(self) -> int:
        return self.x.shape[1]

    @property
    def codes(self) -> bool:
        return self.values.dtype == torch.uint8

    @property
    def gaussian(self) -> bool:
        return math.isinf(self.k)

    @property
    def half_k(self) -> float:
        return 1.0 if self.gaussian else self.k / 2

    @property
    def half_k_bits(self) -> int:
        return bits_of(self.half_k)

    def rows(self, value: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.full((self.B,), value, dtype=dtype, device=self.x.device)

    def pairs(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.B, self.N, dtype=dtype, device=self.x.device)

    # Direct differences (exact.py)

    @cached_property
    def exact_tiles(self) -> int:
        return triton.cdiv(self.N, blocks("exact", self.x.device)["TILE"])

    def distances(
        self, limit: Tensor, r: Tensor | None, g: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """‖x − x0_j‖² (B, N), how many references of each tile are meant, g·(x0_j − x) (B, N)."""
        squares = self.pairs(torch.float64)
        projection = squares if g is None else self.pairs(torch.float64)
        counts = torch.empty(self.B, self.exact_tiles, dtype=torch.int32, device=squares.device)
        many = counts.numel() >= 64 * multiprocessors(self.x.device)
        tiles = SEVERAL if many and r is not None else 1
        exact.distances_kernel[self.B * triton.cdiv(self.exact_tiles, tiles),](
            self.x,
            self.t,
            self.t if g is None else g,
            self.values,
            self.table,
            limit if r is None else r,
            limit,
            counts if self.ranges is None else self.ranges,
            squares,
            projection,
            counts,
            self.B,
            self.N,
            self.d,
            CODES=self.codes,
            GAUSSIAN=self.gaussian,
            SELECT=r is not None,
            PROJECT=g is not None,
            RANGED=self.ranges is not None,
            TILES=tiles,
            **self._exact_blocks("exact"),
        )
        return squares, counts, projection

    def gather(
        self, limit: Tensor, counts: Tensor, weights: Tensor, total: Tensor | None, out: Tensor
    ) -> None:
        """out (B, d) = Σ_j w_j (x0_j − x) / total over the references within the limit, for the
        queries that have one; without a total twice the sum is added to it.
        """
        sizes = self._exact_blocks("gather")
        exact.gather_kernel[self.B, triton.cdiv(self.d, sizes["BLOCK_D"])](
            self.x,
            self.values,
            self.table,
            limit,
            counts,
            weights,
            out if total is None else total,
            out,
            self.N,
            self.d,
            self.exact_tiles,
            CODES=self.codes,
            BACKWARD=total is None,
            **sizes,
        )

    def row_options(self) -> dict[str, int | bool]:
        """What the kernels take that have one program for each query."""
        return {
            "GAUSSIAN": self.gaussian,
            "TILE": blocks("exact", self.x.device)["TILE"],
        }

    def _exact_blocks(self, kernel: str) -> dict[str, int]:
        sizes = blocks(kernel, self.x.device)
        # Fewer columns than 16 would leave a row of TILE references to a thread.
        columns = min(sizes["BLOCK_D"], max(16, triton.next_power_of_2(self.d)))
        group = max(sizes["GROUP"], min(16, 1024 // columns))
        tile = blocks("exact", self.x.device)["TILE"]
        return {"TILE": tile, "GROUP": group, "BLOCK_D": columns}


@dataclass(frozen=True)
class Screen:
    """Products of the queries of a call with all references, and what they decide (route.py)."""

    call: Call
    operands: Operands
    steps: Tensor
    """(B,) float64, of the queries' digits"""
    r: Tensor
    """(B, N) float32"""
    limit: Tensor
    """(B,) float32"""
    cut: Tensor
    """(B,) float32"""
    base: Tensor
    """(B,) float64: squared distance of the anchor, of queries with a cut"""
    scales: Tensor
    """(4, B) float32"""

    @staticmethod
    def make(
        call: Call,
        operands: Operands,
        queries: Split | None = None,
        wanted: Tensor | None = None,
        anchor: Tensor | None = None,
        base: Tensor | None = None,
        log_weight: Tensor | None = None,
    ) -> Screen:
        """Of all queries, or of those that are wanted (B,) int8. The forward pass has their anchors
        written to anchor (B,) int64, the backward pass gives base and log_weight (B,) of these.
        """
        queries = queries or split(call.x, call.table, operands, 0, 3)
        r, minima = distances(call, operands, queries, wanted)
        limit, cut = (torch.empty_like(call.t, dtype=torch.float32) for _ in range(2))
        backward = base is not None
        base = torch.empty_like(call.t) if base is None else base
        tile = blocks("screen", call.x.device)["BLOCK_N"]
        scales = torch.empty(4, call.B, dtype=torch.float32, device=call.x.device)
        route.route_kernel[call.B,](
            call.x,
            call.t,
            call.half_k_bits,
            call.values,
            call.table,
            operands.header,
            queries.norms,
            queries.marks,
            queries.steps,
            r,
            minima,
            limit if wanted is None else wanted,
            base,
            base if log_weight is None else log_weight,
            base if anchor is None else anchor,
            limit,
            cut,
            scales,
            call.N,
            call.d,
            minima.shape[1],
            CODES=call.codes,
            GAUSSIAN=call.gaussian,
            BACKWARD=backward,
            ALL=wanted is None,
            TILE=tile,
            GROUP=4096 // tile,
            BLOCK_D=min(1024, triton.next_power_of_2(call.d)),
            num_warps=8,
        )
        return Screen(call, operands, queries.steps, r, limit, cut, base, scales)

    def sum_dense(
        self,
        pull: Tensor | None = None,
        constant: Tensor | None = None,
        log_weight: Tensor | None = None,
    ) -> Dense:
        """The references beyond the limits; for the backward pass, which has pull (B, N), constant
        (2, B) and log_weight (B,), with what c_j is proportional to in place of w.
        """
        call, parts = self.call, self.operands.parts
        sizes, device = blocks("sum", call.x.device), call.x.device
        tile, group = sizes["BLOCK_K"], 32
        tiles = triton.cdiv(call.N, tile)
        weights = torch.empty(2, call.B, tiles * tile, dtype=parts.dtype, device=device)
        active = torch.empty(call.B, tiles, dtype=torch.int8, device=device)
        sums = torch.empty(2, call.B, tiles, dtype=torch.float32, device=device)
        route.weights_kernel[call.B * triton.cdiv(tiles, group),](
            self.r,
            call.half_k_bits,
            self.r if pull is None else pull,
            self.r if constant is None else constant,
            self.r if log_weight is None else log_weight,
            self.limit,
            self.cut,
            self.scales,
            weights,
            active,
            sums,
            call.B,
            call.N,
            tiles,
            GAUSSIAN=call.gaussian,
            BACKWARD=pull is not None,
            TILE=tile,
            GROUP=group,
        )
        query_blocks = triton.cdiv(call.B, sizes["BLOCK_M"])
        order = torch.empty(query_blocks * sizes["BLOCK_M"], dtype=torch.int32, device=device)
        listed = torch.empty(query_blocks, tiles, dtype=torch.int32, device=device)
        lengths = torch.empty(query_blocks, dtype=torch.int32, device=device)
        products.list_kernel[query_blocks,](
            self.cut,
            active,
            order,
            listed,
            lengths,
            call.B,
            tiles,
            BLOCK_M=sizes["BLOCK_M"],
            BLOCK_B=min(1024, triton.next_power_of_2(call.B)),
            GROUP=8192 // sizes["BLOCK_M"],
            num_warps=8,
        )
        width = parts.shape[2]
        column_blocks = triton.cdiv(width, sizes["BLOCK_D"])
        # Blocks of dense queries are few, in a number that the host does not know: of many programs
        # the last ones leave less of the chip idle.
        splits = min(MOST_SPLITS, tiles)
        out = torch.empty(splits, call.B, width, dtype=torch.float32, device=device)
        products.sum_kernel[query_blocks, column_blocks, splits](
            weights,
            parts,
            order,
            listed,
            lengths,
            out,
            call.B,
            call.N,
            width,
            parts.stride(0),
            tiles,
            Y_PARTS=min(2, len(parts)),
            **sizes,
        )
        return Dense(self.cut, self.base, sums, out)

    def combine(self, dense: Dense, out: Tensor, forward: tuple[Tensor, ...] | None = None) -> None:
        """out (B, d) += twice Σ c (x0 − x), or given the total, log_mass and the log weight of the
        anchor (B,), of which the latter two are corrected, += Σ w (x0 − x) / total.
        """
        call, products = self.call, dense.products
        route.combine_kernel[call.B,](
            call.x,
            call.t,
            call.half_k_bits,
            self.base,
            self.operands.header,
            self.operands.origin,
            self.operands.mean,
            self.steps,
            self.cut,
            *(forward or (self.base, self.base, self.base)),
            dense.sums,
            products,
            out,
            call.d,
            products.shape[2],
            dense.tiles,
            GAUSSIAN=call.gaussian,
            BACKWARD=forward is None,
            SPLITS=products.shape[0],
            BLOCK_D=min(1024, triton.next_power_of_2(call.d)),
        )


@dataclass(frozen=True)
class Dense:
    """Sums by products, of queries with a cut; the others have nothing written."""

    cut: Tensor
    """(B,) float32"""
    base: Tensor
    """(B,) float64"""
    sums: Tensor
    """(2, B, tiles) float32: Σ w and Σ w u"""
    products: Tensor
    """(splits, B, width) float32 Σ w y"""

    @property
    def tiles(self) -> int:
        return self.sums.shape[2]


def distances(
    call: Call, operands: Operands, queries: Split, wanted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """r (B, N) and its smallest in each tile, of all queries, or at least of those that are wanted
    (B,) int8.
    """
    sizes = blocks("screen", call.x.device)
    tiles = triton.cdiv(call.N, sizes["BLOCK_N"])
    out = rows_of_pairs(call)
    minima = torch.empty(call.B, tiles, dtype=torch.float32, device=out.device)
    products.screen_kernel[triton.cdiv(call.B, sizes["BLOCK_M"]) * tiles,](
        queries.digits,
        queries.steps,
        operands.digits,
        operands.steps,
        operands.norms,
        minima if wanted is None else wanted,
        out,
        minima,
        call.B,
        call.N,
        queries.digits.shape[2],
        operands.digits.stride(0),
        ALL=wanted is None,
        Y_DIGITS=len(operands.digits),
        LONG=queries.digits.shape[2] > products.SUMMED.value,
        **sizes,
    )
    return out[:, : call.N], minima


def compare(call: Call, operands: Operands, parts: Tensor) -> Tensor:
    """Products (B, N) of parts (2, B, width) with the references."""
    sizes, out = blocks("compare", call.x.device), rows_of_pairs(call)
    tiles = triton.cdiv(call.N, sizes["BLOCK_N"])
    products.compare_kernel[triton.cdiv(call.B, sizes["BLOCK_M"]) * tiles,](
        parts,
        operands.parts,
        out,
        call.B,
        call.N,
        parts.shape[2],
        operands.parts.stride(0),
        Y_PARTS=min(2, len(operands.parts)),
        **sizes,
    )
    return out[:, : call.N]


def rows_of_pairs(call: Call) -> Tensor:
    """(B, pitch) float32"""
    pitch = triton.cdiv(call.N, PITCH.value) * PITCH.value
    return torch.empty(call.B, pitch, dtype=torch.float32, device=call.x.device)
