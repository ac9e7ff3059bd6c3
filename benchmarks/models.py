# SPDX-License-Identifier: Apache-2.0
"""What one launch of a Triton kernel moves and computes: a function a kernel, `a` being its sizes
(launches.Launch) and `r` what the data have it do.

Operations count a multiply-add as two, and so every other instruction, which takes the same time.
A step is a round trip to memory that the next one waits for, with the reduction that follows it;
how many programs a multiprocessor holds is what the registers of sm_90 allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from types import SimpleNamespace as Sizes

from benchmarks.routing import Routing


@dataclass(frozen=True)
class Work:
    """Bytes of memory, and through the L2 cache; operations on tensor cores, of bfloat16 and of
    8-bit integers, and on the float32 and float64 units; values looked up in a table; steps of the
    longest program and of all together.
    resident: programs that a multiprocessor holds. working: those that do the work, where these are
    alike and long, and each keeps a multiprocessor busy: the last ones take as long as the others.
    """

    memory: float = 0
    cache: float = 0
    tensor: float = 0
    integer: float = 0
    float32: float = 0
    float64: float = 0
    lookups: float = 0
    longest: float = 0
    steps: float = 0
    resident: int = 8
    working: float = 0


Model = Callable[[Sizes, Routing], Work]


def split(a: Sizes, r: Routing) -> Work:
    divided = not (a.CODES or a.REFERENCES or a.COTANGENTS)
    steps = ceil(a.width / a.BLOCK_D) * (2 if a.DIGITS == 3 else 1)
    return Work(
        memory=a.rows
        * (a.d * (a.values_ptr + 4 * a.COTANGENTS) + (2 * a.PARTS + a.DIGITS) * a.width),
        float64=2 * a.rows * a.d * (32 if divided else 12) * (2 if a.DIGITS == 3 else 1),
        longest=2 * steps,
        steps=2 * a.programs * steps,
        resident=4,
    )


def screen(a: Sizes, r: Routing) -> Work:
    block, out, products = a.BLOCK_M * a.BLOCK_N, 4 * a.B * a.N, 3 if a.Y_DIGITS == 1 else 6
    return Work(
        memory=a.width * (3 * a.B + a.Y_DIGITS * a.N) + 16 * a.N + out,
        cache=a.width * a.programs * (3 * a.BLOCK_M + a.Y_DIGITS * a.BLOCK_N) + out,
        integer=2 * block * a.width * a.programs * products,
        float64=2 * (7 if a.Y_DIGITS == 1 else 3) * block * a.programs,
        float32=2 * 8 * block * a.programs,
        resident=8 // a.num_warps,
        working=a.programs,
    )


def compare(a: Sizes, r: Routing) -> Work:
    block, out = a.BLOCK_M * a.BLOCK_N, 4 * a.B * a.N
    return Work(
        # Programs that run together share references: these are read once.
        memory=2 * a.width * (2 * a.B + a.Y_PARTS * a.N) + out,
        cache=2 * a.width * a.programs * (2 * a.BLOCK_M + a.Y_PARTS * a.BLOCK_N) + out,
        tensor=2 * block * a.width * a.programs * (1 + a.Y_PARTS),
        float32=2 * block * a.programs * (a.width / a.BLOCK_K + 4),
        resident=8 // a.num_warps,
        working=a.programs,
    )


def route(a: Sizes, r: Routing) -> Work:
    once = 5 + 2 * ceil(a.tiles / 512) + ceil(a.d / a.BLOCK_D)
    groups = ceil(a.tiles / a.GROUP)  # minima, then r where it can be within the limit
    return Work(
        memory=4 * a.programs * (a.tiles + a.N * (r.many + r.dense)),
        float32=120 * a.programs * a.N * r.dense,
        longest=once + 2 * groups * (1 + (r.dense > 0)),
        steps=a.programs * (once + groups * (0.5 + 1.5 * (r.many + r.dense))),
        resident=3,
    )


def weights(a: Sizes, r: Routing) -> Work:
    pairs = r.dense * a.B * a.N
    return Work(
        memory=pairs * (8 + 4 * a.BACKWARD) + a.B * a.tiles * (1 + 8 * r.dense),
        float32=120 * pairs,
        longest=4,
        steps=a.programs * (2 + 2 * r.dense),
        resident=4 if a.BACKWARD else 7,
    )


def list_tiles(a: Sizes, r: Routing) -> Work:
    longest = 2 + 2 * ceil(a.B / a.BLOCK_B) + 3 * ceil(a.tiles / a.GROUP)
    memory = r.dense * a.B * a.tiles + 4 * a.B * a.programs
    return Work(memory=memory, longest=longest, steps=a.programs * longest, resident=1)


def sum_tiles(a: Sizes, r: Routing) -> Work:
    columns = ceil(a.width / a.BLOCK_D)
    splits = a.programs / (ceil(a.B / a.BLOCK_M) * columns)
    blocks = ceil(r.dense * a.B / a.BLOCK_M)  # queries that are summed are put side by side
    tiles = blocks * r.active * a.tiles
    block = a.BLOCK_M * a.BLOCK_D * a.BLOCK_K
    out = 4 * splits * r.dense * a.B * a.width
    return Work(
        # The columns of a tile, and the blocks of queries, are summed side by side.
        memory=2 * a.width * a.Y_PARTS * a.N * (tiles > 0) + 4 * r.dense * a.B * a.N + out,
        cache=2 * tiles * columns * a.BLOCK_K * (2 * a.BLOCK_M + a.Y_PARTS * a.BLOCK_D) + out,
        tensor=2 * tiles * columns * block * (1 + a.Y_PARTS),
        float32=2 * tiles * columns * a.BLOCK_M * a.BLOCK_D,
        longest=2,
        steps=2 * a.programs,
        resident=8 // a.num_warps,
        working=blocks * columns * splits,
    )


def distances(a: Sizes, r: Routing) -> Work:
    pairs, columns = a.B * r.candidates, ceil(a.d / a.BLOCK_D)
    kept = 8 * (1 + a.PROJECT) * a.TILE * a.B * r.tiles
    other = 4 * a.programs + 4 * a.B * a.N * r.listed + kept
    return Work(
        # Programs that run together share a tile, so its rows come from memory once.
        memory=a.values_ptr * a.d * min(a.N, pairs) + other,
        cache=a.values_ptr * a.d * pairs + other,
        float64=2 * a.d * (pairs * (3 + 2 * a.PROJECT) + a.B * r.groups * (1 + a.PROJECT)),
        lookups=pairs * a.d * a.CODES,
        longest=3 + min(a.TILE, r.most) / a.GROUP * columns,
        steps=2 * a.programs + a.B * (r.tiles + r.groups * columns),
        resident=3 if a.CODES else 4,
    )


def weigh(a: Sizes, r: Routing) -> Work:
    tiles, most = a.programs * r.tiles, ceil(r.most / a.TILE)
    return Work(
        memory=3 * 8 * a.TILE * tiles,
        float64=2 * 70 * a.TILE * tiles,
        longest=5 + 4 * most,
        steps=a.programs + 4 * (a.programs * r.listed + tiles),
    )


def coefficients(a: Sizes, r: Routing) -> Work:
    tiles, most = a.B * r.tiles, ceil(r.most / a.TILE)
    return Work(
        memory=4 * 8 * a.TILE * tiles,
        float64=2 * 90 * a.TILE * tiles,
        longest=8 + 3 * most,
        steps=a.B + 7 * a.B * r.listed + 3 * tiles,
    )


def gather(a: Sizes, r: Routing) -> Work:
    columns = ceil(a.d / a.BLOCK_D)
    queries = a.programs / columns
    pairs = queries * r.candidates
    return Work(
        memory=a.values_ptr * a.d * min(a.N, pairs) + 8 * a.TILE * queries * r.tiles,
        cache=a.values_ptr * a.d * pairs + 8 * a.TILE * a.programs * r.tiles,
        float64=2 * 3 * a.d * pairs,
        lookups=pairs * a.d * a.CODES,
        longest=3 + (2 / a.TILE + 1.5 / a.GROUP) * r.most,
        steps=a.programs * (1 + 2 * r.listed + 2 * r.tiles + 1.5 * r.groups),
        resident=2 if a.CODES else 7,
    )


def combine(a: Sizes, r: Routing) -> Work:
    longest = 1 + (4 + ceil(a.tiles / 128) + 2 * ceil(a.d / a.BLOCK_D)) * (r.dense > 0)
    return Work(
        memory=r.dense * a.programs * a.d * (4 * a.SPLITS + 20),
        float64=2 * 40 * r.dense * a.programs * a.d,
        longest=longest,
        steps=a.programs * (1 + r.dense * longest),
        resident=7,
    )


def rows_finish(a: Sizes, r: Routing) -> Work:
    steps = 3 + 2 * ceil(a.d / a.BLOCK_D)
    memory = a.programs * a.d * (16 + 4 * a.SAVE + a.values_ptr)
    return Work(memory=memory, longest=steps, steps=a.programs * steps, resident=10)


def rows_begin(a: Sizes, r: Routing) -> Work:
    steps = 3 + 4 * ceil(a.d / a.BLOCK_D)
    memory = a.programs * a.d * (28 + a.values_ptr)
    return Work(memory=memory, longest=steps, steps=a.programs * steps, resident=8)


def fused(a: Sizes, r: Routing) -> Work:
    blocks, width = ceil(a.B / a.BLOCK_M), a.SLICE * a.SLICES
    pairs, products = blocks * a.BLOCK_M * a.N, 6 if a.Y_PARTS == 3 else 3
    splits, references = a.programs / blocks, 2 * width * a.Y_PARTS * a.N
    out = splits * a.B * (4 * width + 28)
    tiles = a.N / a.BLOCK_N / splits
    return Work(
        memory=references + 6 * a.B * width + out,
        cache=references * blocks + out,
        tensor=2 * 2 * pairs * width * products,
        float32=160 * pairs,
        longest=4 * tiles,
        steps=4 * tiles * a.programs,
        resident=2,
        working=a.programs,
    )


def fused_finish(a: Sizes, r: Routing) -> Work:
    steps = 12 + 2 * ceil(a.splits / a.GROUP)
    memory = a.programs * a.splits * (4 * a.width + 28)
    return Work(memory=memory, longest=steps, steps=a.programs * steps, resident=5)


TRITON: dict[str, Model] = {
    "operands.split": split,
    "products.screen": screen,
    "products.compare": compare,
    "products.list": list_tiles,
    "products.sum": sum_tiles,
    "route.route": route,
    "route.weights": weights,
    "route.combine": combine,
    "exact.distances": distances,
    "exact.weigh": weigh,
    "exact.coefficients": coefficients,
    "exact.gather": gather,
    "rows.finish": rows_finish,
    "rows.begin": rows_begin,
    "fused.fused": fused,
    "fused.finish": fused_finish,
}
