# SPDX-License-Identifier: Apache-2.0
"""Pictures: the article's, each drawn with the op itself, and those of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure

from pfgm_kernels.figures.batches import bias
from pfgm_kernels.figures.canvas import FORMATS, save, style
from pfgm_kernels.figures.descent import trajectories
from pfgm_kernels.figures.judged import draw_evaluation
from pfgm_kernels.figures.neighbours import weights
from pfgm_kernels.figures.plane import far_field, four_sources
from pfgm_kernels.figures.prior import hemisphere
from pfgm_kernels.figures.ring import shell
from pfgm_kernels.figures.runs import (
    PIXELS_PER_PIXEL,
    check_drawable,
    draw_comparison,
    draw_loss,
    draw_samples,
    draw_trajectories,
    tile,
)
from pfgm_kernels.training.data import DataSet

GEOMETRY: dict[str, Callable[[float], Figure]] = {
    "four-sources": four_sources,
    "far-field": far_field,
    "shell": shell,
    "hemisphere": hemisphere,
    "trajectories": trajectories,
}
OF_IMAGES: dict[str, Callable[[DataSet, float], Figure]] = {"weights": weights, "bias": bias}
NAMES = (*GEOMETRY, *OF_IMAGES)


def draw_figure(name: str, path: Path, data: DataSet, detail: float = 1.0) -> None:
    """Draws one of `NAMES` into a file that ends in one of `FORMATS`.

    data: images, for those `OF_IMAGES`. detail: how many lines, queries and draws, 1 for print.
    """
    with torch.device("cpu"), style():
        save(OF_IMAGES[name](data, detail) if name in OF_IMAGES else GEOMETRY[name](detail), path)


__all__ = [
    "FORMATS",
    "GEOMETRY",
    "NAMES",
    "OF_IMAGES",
    "PIXELS_PER_PIXEL",
    "check_drawable",
    "draw_comparison",
    "draw_evaluation",
    "draw_figure",
    "draw_loss",
    "draw_samples",
    "draw_trajectories",
    "tile",
]
