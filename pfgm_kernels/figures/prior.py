# SPDX-License-Identifier: Apache-2.0
"""Where samples start: the plane t = T, and how the hemisphere is stretched over it."""

from __future__ import annotations

import math

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pfgm_kernels.figures.canvas import BLUE, GOLD, INK, PALE, SERIES, sheet
from pfgm_kernels.figures.lines import directions, draw_lines, draw_points, trace
from pfgm_kernels.flow import log_prior, sample_prior

DIMENSIONS = (1, 2, 8, 64, 3072)


def hemisphere(detail: float = 1.0) -> Figure:
    """The prior on the plane t = T, and how the radius is stretched, Eqs. (5)–(7).

        p(x) = 2 T / S_{d+1}(1) · (‖x‖² + T²)^(−(d+1)/2)
        p(r) ∝ r^(d−1) (r² + T²)^(−(d+1)/2)

    Far from the data the lines are straight and cross a hemisphere evenly. They project it on the
    plane under it: left for d = 1, where p is Cauchy's density. Right: the density of log r, which
    is highest at r = √d T, over a histogram of draws of `sample_prior`.
    """
    figure = sheet(12, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.62, 1))
    _projection(left, max(8, round(38 * detail)))
    _radii(right, max(500, round(20_000 * detail)))
    return figure


def _projection(axes: Axes, count: int) -> None:
    T, radius, reach, top = 1.0, 2.0, 2.75, 2.5
    data = torch.tensor([[-0.15], [-0.07], [0.0], [0.06], [0.13]], dtype=torch.float64)
    sphere = radius * directions(count, 0, math.pi)
    draw_lines(axes, torch.stack([sphere, 3 * sphere]), PALE, width=0.8)
    draw_lines(axes, trace(sphere, data, D=1, step=0.01, count=220, toward=True), width=0.8)
    axes.plot(*(radius * directions(400, 0, math.pi)).T.numpy(), color=GOLD, linewidth=1.8)
    draw_points(axes, sphere, 28, GOLD)
    x = torch.linspace(-reach, reach, 400, dtype=torch.float64)
    density = 1.4 * log_prior(x[:, None], T=T).exp()
    axes.fill_between(x.numpy(), T, T + density.numpy(), color=BLUE, alpha=0.22, linewidth=0)
    axes.plot((-reach, reach), (T, T), color=INK, linewidth=1.2)
    crossing = T * sphere / sphere[:, 1:]
    draw_points(axes, crossing[crossing[:, 0].abs() < reach], 30, INK)
    draw_points(axes, torch.nn.functional.pad(data, (0, 1)), 45)
    axes.set(xlim=(-reach, reach), ylim=(0, top), aspect="equal", xticks=[], yticks=[0, T])
    axes.set_yticklabels(["$0$", "$T$"], fontsize=13)
    axes.set_ylabel("$t$", rotation=0, labelpad=0, fontsize=13)
    axes.set_xlabel("$x$", fontsize=13)
    axes.set_title("Even on the hemisphere, stretched on the plane $t = T$")


def _radii(axes: Axes, count: int) -> None:
    generator = torch.Generator().manual_seed(5)
    log_r = torch.linspace(-2, 3.5, 400, dtype=torch.float64)
    for d, color in zip(DIMENSIONS, SERIES, strict=False):
        # log_prior sees the radius alone: any point of the sphere will do.
        x = torch.nn.functional.pad(10 ** log_r[:, None], (0, d - 1))
        log_area = math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)
        log_density = log_prior(x, T=1) + log_area + d * log_r * math.log(10)
        density = math.log(10) * log_density.exp()
        drawn = sample_prior(count // (1 + d // 1024), d, T=1, generator=generator)
        bins, range_ = 55, (log_r[0].item(), log_r[-1].item())
        height, edges = torch.histogram(drawn.norm(dim=1).log10(), bins, range=range_)
        height *= bins / (range_[1] - range_[0]) / len(drawn)
        axes.stairs(height.numpy(), edges.numpy(), color=color, alpha=0.16, fill=True)
        axes.plot(log_r.numpy(), density.numpy(), color=color, linewidth=1.8)
        peak = density.max().item() + 0.03
        name = f"$d = {d}$" if d == DIMENSIONS[0] else f"${d}$"
        axes.text(math.log10(d) / 2, peak, name, color=color, ha="center", fontsize=12)
    axes.set(xlim=range_, ylim=(0, 1.28), yticks=[])
    axes.set_xticks(range(-2, 4), [f"$10^{{{e}}}$" for e in range(-2, 4)])
    axes.spines.left.set_visible(False)
    axes.set_xlabel("$r\\, /\\, T$", fontsize=13)
    axes.set_title("Density of $\\log r$ in $d$ dimensions")
