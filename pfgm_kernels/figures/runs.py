# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: grids of images, the loss, and how samples travel to the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Line3DCollection  # type: ignore[import-untyped]
from torch import Tensor

from pfgm_kernels.figures.canvas import save, sheet
from pfgm_kernels.flow import Trajectory

PIXELS_PER_PIXEL = 6


def check_drawable(event_shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `draw_samples` can draw such events."""
    channels = event_shape[0] if len(event_shape) == 3 else 1
    if event_shape != (2,) and (len(event_shape) < 2 or channels not in (1, 3)):
        raise ValueError(
            "a picture expects images (h, w) or (3, h, w), or points (2,), got events of shape "
            f"{event_shape}"
        )


def draw_samples(samples: Tensor, path: Path, columns: int | None = None) -> None:
    """A grid of images (n, h, w) or (n, 3, h, w) in [-1, 1], or a scatter plot of points (n, 2)."""
    if samples.ndim == 2 and samples.shape[1] == 2:
        figure = sheet(6, 6)
        axes = figure.add_subplot()
        axes.scatter(samples[:, 0], samples[:, 1], s=4, c="#3b528b", alpha=0.6, linewidths=0)
        axes.set_aspect("equal")
    else:
        picture = tile(samples, columns or max(1, round(len(samples) ** 0.5)))
        width = max(6, columns or 0)
        figure = sheet(width, width * picture.shape[0] / picture.shape[1])
        _show(figure.add_subplot(), picture)
    save(figure, path)


def draw_comparison(samples: Tensor, real: Tensor, path: Path) -> None:
    """Two grids side by side, ten in a row, each (n, h, w) in [-1, 1]: samples and real images."""
    figure = sheet(11, 5.9)
    for axes, images, title in zip(
        figure.subplots(1, 2), (samples, real), ("samples", "real, held out"), strict=True
    ):
        _show(axes, tile(images, columns=10))
        axes.set_title(title, fontsize=15)
    save(figure, path)


def draw_loss(losses: list[float], path: Path, window: int = 50) -> None:
    """The loss of each step, and its mean over ``window`` steps, on a logarithmic scale."""
    values = np.asarray(losses)
    window = min(window, len(values))
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    figure = sheet(7, 4)
    axes = figure.add_subplot()
    axes.semilogy(np.arange(1, len(values) + 1), values, color="#a0b4d0", linewidth=0.5)
    axes.semilogy(np.arange(window, len(values) + 1), mean, color="#3b528b", linewidth=1.8)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, Eq. (12)")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    save(figure, path)


def draw_trajectories(lines: Trajectory, points: Tensor, digits: Trajectory, path: Path) -> None:
    """Left: field lines (S, B, 2) that fall on ``points`` (N, 2). Right: digits (S, B, h, w)."""
    assert lines.path is not None
    assert digits.path is not None
    figure = sheet(13, 6.2)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.05))[0]
    _field_lines(left, lines.path, lines.times, points)
    _morphing(right, digits.path, digits.times)
    save(figure, path)


def tile(images: Tensor, columns: int) -> np.ndarray:
    """Images (n, h, w) or (n, 3, h, w) in [-1, 1] -> one picture (H, W, 3) in [0, 1].

    Each pixel is enlarged, the images stand in rows of ``columns`` with white lines between them.
    Grey images are drawn as ink on paper: 1 is black.
    """
    if images.ndim == 4 and images.shape[1] == 1:
        images = images[:, 0]
    if images.ndim == 3:
        images = -images[:, None].expand(-1, 3, -1, -1)
    elif images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"a picture expects images (n, h, w) or (n, 3, h, w), got {tuple(images.shape)}"
        )
    values = ((images.clamp(-1, 1) + 1) / 2).repeat_interleave(PIXELS_PER_PIXEL, 2)
    values = values.repeat_interleave(PIXELS_PER_PIXEL, 3)
    values = torch.nn.functional.pad(values, (3, 3, 3, 3), value=1.0)
    blank = values.new_ones(-len(values) % columns, *values.shape[1:])
    values = torch.cat([values, blank])
    rows = values.unflatten(0, (-1, columns))
    return rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).numpy()


def _field_lines(figure: Figure, path: Tensor, times: list[float], points: Tensor) -> None:
    """The lines in the space of x and t, cut to a box around the data, coloured by t."""
    reach = 2.2 * float(points.abs().max())
    t = path.new_tensor(times)[:, None, None].expand(-1, path.shape[1], 1)
    states = torch.cat([path, t], dim=2)
    segments = torch.stack([states[:-1], states[1:]], dim=2).flatten(0, 1)
    segments = segments[(segments.abs() <= reach).all(dim=2).all(dim=1)]
    axes: Any = figure.add_axes((-0.12, -0.12, 1.24, 1.16), projection="3d")
    lines = Line3DCollection(segments.numpy(), cmap="viridis_r", linewidths=0.6, alpha=0.75)
    lines.set_array(segments[:, 0, 2].numpy())
    axes.add_collection(lines)
    axes.scatter(points[:, 0], points[:, 1], 0, s=5, c="#d1495b", depthshade=False)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), zlim=(0, reach))
    axes.set_box_aspect((2, 2, 1.1))
    axes.view_init(elev=28, azim=-60)
    axes.set_axis_off()
    figure.suptitle("field lines of the exact field fall on the data at t = 0", fontsize=13)


def _morphing(figure: Figure, path: Tensor, times: list[float]) -> None:
    """One row a sample; from left to right t falls. Each state is shown over its own range."""
    # Little changes below t = 0.03, so the columns are even in log t above it, and the end.
    even = np.geomspace(times[0], 0.03, 8)
    wanted = np.append(np.abs(np.subtract.outer(even, times)).argmin(axis=1), len(times) - 1)
    states = path[torch.from_numpy(wanted)].transpose(0, 1)
    scale = states.flatten(2).abs().amax(dim=2).clamp_min(1)
    images = (states / scale[:, :, None, None]).flatten(0, 1)
    axes = figure.add_subplot()
    _show(axes, tile(images, columns=len(wanted)))
    width = PIXELS_PER_PIXEL * path.shape[-1] + 6
    axes.set_axis_on()
    axes.set_frame_on(False)
    axes.set_yticks([])
    axes.set_xticks(
        (np.arange(len(wanted)) + 0.5) * width, [f"{times[i]:.2g}" for i in wanted], fontsize=10
    )
    axes.tick_params(length=0)
    axes.set_xlabel("t", fontsize=12)
    figure.suptitle("samples of the network on their way", fontsize=13)


def _show(axes: Axes, picture: np.ndarray) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set_axis_off()
