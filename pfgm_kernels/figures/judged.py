# SPDX-License-Identifier: Apache-2.0
"""The page that goes with an evaluation: samples, their nearest training images, the classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from pfgm_kernels.figures.canvas import BLUE, PALE, RED, save, sheet, style
from pfgm_kernels.figures.runs import tile
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.evaluation import Evaluation, Quality

SAMPLES, PAIRS = 100, 40


def draw_evaluation(samples: Tensor, data: DataSet, evaluation: Evaluation, path: Path) -> None:
    """The first samples (n, *event), as the data set stores its own; those most like one
    training image, each before that; measures, and the share of each class.

    Raises ValueError for samples that are neither images nor points in the plane.
    """
    samples = data.decode(samples)
    with style():
        figure = sheet(14, 7)
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 0.95, 0.7))
        closest = np.argsort(evaluation.nearest_ratio, kind="stable")[:PAIRS]
        near = data.decode(data.train[torch.tensor(evaluation.nearest)[closest]])
        _show(left, samples[:SAMPLES], 10)
        left.set_title("samples")
        _show(middle, torch.stack([samples[closest], near], dim=1).flatten(0, 1), 8)
        middle.set_title("most like a training image, each before that")
        _classes(right, evaluation)
        figure.suptitle(_summary(data, evaluation), x=0.02, ha="left", fontsize=11)
        save(figure, path)


def _show(axes: Axes, events: Tensor, columns: int) -> None:
    if events.ndim == 2 and events.shape[1] == 2:
        axes.scatter(events[:, 0], events[:, 1], s=6, c=BLUE, linewidths=0)
        axes.set_aspect("equal")
        return
    axes.imshow(tile(events, columns))
    axes.set_anchor("N")
    axes.set_axis_off()


def _classes(axes: Axes, evaluation: Evaluation) -> None:
    """Bars of the samples' shares, and marks of those of the held-out images."""
    shares, real = evaluation.class_shares, evaluation.held_out_class_shares
    if shares is None or real is None:
        axes.set_axis_off()
        return
    places = np.arange(len(shares))
    axes.barh(places, shares, color=PALE, edgecolor=BLUE, linewidth=0.8, label="samples")
    axes.scatter(
        real, places, marker="|", s=160, linewidths=2.5, color=RED, zorder=3, label="held out"
    )
    axes.set(ylim=(len(shares) - 0.4, -0.6), xlim=(0, 1.15 * max(*shares, *real)))
    if len(shares) <= 20:
        axes.set_yticks(places)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_title("share of each class")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.05), ncols=2, borderaxespad=0)


def _summary(data: DataSet, evaluation: Evaluation) -> str:
    def line(name: str, quality: Quality) -> str:
        score = quality.inception_score
        return (
            f"{name}: Fréchet distance {quality.frechet_distance:.3g}, "
            + ("" if score is None else f"Inception Score {score:.2f}, ")
            + f"precision {quality.precision:.2f}, recall {quality.recall:.2f}, "
            f"copies {quality.copies_share:.1%}"
        )

    return "\n".join(
        [
            f"{evaluation.samples:,} samples beside {data.name}, judged by {evaluation.features}; "
            f"n = {evaluation.count:,} on both sides",
            line("samples", evaluation.sample),
            line("held out", evaluation.held_out),
        ]
    )
