# SPDX-License-Identifier: Apache-2.0
"""The same as models.py of the kernels in csrc/cuda, whose sizes are what the entry points are
called with.
"""

from __future__ import annotations

from math import ceil
from types import SimpleNamespace as Sizes

from benchmarks.models import Model, Work
from benchmarks.routing import Routing

TILE, TERMS = 128, 32  # queries, references and columns of a product; its depth
GROUP = 256  # references that a warp weighs
SPAN = 1024  # references that a block of exact_kernel looks at together
INSTRUCTIONS = {2: (6, 31, 39), 4: (11, 40, 50), 8: (20, 74, 88), 16: (39, 129, 149)}
INSTRUCTIONS |= {24: (58, 192, 222), 32: (77, 240, 278)}
"""For a pair, by columns: of the search for the nearest, of the sums and of those of the gradients
(csrc/cuda/direct_sum.cuh).
"""


def width(a: Sizes) -> int:
    return 64 * ceil(a.dim / 64)


def products(a: Sizes) -> tuple[int, int, int]:
    """Parts of queries and of references, and products that take the place of one."""
    queries = a.num_parts if a.num_parts > 1 else 3 if a.dim <= 128 else 2
    number = {(2, 1): 2, (3, 1): 3, (2, 2): 3, (3, 3): 6}[queries, a.num_parts]
    return queries, a.num_parts, number


def cuda_split(a: Sizes, r: Routing) -> Work:
    memory = a.batch * (4 * a.dim + 2 * products(a)[0] * width(a))
    steps, instructions = width(a) / 64, 64 * a.batch * a.dim
    return Work(memory=memory, float64=instructions, longest=steps, steps=steps * a.programs)


def cuda_compare(a: Sizes, r: Routing) -> Work:
    queries, references, number = products(a)
    out, terms = 4 * a.batch * a.count, width(a) * TILE * a.programs
    return Work(
        memory=2 * width(a) * (queries * a.batch + references * a.count) + out,
        cache=2 * terms * (queries + references) + out,
        tensor=2 * terms * TILE * number,
        float32=2 * terms * TILE / TERMS,
        resident=1,
        working=a.programs,
    )


def cuda_route(a: Sizes, r: Routing) -> Work:
    rounds = ceil(a.count / TILE / 8)  # a warp takes a tile
    once = 16 + ceil(a.dim / 256)
    return Work(
        memory=4 * a.batch * (a.count / TILE + a.count * (r.many + r.dense)),
        float32=120 * a.batch * a.count * r.dense,
        longest=once + 2 * rounds * (1 + (r.dense > 0)),
        steps=a.programs * (once + rounds * (1 + r.many + r.dense)),
    )


def cuda_weigh(a: Sizes, r: Routing) -> Work:
    pairs = r.dense * a.batch * a.count
    return Work(
        memory=pairs * (8 + 4 * a.backward) + a.batch * a.count / GROUP * (1 + 16 * r.dense),
        float32=120 * pairs,
        longest=18,
        steps=a.programs * (2 + 16 * r.dense),
    )


def cuda_list(a: Sizes, r: Routing) -> Work:
    rounds = ceil(a.count / GROUP / 256) * TILE / 4
    return Work(memory=a.batch * a.count / GROUP, longest=rounds, steps=a.programs * rounds)


def cuda_rest(a: Sizes, r: Routing) -> Work:
    steps = 1 + a.count / GROUP / 32 * (r.dense > 0)
    memory = 16 * r.dense * a.batch * a.count / GROUP
    return Work(memory=memory, longest=steps, steps=a.programs * steps)


