# SPDX-License-Identifier: Apache-2.0
"""Field lines in the plane of the data itself: near the sources, and far from them."""

from __future__ import annotations

import math

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from pfgm_kernels import poisson_field
from pfgm_kernels.figures.canvas import INK, PALE, SERIES, sheet
from pfgm_kernels.figures.lines import (
    directions,
    draw_arrows,
    draw_lines,
    draw_points,
    draw_strength,
    spiral,
    trace,
)

FOUR = torch.tensor([[-0.9, 0.55], [0.75, 0.85], [1.0, -0.6], [-0.45, -0.75]], dtype=torch.float64)
ALIKE = 5.0


def four_sources(detail: float = 1.0) -> Figure:
    """The field lines of four equal sources in the plane, Eq. (2) with d = 2.

        F(x) = Σ_j (x − x0_j) / (S_2(1) ‖x − x0_j‖²)

    Eq. (2) is the op's field for D = 0 and t = 0. As many lines leave each source, at equal angles:
    each carries the same flux. Darker is stronger; where the middle is white, F is next to 0.
    """
    reach, count = 2.2, max(4, round(24 * detail))
    figure = sheet(6.4, 6.75)
    axes = figure.add_subplot()
    ends = (-reach, reach)
    draw_strength(axes, FOUR, D=0, across=ends, up=ends, decades=(-0.8, 1.2), detail=detail)
    starts = (FOUR[:, None] + 0.04 * directions(count)).flatten(0, 1)
    lines = trace(starts, FOUR, D=0, step=0.02, count=240).split(count, dim=1)
    for source, part, color in zip(FOUR, lines, SERIES, strict=False):
        draw_lines(axes, part, color, width=1.1)
        draw_arrows(axes, part, at=22, color=color)
        draw_points(axes, source[None], 120, color)
    _window(axes, reach, "Field lines of four sources")
    return figure


def far_field(detail: float = 1.0) -> Figure:
    """Many sources, and one at their centre of mass: from afar both look alike.

        F(x) = E_{x0} [ (x − x0) / (S_2(1) ‖x − x0‖²) ] → (x − E x0) / (S_2(1) ‖x − E x0‖²)

    Eq. (2) again, D = 0. Lines of equal flux are traced from afar toward the data. Beyond the
    circle the two fields' directions differ by less than `ALIKE` degrees.
    """
    generator = torch.Generator().manual_seed(4)
    many = spiral(180, generator)
    one = many.mean(dim=0, keepdim=True)
    radius, reach = _alike_from(many, one), 2.6
    start = one + 4 * directions(max(8, round(64 * detail)))
    figure = sheet(11, 6.3)
    titles = (f"{len(many)} sources", "One at their centre of mass")
    for axes, sources, title in zip(figure.subplots(1, 2), (many, one), titles, strict=True):
        lines = trace(start, sources, D=0, step=0.02, count=220, toward=True)
        ends = (-reach, reach)
        draw_strength(axes, sources, D=0, across=ends, up=ends, decades=(-0.7, 1.2), detail=detail)
        draw_lines(axes, lines, width=0.9)
        style = {"fill": False, "ec": INK, "ls": (0, (6, 4)), "lw": 1.5, "zorder": 2.5}
        axes.add_patch(Circle((one[0, 0].item(), one[0, 1].item()), radius, **style))
        draw_points(axes, sources, 22 if len(sources) > 1 else 170)
        _window(axes, reach, title)
    figure.supxlabel(
        f"Outside the circle the directions of both fields agree to {ALIKE:.0f}°", fontsize=12
    )
    return figure


def _alike_from(many: Tensor, one: Tensor) -> float:
    """The radius about `one` from which on the two fields differ by `ALIKE` degrees at most."""
    near, far = 0.1, 50.0
    for _ in range(40):
        radius = math.sqrt(near * far)
        circle = one + radius * directions(720)
        fields = [poisson_field(circle, 0.0, sources, D=0) for sources in (many, one)]
        angle = 2 * ((fields[0] - fields[1]).norm(dim=1).max() / 2).asin()
        near, far = (radius, far) if angle > math.radians(ALIKE) else (near, radius)
    return far


def _window(axes: Axes, reach: float, title: str) -> None:
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], title=title)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(PALE)
