# SPDX-License-Identifier: Apache-2.0
"""What becomes of the queries of a problem beyond d = 32, which depends on the data.

`python -m benchmarks.routing`, with PFGM_DATA, has the Triton kernels route queries, on a GPU or
under the interpreter (TRITON_INTERPRET=1, half an hour), and prints what stands below.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEW = 64  # candidates up to which a query is always finished by direct differences
BLOCK, EXACT, GROUP, PRODUCT = 128, 256, 8, 64
"""Queries of a block of the products; references of a tile of direct differences, how many of these
are taken at a time, and of a tile of the second product.
"""


@dataclass(frozen=True)
class Routing:
    """What becomes of a problem's queries beyond d = 32.

    Of a query the mean: candidates: references taken by direct differences in float64; tiles: of
    256 references, in which such are; groups: of eight, in which they are taken. listed: the share
    of queries that have one; many: of those that have more than 64 of them, or a cut; dense: of
    those with a cut, which the second product sums; blocks: of blocks of 128 queries in their
    order, which `cuda` keeps, those with one; active: of tiles of 64, those that such a block sums;
    most: candidates of the query that has most.
    """

    candidates: float
    tiles: float
    groups: float
    listed: float
    many: float
    dense: float
    blocks: float
    active: float
    most: int


CIFAR10_8BIT = Routing(1.81, 1.76, 1.76, 0.879, 0.258, 0.258, 1.0, 1.0, 51)
CIFAR10 = Routing(1.81, 1.76, 1.76, 0.879, 0.258, 0.258, 1.0, 1.0, 51)
"""Of 512 queries of Eq. (11) around the first images, and all 50,000 references; by the rule of
`triton` (route.py) on distances in float64, not by its kernels."""
CUDA_8BIT = Routing(8103, 45.8, 1024, 0.982, 0.248, 0.0176, 1.0, 1.0, 50_000)
CUDA_CIFAR10 = Routing(8594, 47.8, 1085, 0.992, 0.248, 0.0078, 0.75, 1.0, 50_000)
"""The same by `cuda`, whose distances are of bfloat16 parts; counted before chunks cut weights as a
million references would."""
NORMAL_64 = Routing(6145, 32, 782, 1.0, 1.0, 0.0, 0.0, 0.0, 8007)
"""Of 512 standard normal queries and 8,192 references in 64 dimensions, by two passes."""
LEFT_64 = Routing(192, 1, 24.4, 0.031, 0.031, 0.0, 0.0, 0.0, 8007)
"""The same where one pass leaves 4 of 128 queries to two."""
NONE = Routing(0, 0, 0, 0, 0, 0, 0, 0, 0)
"""Up to d = 32, of normal data."""


def routing_of(r: Tensor, limit: Tensor, cut: Tensor) -> Routing:
    """Of r (B, N) and the limit and the cut of each query (B,)."""
    candidates, summed = r <= limit[:, None], (r > limit[:, None]) & (r <= cut[:, None])
    counts, dense = _tiles(candidates, EXACT), cut > -torch.inf
    blocks = torch.stack([part.any(0) for part in _tiles(summed, PRODUCT).bool().split(BLOCK)])
    active = blocks.any(1)
    number = candidates.sum(1)
    return Routing(
        candidates=number.double().mean().item(),
        tiles=(counts > 0).sum(1).double().mean().item(),
        groups=(-(-counts // GROUP)).sum(1).double().mean().item(),
        listed=(number > 0).double().mean().item(),
        many=((number > FEW) | dense).double().mean().item(),
        dense=dense.double().mean().item(),
        blocks=active.double().mean().item(),
        active=blocks[active].double().mean().item() if active.any() else 0.0,
        most=int(number.max()),
    )


def _tiles(chosen: Tensor, size: int) -> Tensor:
    """How many of each tile of references (B, tiles)."""
    rest = -chosen.shape[1] % size
    return torch.nn.functional.pad(chosen, (0, rest)).unflatten(1, (-1, size)).sum(2)


def main() -> None:
    from benchmarks.problems import Shape

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codes = (-1 + 2 * torch.arange(256, device=device).double() / 255).float()
    for shape in (Shape(512, 8192, 64, "normal"), Shape(512, 50_000, 3072, "cifar10")):
        problem = shape.problem(device)
        for values in (problem.x0, problem.images):
            if values is not None:
                table = codes if values.dtype == torch.uint8 else codes[:0]
                print(shape, values.dtype, route(problem.x, problem.t, values, table))


def route(x: Tensor, t: Tensor, values: Tensor, table: Tensor) -> Routing:
    """By two passes, a block of queries at a time."""
    from pfgm_kernels.backends import triton as backend
    from pfgm_kernels.backends.triton.call import Call, Screen
    from pfgm_kernels.backends.triton.operands import Operands

    operands, found = Operands(*backend.prepare(values, table, 0)), []
    for x_rows, t_rows in zip(x.split(BLOCK), t.double().split(BLOCK), strict=True):
        screen = Screen.make(Call(x_rows, t_rows, values, table, x.shape[1] + 1.0), operands)
        found.append((screen.r.cpu(), screen.limit.cpu(), screen.cut.cpu()))
    return routing_of(*map(torch.cat, zip(*found, strict=True)))


if __name__ == "__main__":
    main()
