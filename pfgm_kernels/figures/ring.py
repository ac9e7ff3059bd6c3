# SPDX-License-Identifier: Apache-2.0
"""Why the data's space gets one more dimension."""

from __future__ import annotations

import math

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pfgm_kernels.figures.canvas import GREY, RED, sheet
from pfgm_kernels.figures.lines import (
    directions,
    draw_arrows,
    draw_lines,
    draw_points,
    draw_strength,
    trace,
)

SOURCES = 360
STRENGTHS = (-1.3, 0.5)


def shell(detail: float = 1.0) -> Figure:
    """The field of a ring, in its own plane and in the space with one more dimension.

        F(x)    = E_{x0} [ (x − x0) / (S_2(1) ‖x − x0‖²) ]                          Eq. (2), D = 0
        F(x, t) = E_{x0} [ (x − x0, t) / (S_3(1) (‖x − x0‖² + t²)^(3/2)) ]           Eq. (3), D = 1

    Newton: inside a shell the first is 0, and no line from afar ever gets there. With t the lines
    that leave the ring inward rise within it, so that those from a plane t = T come down there.
    """
    ring = directions(SOURCES)
    figure = sheet(11, 5.4)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.28))
    _in_the_plane(left, ring, detail)
    _above_it(right, ring, detail)
    return figure


def _in_the_plane(axes: Axes, ring: Tensor, detail: float) -> None:
    """The plane of the data from above; lines leave the ring at equal distances."""
    count, ends = max(8, round(48 * detail)), (-2.1, 2.1)
    draw_strength(axes, ring, D=0, across=ends, up=ends, decades=STRENGTHS, detail=detail)
    lines = trace(1.02 * directions(count), ring, D=0, step=0.02, count=110)
    draw_lines(axes, lines)
    draw_arrows(axes, lines, at=28)
    axes.plot(*torch.cat([ring, ring[:1]]).T.numpy(), color=RED, linewidth=3.5, zorder=3)
    axes.text(0, 0, "no field", ha="center", va="center", color=GREY, fontsize=13, style="italic")
    axes.set_xlabel("$x_1$")
    axes.set_ylabel("$x_2$", rotation=0, labelpad=12)
    _frame(axes, ends, ends, "A ring in its plane ($D = 0$, $t = 0$)")


def _above_it(axes: Axes, ring: Tensor, detail: float) -> None:
    """The half-plane x_2 = 0, t > 0; lines leave the ring, a line of charge, at equal angles."""
    count, across, up = max(4, round(22 * detail)), (-2.6, 2.6), (0.0, 4.05)
    draw_strength(axes, ring, D=1, across=across, up=up, decades=STRENGTHS, detail=detail)
    for side in (-1, 1):
        fan = 0.03 * directions(count, 0, math.pi)
        start = torch.stack([side + fan[:, 0], torch.zeros(len(fan)), fan[:, 1]], dim=1)
        lines = trace(start, ring, D=1, step=0.02, count=260)[:, :, [0, 2]]
        draw_lines(axes, lines)
        draw_arrows(axes, lines, at=28)
    draw_points(axes, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 90)
    axes.set_xlabel("$x_1$")
    axes.set_ylabel("$t$", rotation=0, labelpad=12)
    _frame(axes, across, up, "The same ring with one more dimension ($D = 1$)")


def _frame(axes: Axes, across: tuple[float, float], up: tuple[float, float], title: str) -> None:
    axes.set(xlim=across, ylim=up, title=title)
    axes.set_xticks([-1, 0, 1])
    axes.set_yticks(range(math.ceil(up[0]), math.floor(up[1]) + 1))
    axes.tick_params(length=3)
