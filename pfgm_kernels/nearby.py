# SPDX-License-Identifier: Apache-2.0
"""References in files of which a call reads those that are near its queries, found by a sketch.

A sketch (`backends/_sketch.py`) bounds r_j = (‖x − x0_j‖² − ‖x − origin‖²)/unit² from below:

    r_j ≥ ‖y_j‖² − 2 P x'·P y_j − 2 ‖Q x'‖ ‖Q y_j‖

Queries for which that leaves few references see these alone, as if they were classes in memory; the
others see all, as ever. Ranks of a group take the same queries at a time, so that each reads either
what is near any of them, by a sketch of its part and the nearest of all parts, or all of its part.
A sketch is kept in a file of its own, made in two passes over the references.
"""

from __future__ import annotations

import copy
import hashlib
import io
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pfgm_kernels.backends._sketch import Sketch, columns_of, sketches
from pfgm_kernels.backends._values import decode
from pfgm_kernels.files import write_bytes
from pfgm_kernels.on_disk import OnDisk, check_finite

SPLIT = {"field_forward", "field_backward", "field_jvp", "field_trace"}
ANCHOR = 11
"""Where derivatives have the anchors among their arguments; 3: among the results."""
MOST_BYTES = 1 << 28
"""Of the points of a sketch."""
LIKELY = 4
FEW = 256
"""References that a query may have left."""
CUTOFF = {torch.float32: 16.0, torch.float64: 40.0}
"""Weights below exp(-CUTOFF)/N of the nearest's cannot be seen in results of these dtypes."""
ROUNDING = 1e-11


class Found(NamedTuple):
    queries: Tensor
    """(n,)"""
    references: Tensor
    """(m,), those of one query after those of another"""
    ranges: Tensor
    """(n, 2), which of them are whose"""


