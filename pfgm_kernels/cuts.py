# SPDX-License-Identifier: Apache-2.0
"""How the queries and the references of a call are cut into chunks."""

from __future__ import annotations

from torch import Tensor

from pfgm_kernels._checks import blind

Part = tuple[slice, list[slice]]
"""A chunk of queries, and the chunks of the references that they see."""


def by_range(ranges: Tensor, rows: int, references: int, tile: int) -> list[Part]:
    """Chunks of queries with one range of references each; the host reads the ranges."""
    if blind(ranges):
        raise RuntimeError(
            "labels expects, where a CUDA graph is captured, a backend with kernels for classes "
            "and a workspace that holds a query with all references"
        )
    seen, counts = ranges.unique_consecutive(dim=0, return_counts=True)
    parts, start = [], 0
    for (first, last), count in zip(seen.tolist(), counts.tolist(), strict=True):
        chunks = [_shift(part, first) for part in slices(last - first, references)]
        parts += [(_shift(part, start), chunks) for part in slices(count, rows, tile)]
        start += count
    return parts


def _shift(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def slices(total: int, size: int, multiple: int = 1) -> list[slice]:
    """As few slices of at most `size` as cover `total`, nearly even: all but the last a multiple
    where that goes. One empty slice where there is nothing.
    """
    size = max(size // multiple * multiple or size, 1)
    even = -(-total // max(-(-total // size), 1))
    size = min(size, -(-even // multiple) * multiple)
    starts = range(0, max(total, 1), max(size, 1))
    return [slice(start, min(start + size, total)) for start in starts]
