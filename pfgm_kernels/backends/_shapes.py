# SPDX-License-Identifier: Apache-2.0
"""How much of a call a GPU takes at a time."""

from __future__ import annotations

FEWEST = 128  # queries, a tile of the products, for which references are rather cut
INDEXED = 1 << 30  # references: kernels count them in 32 bits


def fit(
    batch: int, count: int, rows: int, pairs: int, references: int | None = None
) -> tuple[int, int]:
    """Queries and references of at most `rows` queries, `references` and `pairs` pairs. Queries are
    rather cut than references, which have to be merged then, unless that leaves less than a tile.
    """
    batch = max(1, min(batch, rows))
    most = min(pairs // min(batch, FEWEST), references or count, INDEXED)
    count = -(-count // -(-count // max(1, most)))  # evenly
    return max(1, min(batch, pairs // count)), count