class Nearby:
    """What finds the references near a query.

    levels: sketches of more and more columns, none where they would not pay; norms ‖y_j‖² (N,) and
    grid as of `cpu.prepare`.
    """

    def __init__(
        self, source: OnDisk, table: Tensor, levels: Sequence[Sketch], norms: Tensor, grid: Tensor
    ) -> None:
        self.source, self.table, self.norms = source, table, norms
        self.unit, self.origin, self.levels = float(grid[0]), grid[4:], levels

    def call(
        self, name: str, function: Callable[..., Any], args: Sequence[Any], rows: set[int]
    ) -> Any:
        """What a function of `ops` gives; rows: which of its arguments have a row a query."""
        x, t, ranges, k = args[0], args[1], args[6], args[5]
        if name not in SPLIT or ranges is not None or len(x) == 0 or not self.levels:
            return function(*args)
        anchor = args[ANCHOR] if len(args) > ANCHOR and name != "field_forward" else None
        found = self.find(x, t, k, args[-2] // 4, anchor)
        far = torch.ones(len(x), dtype=torch.bool, device=x.device)
        far[found.queries] = False
        parts = []
        if len(found.queries):
            near = _of_queries(args, rows, found.queries)
            near[2], near[4], near[6] = self.source[found.references], [], found.ranges
            if anchor is not None:
                place = found.references == near[ANCHOR].repeat_interleave(
                    found.ranges.diff().flatten()
                )
                near[ANCHOR] = place.nonzero().flatten()
            results = function(*near)
            if name == "field_forward" and len(results[3]):
                results[3].copy_(found.references[results[3]])
            parts.append((found.queries, results))
        if far.any():
            others = far.nonzero().flatten()
            parts.append((others, function(*_of_queries(args, rows, others))))
        return _joined(len(x), parts)

    def find(self, x: Tensor, t: Tensor, k: float, workspace: int, anchor: Tensor | None) -> Found:
        """The queries (B, *event) that few references may carry weight for, and these.

        anchor: (B,) the nearest reference, where it is known.
        """
        device = x.device
        queries, references, counts = [], [], []
        left = workspace // self.source.row_bytes
        squares = self.nearest(x, workspace, anchor)
        for start, lists in self._lists(x, t, k, squares, len(self.norms), workspace):
            for b, found in sorted(lists.items(), key=lambda each: len(each[1])):
                if len(found) <= left:
                    left -= len(found)
                    queries.append(start + b)
                    references.append(found)
                    counts.append(len(found))
        ends = torch.tensor([0, *counts], device=device).cumsum(0)
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return Found(
            torch.tensor(queries, dtype=torch.int64, device=device),
            torch.cat([none, *references]),
            torch.stack([ends[:-1], ends[1:]], 1),
        )

    def near_any(
        self, x: Tensor, t: Tensor, k: float, squares: Tensor, count: int, workspace: int
    ) -> Tensor | None:
        """(m,) references, at least one and all that may carry weight for any query (B, *event);
        None where these are too many, of a query or in all.

        squares: (B,) see `nearest`; those of `count` references that these are some of.
        """
        found = torch.zeros(0, dtype=torch.int64, device=x.device)
        known = 0
        for _, lists in self._lists(x, t, k, squares, count, workspace):
            known += len(lists)
            found = torch.cat([found, *lists.values()]).unique()
            if len(found) * self.source.row_bytes > workspace:
                return None
        if known < len(x):
            return None
        return found if len(found) else found.new_zeros(1)

    def nearest(self, x: Tensor, workspace: int, anchor: Tensor | None = None) -> Tensor:
        """(B,) a squared distance that some reference, near the nearest, is at from each query
        (B, *event); infinite where it is not likely that few are near.
        """
        squares = x.new_full((len(x),), torch.inf, dtype=torch.float64)
        for some, rows, shifted, squared in self._chunks(x, workspace):
            level = self.levels[0]
            bounds = _Bounds(level, self.norms, shifted, squared, workspace)
            near = (bounds.outside <= level.scale[2]).nonzero().flatten()
            if len(near):
                known = None if anchor is None else anchor[some][near, None]
                likely = bounds.of(near).likely() if known is None else known
                squares[some][near] = self._nearest(rows[near], likely)
        return squares

    def _lists(
        self, x: Tensor, t: Tensor, k: float, squares: Tensor, count: int, workspace: int
    ) -> Iterator[tuple[int, dict[int, Tensor]]]:
        """Of each chunk of queries, where it starts, those of it with few references, and these."""
        single = torch.promote_types(x.dtype, self.source.dtype) != torch.float64
        depth = CUTOFF[torch.float32 if single else torch.float64]
        depth += math.log(max(count, 1 << 20))
        farthest = _farthest(squares, t.double(), k, depth) / self.unit**2
        for some, _, shifted, squared in self._chunks(x, workspace):
            lists: dict[int, Tensor] = {}
            limit = farthest[some] - squared
            rest = limit.isfinite().nonzero().flatten()
            for level in self.levels:
                if len(rest) == 0:
                    break
                bounds = _Bounds(level, self.norms, shifted[rest], squared[rest], workspace)
                found = bounds.within(limit[rest])
                few = {
                    b: each
                    for b, each in zip(rest.tolist(), found, strict=True)
                    if each is not None
                }
                lists |= few
                rest = rest.new_tensor([b for b in rest.tolist() if b not in few])
            yield some.start, lists

    def _chunks(self, x: Tensor, workspace: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Of queries (B, *event) the places of some, these (n, d), x' and ‖x'‖²; none without
        sketches.
        """
        step = max(1, workspace // (32 * self.source.shape[1]))
        for start in range(0, len(x) if self.levels else 0, step):
            rows = x[start : start + step].double().reshape(-1, self.source.shape[1])
            shifted = (rows - self.origin) / self.unit
            yield slice(start, start + len(rows)), rows, shifted, shifted.square().sum(1)

    def _nearest(self, x: Tensor, likely: Tensor) -> Tensor:
        """The least squared distance (n,) of x (n, d) to the references (n, c)."""
        wanted, back = likely.unique(return_inverse=True)
        rows = decode(self.source[wanted], self.table)
        each = [(x - rows[back[:, c]]).square().sum(1) for c in range(likely.shape[1])]
        return torch.stack(each).amin(0)

    def to(self, source: OnDisk) -> Nearby:
        """The same of a source on another device."""
        device = source.device
        levels = [Sketch(*(each.to(device) for each in level)) for level in self.levels]
        made = copy.copy(self)
        made.source, made.table, made.levels = source, self.table.to(device), levels
        made.norms, made.origin = self.norms.to(device), self.origin.to(device)
        return made

    @staticmethod
    def open(path: Path, source: OnDisk, table: Tensor) -> Nearby:
        """That of a file, which is made where it is not there. Raises ValueError where it is
        damaged or of other references, OSError where it cannot be read or written.
        """
        known = source.identity() + table.numpy(force=True).tobytes()
        identity = np.frombuffer(hashlib.blake2b(known).digest(), np.uint8)
        if not path.exists():
            write_bytes(path, _packed(identity, *_make(source, table)))
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: torch.from_numpy(file[name]) for name in file.files}
            found = arrays.pop("identity").numpy()
        except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"damaged file {path}: expected a sketch, got {error}") from error
        if not np.array_equal(found, identity):
            raise ValueError(
                f"{path} is a sketch of other references than these, or of these before they were "
                "changed: delete it, and it is made anew"
            )
        arrays = {name: array.to(source.device) for name, array in arrays.items()}
        levels = [
            Sketch(*(arrays[f"{field}{i}"] for field in Sketch._fields))
            for i in range(sum(name.startswith("points") for name in arrays))
        ]
        if source.order is not None:
            order = source.order.to(source.device)
            arrays["norms"] = arrays["norms"][order]
            levels = [
                level._replace(points=level.points[order], rest=level.rest[order])
                for level in levels
            ]
        return Nearby(source, table, levels, arrays["norms"], arrays["grid"])


class _Bounds:
    """Of r_j for queries x' (n, d) float64, ‖x'‖² (n,)."""

    def __init__(
        self, level: Sketch, norms: Tensor, x: Tensor, squared: Tensor, workspace: int
    ) -> None:
        self.level, self.norms, self.workspace = level, norms, workspace
        inside = x @ level.basis.T
        held = inside.square().sum(1)
        self.outside = ((squared - held).clamp(min=0) + ROUNDING * squared).sqrt()
        error = 2 * held.sqrt() * level.scale[1] + ROUNDING * (squared + norms.max())
        one = torch.ones_like(held)
        self._factors = torch.column_stack(
            [inside * (2 * level.scale[0]), 2 * self.outside, -one, error]
        )

    def of(self, queries: Tensor) -> _Bounds:
        """Those of some of the queries."""
        made = copy.copy(self)
        made.outside, made._factors = self.outside[queries], self._factors[queries]
        return made

    def least(self) -> Iterator[tuple[int, Tensor]]:
        """Chunks of references: the first, and what their r is at least (n, m), negative."""
        row_bytes = 16 * len(self._factors) + 24 * self._factors.shape[1]
        size = max(64, self.workspace // row_bytes)
        for start in range(0, len(self.norms), size):
            part = slice(start, start + size)
            points, rest = self.level.points[part].double(), self.level.rest[part].double()
            one = torch.ones_like(rest)
            terms = torch.column_stack([points, rest, self.norms[part], one])
            yield start, self._factors @ terms.T

    def likely(self) -> Tensor:
        """(n, LIKELY) references that seem to be the nearest."""
        count = min(LIKELY, len(self.norms))
        most = self.norms.new_empty((len(self._factors), 0))
        places = most.long()
        for start, minus in self.least():
            some = minus.topk(min(count, minus.shape[1]))
            most = torch.cat([most, some.values], 1)
            places = torch.cat([places, some.indices + start], 1)
            most, order = most.topk(min(count, most.shape[1]))
            places = places.gather(1, order)
        return places

    def within(self, limit: Tensor) -> list[Tensor | None]:
        """The references whose r may be within the limit (n,), of each query; None of more than
        FEW.
        """
        counts = torch.zeros_like(limit, dtype=torch.int64)
        hits = []
        for start, minus in self.least():
            near = minus >= -limit[:, None]
            counts += near.sum(1)
            near[counts > FEW] = False  # nonzero would list them all
            hits.append(near.nonzero() + torch.tensor([0, start], device=near.device))
        listed = torch.cat(hits)
        listed = listed[listed[:, 0].argsort(stable=True)]
        held = listed[:, 0].bincount(minlength=len(limit)).tolist()
        lists = zip(counts.tolist(), listed[:, 1].split(held), strict=True)
        return [None if count > FEW else each for count, each in lists]


def _farthest(square: Tensor, t: Tensor, k: float, depth: float) -> Tensor:
    """The squared distance (n,) at which a logit is so far below that at `square`."""
    if math.isinf(k):
        return square + 2 * t.square() * depth
    s = square + t.square()
    return s * math.exp(2 * depth / k) - t.square()


def _of_queries(args: Sequence[Any], rows: set[int], index: Tensor) -> list[Any]:
    return [
        each[index] if i in rows and isinstance(each, Tensor) and len(each) else each
        for i, each in enumerate(args)
    ]


def _joined(batch: int, parts: list[tuple[Tensor, Any]]) -> Any:
    """Results by query, in the place of those of some queries each."""
    if isinstance(parts[0][1], Tensor):
        return _joined(batch, [(queries, (result,)) for queries, result in parts])[0]
    joined = []
    for results in zip(*(results for _, results in parts), strict=True):
        first = results[0]
        if len(first) == 0:
            joined.append(first)  # what is not wanted has no rows
            continue
        whole = first.new_empty((batch, *first.shape[1:]))
        for (queries, _), result in zip(parts, results, strict=True):
            whole[queries] = result
        joined.append(whole)
    return tuple(joined)


def _make(source: OnDisk, table: Tensor) -> tuple[Tensor, Tensor, list[Sketch]]:
    source = source.to(torch.device("cpu")).in_order()
    table = table.cpu()
    count, d = source.shape
    sample = decode(source[:: max(1, count // 64)], table)
    unit = (float(table[255]) - float(table[0])) / 255 if len(table) else 1.0
    header = sample.new_tensor([unit, 0.0 if len(table) else -1.0, 0.0, 0.0])
    grid = torch.cat([header, sample.mean(0)])
    rows = max(1, (1 << 25) // (8 * d))
    norms = sample.new_empty(count)
    for start in range(0, count, rows):  # into one piece: small ones would keep large ones from use
        part = slice(start, start + rows)
        values = source[part]
        check_finite(values, start)
        norms[part] = ((decode(values, table) - grid[4:]) / unit).square().sum(1)
    columns = columns_of(min(d * source.dtype.itemsize, 8 * MOST_BYTES // count))
    return norms, grid, sketches(source, table, norms, grid, columns)


def _packed(
    identity: np.ndarray[Any, Any], norms: Tensor, grid: Tensor, levels: list[Sketch]
) -> bytes:
    arrays = {"identity": identity, "norms": norms.numpy(), "grid": grid.numpy()}
    for i, level in enumerate(levels):
        arrays |= {f"{field}{i}": each.numpy() for field, each in level._asdict().items()}
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()
