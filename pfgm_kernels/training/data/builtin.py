# SPDX-License-Identifier: Apache-2.0
"""Data sets by name: bundled digits, two-dimensional toy sets, MNIST and CIFAR-10 in PFGM_DATA.

The folder that the environment variable ``PFGM_DATA`` names holds

* ``mnist/`` with the four original IDX files, gzip-compressed or not, or ``MNIST/raw/`` with those
  as torchvision unpacks them, and
* ``cifar10/`` with ``data_batch_1.xz`` ... ``data_batch_5.xz`` and ``test_batch.xz`` (the batches
  of the "python version", xz-compressed), or ``cifar-10-batches-py/`` as the archive unpacks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pfgm_kernels.training.data.dataset import DataSet
from pfgm_kernels.training.data.idx_cifar import load_cifar10, load_mnist

TOY_TRAIN, TOY_HELD_OUT = 2_000, 500


def _digits() -> DataSet:
    """scikit-learn's 1,797 digits of 8x8 pixels, split once and for all into 1,437 and 360.

    Their values 0 ... 16 are stored as round(value * 255 / 16), at most 0.004 from the exact value
    in a range of [-1, 1], so that digits take the same 8-bit path as any other images.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    parts = train_test_split(
        images, digits.target, test_size=360, stratify=digits.target, random_state=0
    )
    train, held_out, train_labels, held_out_labels = (torch.from_numpy(part) for part in parts)
    return DataSet("digits", train, held_out, train_labels.long(), held_out_labels.long())


def _toy(name: str) -> DataSet:
    """2,500 points of a two-dimensional set, seeded, centred and scaled into [-1, 1]."""
    from sklearn.datasets import make_blobs, make_moons, make_swiss_roll

    count = TOY_TRAIN + TOY_HELD_OUT
    labels = None
    if name == "two_moons":
        points, labels = make_moons(count, noise=0.05, random_state=0)
    elif name == "swiss_roll":
        points = make_swiss_roll(count, noise=0.3, random_state=0)[0][:, [0, 2]]
    else:
        angles = np.arange(8) * (np.pi / 4)
        centers = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        points, labels = make_blobs(count, centers=centers, cluster_std=0.05, random_state=0)
    points = points - points.mean(axis=0)
    points = torch.from_numpy((points / np.abs(points).max()).astype(np.float32))
    targets = None if labels is None else torch.from_numpy(labels).long()
    return DataSet(
        name,
        points[:TOY_TRAIN],
        points[TOY_TRAIN:],
        None if targets is None else targets[:TOY_TRAIN],
        None if targets is None else targets[TOY_TRAIN:],
    )


def _mnist() -> DataSet:
    return load_mnist("mnist", _folder("mnist", "MNIST/raw"))


def _cifar10() -> DataSet:
    return load_cifar10("cifar10", _folder("cifar10", "cifar-10-batches-py"))


def _folder(*names: str) -> Path:
    """The first of the folders ``names`` that exists in the folder named by PFGM_DATA."""
    root = os.environ.get("PFGM_DATA")
    if not root:
        raise ValueError(
            f"the data set {names[0]} is read from a folder: set the environment variable "
            f"PFGM_DATA to the folder that holds {' or '.join(name + '/' for name in names)}"
        )
    for name in names:
        if (Path(root) / name).is_dir():
            return Path(root) / name
    raise FileNotFoundError(
        f"expected a folder {' or '.join(name + '/' for name in names)} in PFGM_DATA={root}"
    )


LOADERS: dict[str, Callable[[], DataSet]] = {
    "digits": _digits,
    "two_moons": partial(_toy, "two_moons"),
    "swiss_roll": partial(_toy, "swiss_roll"),
    "eight_gaussians": partial(_toy, "eight_gaussians"),
    "mnist": _mnist,
    "cifar10": _cifar10,
}
