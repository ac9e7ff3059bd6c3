# SPDX-License-Identifier: Apache-2.0
"""Field lines: traced with the op, and drawn."""

from __future__ import annotations

import math

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor

from pfgm_kernels import poisson_displacement, poisson_field
from pfgm_kernels.figures.canvas import BLUE, RED, SKY

Range = tuple[float, float]


def directions(count: int, start: float = 0.0, stop: float = 2 * math.pi) -> Tensor:
    """(count, 2) float64: unit vectors in the middles of as many equal parts of an angle.

    Lines that leave a source in these directions carry the same flux.
    """
    angles = start + (stop - start) * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def spiral(count: int, generator: torch.Generator) -> Tensor:
    """(count, 2) float64 points along a spiral of radius 1, from its middle, with little noise."""
    turn = torch.linspace(0.02, 1, count, dtype=torch.float64).sqrt()
    angle = 4.4 * math.pi * turn
    points = turn[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return points + 0.012 * torch.randn(points.shape, generator=generator).double()


def trace(
    start: Tensor, x0: Tensor, *, D: float, step: float, count: int, toward: bool = False
) -> Tensor:
    """The field lines through `start`, (count + 1, B, n) float64, by Runge and Kutta's rule.

    They lead away from the data, or toward it, in steps of the length `step`, and are NaN from
    where they come as close to a source as that. For D = 0 the n = d coordinates are x, and Eq. (2)
    says the way; else they are (x, t) with n = d + 1, and Eq. (3) does.
    """
    sources = torch.nn.functional.pad(x0, (0, start.shape[1] - x0.shape[1]))
    h = step if toward else -step

    def slope(y: Tensor) -> Tensor:
        x, t = (y, 0.0) if D == 0 else (y[:, :-1], y[:, -1])
        return poisson_field(x, t, x0, D=D)[:, : y.shape[1]]

    lines = [start]
    for _ in range(count):
        y = lines[-1]
        k1 = slope(y)
        k2 = slope(y + h / 2 * k1)
        k3 = slope(y + h / 2 * k2)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(y + h * k3))
        if toward:
            y = y.where((torch.cdist(y, sources).amin(dim=1) > step)[:, None], math.nan)
        lines.append(y)
    return torch.stack(lines)


def draw_lines(
    axes: Axes, lines: Tensor, color: str = BLUE, width: float = 0.9, alpha: float = 1.0
) -> None:
    """Lines (S, B, 2), up to where they end."""
    parts = [line[line.isfinite().all(dim=1)].numpy() for line in lines.unbind(dim=1)]
    axes.add_collection(
        LineCollection(parts, colors=color, linewidths=width, alpha=alpha, capstyle="round")
    )


def draw_arrows(axes: Axes, lines: Tensor, at: int, color: str = BLUE, size: float = 7) -> None:
    """A head on each of the lines (S, B, 2), in the way they run, at the step `at`."""
    for tail, head in zip(lines[at - 1].tolist(), lines[at].tolist(), strict=True):
        arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 0, "mutation_scale": size}
        arrow |= {"shrinkA": 0, "shrinkB": 0}
        axes.annotate("", head, tail, arrowprops=arrow, annotation_clip=True)


def draw_points(axes: Axes, points: Tensor, size: float, color: str = RED) -> None:
    """Dots at points (n, 2), above the lines, `size` points² large."""
    edge = min(1.5, size / 60)
    x, y = points.T.numpy()
    dots = axes.scatter(x, y, s=size, c=color, edgecolors="white", linewidths=edge, zorder=3)
    dots.set_clip_on(False)


def draw_strength(
    axes: Axes,
    x0: Tensor,
    *,
    D: float,
    across: Range,
    up: Range,
    decades: Range,
    detail: float,
) -> None:
    """log10 ‖F‖ behind the lines, white where the field is 10 to the lower of `decades`.

    Up to the constant of Eqs. (2) and (3), ‖F‖ = exp(log_mass) ‖(v, t)‖ / N. Upward is the last
    component of x for D = 0, and else t.
    """
    pixels = max(30, round(300 * detail))
    x, y = (torch.linspace(*ends, pixels, dtype=torch.float64) for ends in (across, up))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)
    if D == 0:
        query, t = grid, torch.zeros(len(grid), dtype=torch.float64)
    else:
        d = x0.shape[1]
        query, t = torch.nn.functional.pad(grid[:, :1], (0, d - 1)), grid[:, 1]
    v, log_mass = poisson_displacement(query, t, x0, D=D)
    norm = torch.cat([v, t[:, None]], dim=1).norm(dim=1)
    strength = (log_mass + norm.log()) / math.log(10) - math.log10(len(x0))
    axes.imshow(
        strength.view(pixels, pixels).numpy(),
        extent=(*across, *up),
        origin="lower",
        cmap=SKY,
        vmin=decades[0],
        vmax=decades[1],
        interpolation="bilinear",
    )