def cuda_sum(a: Sizes, r: Routing) -> Work:
    blocks, columns = ceil(a.batch / TILE), ceil(width(a) / TILE)
    splits, parts = a.programs / (blocks * columns), min(2, products(a)[1])
    terms = blocks * r.blocks * r.active * a.count * columns * TILE
    out = 4 * splits * r.dense * a.batch * width(a)
    return Work(
        memory=2 * width(a) * parts * a.count + 4 * r.dense * a.batch * a.count + out,
        cache=2 * terms * (2 + parts) + out,
        tensor=2 * terms * TILE * (1 + parts),
        float32=2 * terms * TILE / TERMS,
        longest=2,
        resident=1,
        working=blocks * r.blocks * columns * splits,
    )


def exact(a: Sizes, r: Routing) -> Work:
    """Queries with candidates share the blocks evenly, however many candidates they have."""
    pairs, listed = a.batch * r.candidates, ceil(a.batch * r.listed)
    parts = max(1, min(a.programs // max(1, listed), ceil(a.count / SPAN)))
    # Of a pair: a warp of eight reads it, twice. No reduction follows a load: half a step.
    steps = max(1, a.dim / 128) / 8
    values = 1 if a.value_type == "uint8" else 4
    listing = 4 * listed * a.count * (a.dim > 32)
    return Work(
        memory=values * a.dim * min(a.count, pairs) + listing,
        cache=2 * values * a.dim * pairs + listing,
        float64=2 * a.dim * pairs * (6 + 2 * a.backward),
        lookups=2 * pairs * a.dim * (a.value_type == "uint8"),
        longest=1 + (steps * r.most + 3 * ceil(a.count / SPAN)) / parts * (listed > 0),
        steps=a.programs + pairs * steps + 3 * listed * ceil(a.count / SPAN),
        resident=3,
    )


def exact_combine(a: Sizes, r: Routing) -> Work:
    listed = ceil(a.batch * r.listed)
    parts = max(1, a.programs // max(1, listed))
    tasks = listed * ceil(a.dim / 256)
    return Work(
        memory=8 * listed * parts * a.dim * (parts > 1),
        longest=1 + ceil(tasks / a.programs) * (5 + parts),
        steps=a.programs + tasks * (5 + parts),
    )


def cuda_combine(a: Sizes, r: Routing) -> Work:
    memory, longest = r.dense * a.batch * a.dim * 44, 1 + 9 * (r.dense > 0)
    return Work(memory=memory, longest=longest, steps=a.programs * (1 + 9 * r.dense))


def cuda_rows(a: Sizes, r: Routing) -> Work:
    steps = 6 + 3 * ceil(a.dim / 256)
    return Work(memory=32 * a.batch * a.dim, longest=steps, steps=a.programs * steps)


def direct(a: Sizes, which: int) -> Work:
    columns = min(d for d in INSTRUCTIONS if d >= a.dim)
    return Work(
        memory=4 * a.dim * (a.batch + a.count),
        cache=4 * a.dim * a.programs * TILE,
        float32=2 * INSTRUCTIONS[columns][which] * a.batch * a.count,
        longest=6,
        resident=4 if columns == 2 else 3 if columns <= 16 else 2,
        working=a.programs,
    )


def nearest(a: Sizes, r: Routing) -> Work:
    return direct(a, 0)


def direct_sum(a: Sizes, r: Routing) -> Work:
    return direct(a, 1 + a.backward)


def warps(a: Sizes, r: Routing) -> Work:
    steps = 20 + a.dim / 4  # a warp takes a query, and combines what parts of references gave
    return Work(memory=a.batch * a.dim * 100, longest=steps, steps=a.programs * steps, resident=16)


CUDA: dict[str, Model] = {
    "split": cuda_split,
    "compare": cuda_compare,
    "route": cuda_route,
    "weigh": cuda_weigh,
    "list": cuda_list,
    "rest": cuda_rest,
    "sum": cuda_sum,
    "exact": exact,
    "exact_combine": exact_combine,
    "combine": cuda_combine,
    "finish": cuda_rows,
    "begin": cuda_rows,
    "nearest": nearest,
    "anchor": warps,
    "direct_sum": direct_sum,
    "direct_finish": warps,
    "direct_finish_backward": warps,
}
