# SPDX-License-Identifier: Apache-2.0
"""What a small reference batch costs: the angle between its target and the exact one."""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pfgm_kernels import ReferenceSet, poisson_field
from pfgm_kernels.figures.canvas import INK, SERIES, sheet
from pfgm_kernels.figures.queries import TITLES, Queries
from pfgm_kernels.training.data import DataSet

FEWEST = 128
QUERIES = 128


def bias(data: DataSet, detail: float = 1.0) -> Figure:
    """The angle between the target of n references and that of all N, over m of Eq. (11).

        cos angle = Normalize(E_{j ≤ n}[ … ]) · Normalize(E_{j ≤ N}[ … ]),   […] as in Eq. (12)

    As in the published training code, the images that the queries are placed around are among the
    n. Where one reference has all the weight both targets point at it; far out all references lie
    in one direction. Between, a small batch misses what the query hears. Median of the queries, and
    the middle half.
    """
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(len(data.train), generator=generator)
    references = data.references
    around = data.train[order[: max(16, round(QUERIES * detail))]]
    queries = Queries(data.decode(around), references, generator)
    exponents = queries.exponents(max(12, round(48 * detail)))
    at = exponents.numpy()
    exact = _targets(queries, exponents, references)
    figure = sheet(8, 4.8)
    axes = figure.add_subplot()
    for n, color in zip(_sizes(len(data.train)), SERIES, strict=False):
        few = data.decode(data.train[order[:n]])
        angle = _angle(_targets(queries, exponents, ReferenceSet(few)), exact)
        low, middle, high = angle.quantile(torch.tensor([0.25, 0.5, 0.75]), dim=1).numpy()
        axes.fill_between(at, low, high, color=color, alpha=0.16, linewidth=0)
        axes.plot(at, middle, color=color, linewidth=2, label=f"{n:,}")
    axes.plot(at, 0 * at, color=INK, label=f"all {len(data.train):,}")
    axes.set(xlim=(at[0], at[-1]), ylim=(0, None))
    axes.set_xlabel("$m$")
    axes.set_ylabel("angle to the exact target")
    axes.yaxis.set_major_formatter("{x:g}°")
    axes.legend(title="references")
    axes.set_title(f"The bias of a small reference batch: {TITLES.get(data.name, 'images')}")
    return figure


def _sizes(all_: int) -> list[int]:
    """128 and so on, each four times (of few data twice) the one before, up to half of all."""
    factor = 4 if all_ > 10_000 else 2
    return [n for i in range(6) if (n := FEWEST * factor**i) <= all_ / 1.4]


def _targets(queries: Queries, exponents: Tensor, references: ReferenceSet) -> Tensor:
    """(len(exponents), B, d + 1)."""
    fields = [poisson_field(*queries.at(m), references) for m in exponents.tolist()]
    return torch.stack(fields)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """In degrees, between unit vectors along the last axis."""
    return 2 * ((a - b).norm(dim=-1) / 2).clamp(max=1).asin() * (180 / math.pi)
