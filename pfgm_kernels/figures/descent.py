# SPDX-License-Identifier: Apache-2.0
"""Samples on their way from the plane t = T to the data."""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Line3DCollection  # type: ignore[import-untyped]
from torch import Tensor

from pfgm_kernels import ReferenceSet, poisson_displacement, poisson_field
from pfgm_kernels.figures.canvas import BLUE, DUSK, GOLD, GREY, INK, RED, SKY, sheet
from pfgm_kernels.figures.lines import spiral
from pfgm_kernels.flow import log_prior, sample, sample_prior

MODES = ((-1.15, 0.14, 0.3), (0.1, 0.1, 0.2), (1.0, 0.22, 0.5))  # mean, deviation, share
COLORS_OF_MODES = (RED, GOLD, BLUE)


def trajectories(detail: float = 1.0) -> Figure:
    """Lines of the sampling ODE, Eq. (4), from the prior at t = T down to data at t = 0.

        dx/dt = F_x / F_t,      p_t(x) = (1/N) Σ_j 2 t / (S_{d+1}(1) (‖x − x0_j‖² + t²)^((d+1)/2))

    Left, d = 1: the lines start at even quantiles of the prior, so that between any two of them
    lies the same share of p_t, whose density is behind them, relative to its highest at each t.
    Right, d = 2: the lines in the space of x and t, each in the colour of where it ends.
    """
    figure = sheet(11, 4.7)
    left = figure.add_subplot(1, 2, 1)
    _one(left, max(6, round(56 * detail)))
    right: Any = figure.add_subplot(1, 2, 2, projection="3d")
    _two(right, max(20, round(500 * detail)))
    return figure


def _one(axes: Axes, count: int) -> None:
    T, reach = 3.0, 3.6
    parts = [
        torch.distributions.Normal(mean, deviation).icdf(_quantiles(round(1000 * share)))
        for mean, deviation, share in MODES
    ]
    data = torch.cat(parts)[:, None]
    path, times = _descend(data, T * (math.pi * (_quantiles(count) - 0.5)).tan()[:, None], T)
    _draw_density(axes, data, T, reach)
    middles = torch.tensor([[mean] for mean, *_ in MODES], dtype=torch.float64)
    for line, mode in zip(path[:, :, 0].T, torch.cdist(path[-1], middles).argmin(1), strict=True):
        axes.plot(line.numpy(), times, color=COLORS_OF_MODES[mode], linewidth=1.1)
    x = torch.linspace(-reach, reach, 500, dtype=torch.float64)
    prior = 3.2 * log_prior(x[:, None], T=T).exp()
    axes.fill_between(x.numpy(), T, T + prior.numpy(), color=GREY, alpha=0.45, linewidth=0)
    counts, edges = torch.histogram(data[:, 0], 160, range=(-reach, reach))
    counts *= -0.4 / counts.max()
    axes.stairs(counts.numpy(), edges.numpy(), color=GREY, alpha=0.6, fill=True)
    for y in (0, T):
        axes.plot((-reach, reach), (y, y), color=INK, linewidth=1)
    axes.set(xlim=(-reach, reach), ylim=(-0.45, T + 0.38), xlabel="$x$", xticks=[], yticks=(0, T))
    axes.set_yticklabels(["$0$", "$T$"], fontsize=13)
    axes.set_ylabel("$t$", rotation=0, fontsize=13)
    axes.spines[:].set_visible(False)
    axes.set_title("From the prior down to data, $d = 1$")


def _draw_density(axes: Axes, data: Tensor, T: float, reach: float) -> None:
    x = torch.linspace(-reach, reach, 300, dtype=torch.float64)
    t = torch.linspace(0, T, 301, dtype=torch.float64)[1:]
    grid_t, grid_x = torch.meshgrid(t, x, indexing="ij")
    log_mass = poisson_displacement(grid_x.reshape(-1, 1), grid_t.flatten(), data)[1]
    density = (log_mass.view(grid_t.shape) + grid_t.log()).exp()
    density /= density.amax(dim=1, keepdim=True)
    ends = (-reach, reach, 0, T)
    axes.imshow(density.numpy(), extent=ends, origin="lower", aspect="auto", cmap=SKY, vmax=1.5)


def _two(axes: Any, count: int) -> None:
    T, reach = 8.0, 2.4
    generator = torch.Generator().manual_seed(7)
    data = spiral(1500, generator)
    start = sample_prior(count, 2, T=T, generator=generator, dtype=torch.float64)
    path, times = _descend(data, start, T)
    hue = torch.cdist(path[-1], data).argmin(dim=1) / len(data)
    t = path.new_tensor(times)[:, None, None].expand(-1, count, 1)
    states = torch.cat([path, t], dim=2)
    # What is beyond a hemisphere is cut off, so that the lines end evenly on it.
    norm, each = states.norm(dim=2, keepdim=True), torch.arange(count)
    first = (norm[:, :, 0] <= reach).int().argmax(dim=0)
    last, inner, outer = first - 1, norm[first, each], norm[first - 1, each]
    cut = states[first, each].lerp(states[last, each], (reach - inner) / (outer - inner))
    paths = states.where(norm <= reach, cut).transpose(0, 1).numpy()
    lines = Line3DCollection(paths, cmap=DUSK, linewidths=0.8, alpha=0.6)
    lines.set_array(hue.numpy())
    lines.set_clip_on(False)
    axes.add_collection(lines)
    dots = {"depthshade": False, "cmap": DUSK, "vmin": 0, "vmax": 1}
    axes.scatter(*data.T.numpy(), 0, s=7, c=torch.linspace(0, 1, len(data)).numpy(), **dots)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), zlim=(0, reach))
    axes.set_box_aspect((2, 2, 1), zoom=1.5)
    axes.view_init(elev=30, azim=-62)
    axes.set_axis_off()
    axes.set_title("Field lines over data in the plane, $d = 2$")


def _descend(data: Tensor, start: Tensor, T: float) -> tuple[Tensor, list[float]]:
    """The states (S, B, d) at all times t on the way from T to 0, and these."""
    references = ReferenceSet(data)
    result = sample(
        lambda x, t: poisson_field(x, t, references), start, T=T, steps=60, keep_path=True
    )
    assert result.path is not None
    return result.path, result.times


def _quantiles(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count
