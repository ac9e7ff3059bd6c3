# SPDX-License-Identifier: Apache-2.0
"""How good samples are, beside held-out data that are judged in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.evaluation.convolutional import Convolutional
from pfgm_kernels.training.evaluation.images import stored
from pfgm_kernels.training.evaluation.metrics import (
    COPY,
    NEIGHBOURS,
    Moments,
    copy_ratio,
    frechet_distance,
    inception_score,
    interval,
    moments,
    nearest,
    precision_recall,
)
from pfgm_kernels.training.evaluation.perceptron import Perceptron
from pfgm_kernels.training.progress import progress_bar

BATCH = 250
SPLIT, SPLITS = 1000, 10  # of Inception Scores
LEAST_SIDE = 16  # of images for which convolutions pay


class Features(Protocol):
    """What images are judged by; each method takes them as their data set stores them."""

    name: str

    def features(self, images: Tensor) -> np.ndarray:
        """(n, *event) -> (n, f)."""
        ...

    def probabilities(self, images: Tensor) -> np.ndarray | None:
        """(n, *event) -> (n, classes), or None of features alone."""
        ...


@dataclass(frozen=True)
class Quality:
    """Measures of one set of images; those of ``metrics`` over the same number of each set."""

    frechet_distance: float
    """To all training images."""
    precision: float
    recall: float
    """Of, and against, as many training images."""
    inception_score: float | None
    """None where the features come without classes."""
    inception_score_deviation: float | None
    """Over parts of at least 1,000 images, ten at most; None where there is but one."""
    copies_share: float
    """Of all samples, and of ``count`` held-out images."""
    copies_interval: tuple[float, float]
    top_probability: float | None
    """The mean over the set of the probability of the likeliest class."""


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` measures."""

    features: str
    """What the images are judged by."""
    feature_count: int
    samples: int
    count: int
    """Images of each set that distances, precision, recall and scores are of."""
    frechet_distance_of_all: float
    """Of all samples to all training images: what publications give, for 50,000 samples."""
    sample: Quality
    held_out: Quality
    classes: list[int] | None
    """The class that each sample is given."""
    class_shares: list[float] | None
    held_out_class_shares: list[float] | None
    held_out_accuracy: float | None
    """Of a classifier trained on the data set; None of other features."""
    nearest: list[int]
    """The index of the training image that is nearest to each sample."""
    nearest_ratio: list[float]
    """The distance to it over that to the second nearest: a copy's is up to 1/3."""


def classifier(data: DataSet, console: Console | None = None) -> Features:
    """A classifier trained on the data set: of convolutions, where it has images large enough.

    Raises ValueError for a data set without labels.
    """
    *_, height, width = (1, *data.event_shape)
    if data.is_image and min(height, width) >= LEAST_SIDE:
        return Convolutional(data, console=console)
    return Perceptron(data)


def evaluate(
    samples: Tensor,
    data: DataSet,
    features: Features | None = None,
    *,
    console: Console | None = None,
) -> Evaluation:
    """Judges samples (n, *event), floats in the data's range or uint8, beside the held-out images.

    Every measure is taken of both in the same way, with the training images as what is to be
    matched: what the held-out images get is what perfect samples would get. Measures that depend on
    the number of images are taken of ``count`` of each, drawn at random: the lesser of n and the
    number of held-out images. Images are judged as a file holds them, in 8 bits.

    features: by default those of ``classifier``. Raises ValueError for samples that do not fit the
    data set, or that are fewer than what the measures need.
    """
    console = console or Console(quiet=True)
    samples, held_out, train = stored(samples, data), data.held_out.cpu(), data.train.cpu()
    count = min(len(samples), len(held_out), len(train))
    if count <= NEIGHBOURS:
        least = NEIGHBOURS + 1
        raise ValueError(f"expected at least {least} samples and held-out images, got {count}")
    judge = features or classifier(data, console)
    known, _ = _seen(judge, "training", train, console, classes=False)
    targets = _Targets(moments(known), known[_rows(len(known), count)])
    found, p = _seen(judge, "sampled", samples, console)
    real, real_p = _seen(judge, "held-out", held_out, console)
    indices, ratios = _neighbours("sampled", samples, train, console)
    some = held_out[_rows(len(held_out), count)]
    _, real_ratios = _neighbours("held-out", some, train, console)
    labels = data.held_out_labels
    accuracy = None
    if features is None and real_p is not None and labels is not None:
        accuracy = float((real_p.argmax(1) == labels.cpu().numpy()).mean())
    with console.status("Measuring"):
        return Evaluation(
            features=judge.name,
            feature_count=known.shape[1],
            samples=len(samples),
            count=count,
            frechet_distance_of_all=frechet_distance(moments(found), targets.all),
            sample=_quality(found, p, ratios, targets),
            held_out=_quality(real, real_p, real_ratios, targets),
            classes=None if p is None else p.argmax(1).tolist(),
            class_shares=_shares(p),
            held_out_class_shares=_shares(real_p),
            held_out_accuracy=accuracy,
            nearest=indices.tolist(),
            nearest_ratio=ratios.tolist(),
        )


class _Targets(NamedTuple):
    """What is to be matched: the features of all training images, and of n of them."""

    all: Moments
    some: np.ndarray


def _neighbours(
    name: str, images: Tensor, train: Tensor, console: Console
) -> tuple[np.ndarray, np.ndarray]:
    """The indices (n,) of the nearest training images, and by how much they are the nearest."""
    with progress_bar(console, f"Nearest neighbours, {name}", 1.0) as update:
        distances, indices = nearest(
            images.flatten(1).numpy(), train.flatten(1).numpy(), 2, lambda done: update(done, "")
        )
    return indices[:, 0], copy_ratio(distances)


def _seen(
    judge: Features, name: str, images: Tensor, console: Console, classes: bool = True
) -> tuple[np.ndarray, np.ndarray | None]:
    """Features (n, f), and probabilities (n, classes) if wanted and there are any."""
    features: list[np.ndarray] = []
    probabilities: list[np.ndarray] = []
    with progress_bar(console, f"Features, {name}", len(images)) as update:
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            features.append(judge.features(part))
            if classes and (p := judge.probabilities(part)) is not None:
                probabilities.append(p)
            update(start + len(part), f"by {judge.name}")
    return np.concatenate(features), np.concatenate(probabilities) if probabilities else None


def _quality(
    features: np.ndarray, p: np.ndarray | None, ratios: np.ndarray, targets: _Targets
) -> Quality:
    rows = _rows(len(features), len(targets.some))
    precision, recall = precision_recall(targets.some, features[rows])
    splits = min(max(len(rows) // SPLIT, 1), SPLITS)
    score, deviation = (None, None) if p is None else inception_score(p[rows], splits)
    share = float((ratios <= COPY).mean())
    return Quality(
        frechet_distance=frechet_distance(moments(features[rows]), targets.all),
        precision=precision,
        recall=recall,
        inception_score=score,
        inception_score_deviation=None if splits == 1 else deviation,
        copies_share=share,
        copies_interval=interval(share, len(ratios)),
        top_probability=None if p is None else float(p.max(1).mean()),
    )


def _rows(n: int, count: int) -> np.ndarray:
    """``count`` of n rows, the same each time; at random, as files are sorted in some way."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randperm(n, generator=generator, device="cpu")[:count].numpy()


def _shares(probabilities: np.ndarray | None) -> list[float] | None:
    if probabilities is None:
        return None
    classes = probabilities.argmax(1)
    return (np.bincount(classes, minlength=probabilities.shape[1]) / len(classes)).tolist()
