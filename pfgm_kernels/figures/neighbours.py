# SPDX-License-Identifier: Apache-2.0
"""How many references a query hears: its own image alone, or all of them."""

from __future__ import annotations

import math

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pfgm_kernels import ReferenceSet, poisson_displacement, posterior_mean
from pfgm_kernels.figures.canvas import BLUE, GREY, INK, sheet
from pfgm_kernels.figures.queries import TITLES, Queries, effective_number
from pfgm_kernels.training.data import DataSet

COLUMNS, HEAVIEST = 12, 3
PLACES = (0, 1, 2.15, 3.35, 4.55)
NAMES = ("query $x$", "posterior\nmean", "heaviest\nreference", "second", "third")


def weights(data: DataSet, detail: float = 1.0) -> Figure:
    """The weights of a query's references as its noise grows, Eq. (11), and how many count.

        w_j ∝ (‖x − x0_j‖² + t²)^(−(d+1)/2),      effective number = 1 / Σ_j w_j²

    Above: a query x, scaled to its own range, its posterior mean Σ_j w_j x0_j, and its heaviest
    references, each as dark as its weight beside the heaviest one. Below: the effective number of
    many queries, the median and the middle 80 %.
    """
    generator = torch.Generator().manual_seed(3)
    references = data.references
    rows = torch.randperm(len(data.train), generator=generator)[: max(8, round(96 * detail))]
    queries = Queries(data.decode(data.train[rows]), references, generator)
    figure = sheet(11.5, 8.2)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.05, 1))
    _images(above, data, queries)
    _numbers(below, queries, max(12, round(60 * detail)))
    return figure


def _images(axes: Axes, data: DataSet, queries: Queries) -> None:
    """A column for each of some m, over that m on the axis."""
    exponents = queries.exponents(COLUMNS).tolist()
    references = queries.references
    step = exponents[1] - exponents[0]
    for m in exponents:
        x, t = (each[:1] for each in queries.at(m))
        w, order = _weights(x, t, references, data).sort(descending=True)
        column = [
            (x / x.abs().max().clamp_min(1), 1.0, ""),
            (posterior_mean(x, t, references), 1.0, ""),
            *(
                (data.decode(data.train[j][None]), (w[i] / w[0]).item(), _percent(w[i].item()))
                for i, j in enumerate(order[:HEAVIEST])
            ),
        ]
        for place, (image, ink, label) in zip(PLACES, column, strict=True):
            ends = (m - 0.44 * step, m + 0.44 * step, -place - 0.88, -place)
            axes.imshow(_picture(image[0], ink).numpy(), extent=ends, aspect="auto")
            axes.text(m, -place - 0.9, label, ha="center", va="top", fontsize=8.5, color=GREY)
    axes.set(xlim=(exponents[0] - step / 2, exponents[-1] + step / 2), ylim=(-PLACES[-1] - 1.2, 0))
    axes.set_yticks([-place - 0.44 for place in PLACES], NAMES)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelbottom=False)
    axes.set_title(
        f"The references of one query and their weights: {TITLES.get(data.name, 'images')}"
    )


def _numbers(axes: Axes, queries: Queries, count: int) -> None:
    references, exponents = queries.references, queries.exponents(count)
    found = torch.stack([effective_number(*queries.at(m), references) for m in exponents.tolist()])
    low, middle, high = found.quantile(torch.tensor([0.1, 0.5, 0.9]).double(), dim=1).numpy()
    start = exponents[0].item()
    axes.fill_between(exponents.numpy(), low, high, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(exponents.numpy(), middle, color=BLUE, linewidth=2)
    axes.axhline(len(references), color=GREY, linewidth=1, linestyle=(0, (5, 4)))
    axes.annotate(
        f"all {len(references):,} references",
        (start, len(references)),
        (0, 4),
        textcoords="offset points",
        color=GREY,
        fontsize=10.5,
    )
    axes.set_yscale("log")
    axes.set(ylim=(0.8, 4 * len(references)), ylabel="effective number")
    ticks = range(20 * math.ceil(start / 20), queries.constants.M, 20)
    axes.set_xticks(ticks, [f"{m}\n{queries.level(m):.2g}" for m in ticks])
    axes.set_xlabel("$m$,  and the noise level $\\sigma\\,(1+\\tau)^m$")
    axes.tick_params(axis="x", colors=INK)


def _weights(x: Tensor, t: Tensor, references: ReferenceSet, data: DataSet) -> Tensor:
    """All weights of one query (1, *event), (N,): log w_j = −(d+1)/2 log s_j − log_mass."""
    log_mass = poisson_displacement(x, t, references)[1]
    s = torch.cat(
        [
            (data.decode(part).double() - x).flatten(1).square().sum(dim=1)
            for part in data.train.split(1000)
        ]
    )
    return (-(x[0].numel() + 1) / 2 * (s + t.double().square()).log() - log_mass).exp()


def _percent(weight: float) -> str:
    if weight < 0.00005:
        return ""
    return f"{100 * weight:.{0 if weight > 0.0995 else 1 if weight > 0.00995 else 2}f} %"


def _picture(image: Tensor, ink: float) -> Tensor:
    """An image (h, w) or (3, h, w) in [-1, 1] as (h, w, 3) in [0, 1]: grey ones as ink on paper,
    the weaker the nearer to white."""
    grey = image.ndim == 2
    colors = (-image[..., None].expand(-1, -1, 3) if grey else image.movedim(0, 2)) / 2 + 0.5
    return 1 - ink * (1 - colors.clamp(0, 1))
