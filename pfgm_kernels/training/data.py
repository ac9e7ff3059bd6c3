# SPDX-License-Identifier: Apache-2.0
"""Data sets: bundled digits, two-dimensional toy sets, and MNIST and CIFAR-10 read from a folder.

The folder that the environment variable ``PFGM_DATA`` names holds

* ``mnist/`` with the four original IDX files, gzip-compressed, and
* ``cifar10/`` with ``data_batch_1.xz`` ... ``data_batch_5.xz`` and ``test_batch.xz`` (the batches
  of the "python version", xz-compressed), or ``cifar-10-batches-py/`` as the archive unpacks.

Every file is checked against its own header or fixed layout; no pickle is ever executed.
"""

from __future__ import annotations

import gzip
import lzma
import math
import os
import pickletools
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pfgm_kernels import ReferenceSet

CIFAR_ROWS, CIFAR_BYTES = 10_000, 3 * 32 * 32
IDX_IMAGES, IDX_LABELS = 0x803, 0x801
TOY_TRAIN, TOY_HELD_OUT = 2_000, 500


class Moments(NamedTuple):
    """What normalises a network."""

    center: Tensor
    """(*event), the mean."""
    spread: float
    """Root mean square of the components of x - center."""


@dataclass(frozen=True)
class DataSet:
    """A data set with a fixed split.

    ``train`` (N, *event) and ``held_out`` (H, *event) are uint8 images, whose values 0 ... 255
    stand for ``low`` ... ``high``, or float32 points. Labels are int64, (N,) and (H,), or None.
    """

    name: str
    train: Tensor
    held_out: Tensor
    train_labels: Tensor | None
    held_out_labels: Tensor | None
    low: float = -1.0
    high: float = 1.0

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.train.shape[1:])

    @property
    def is_image(self) -> bool:
        return self.train.dtype == torch.uint8

    def decode(self, values: Tensor) -> Tensor:
        """The float32 points that stored ``values`` (n, *event) stand for, the same shape."""
        if values.dtype != torch.uint8:
            return values
        return (self.low + (self.high - self.low) * values.double() / 255).float()

    def moments(self) -> Moments:
        """Of the training part, 1,000 points at a time: decoded, CIFAR-10 takes over 600 MB."""
        total = torch.zeros(self.event_shape, dtype=torch.float64, device=self.train.device)
        square = 0.0
        for part in self.train.split(1000):
            points = self.decode(part).double()
            total += points.sum(dim=0)
            square += points.square().sum().item()
        count, center = len(self.train), total / len(self.train)
        variance = square / (count * center.numel()) - center.square().mean().item()
        return Moments(center.float(), math.sqrt(variance))

    def references(self) -> ReferenceSet:
        """The whole training part as the references of the field."""
        if self.is_image:
            return ReferenceSet.from_images(self.train, low=self.low, high=self.high)
        return ReferenceSet(self.train)


def load(name: str) -> DataSet:
    """Loads a data set by name, one of ``NAMES``.

    Raises ValueError for an unknown name, for ``PFGM_DATA`` not set where it is needed, and for a
    damaged file; FileNotFoundError for a file that is missing.
    """
    if name not in _LOADERS:
        raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(NAMES)}")
    return _LOADERS[name]()


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
    folder = _folder("mnist")
    parts = []
    for stem in ("train", "t10k"):
        images = read_idx(folder / f"{stem}-images-idx3-ubyte.gz", IDX_IMAGES)
        labels = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", IDX_LABELS).long()
        if len(images) != len(labels):
            raise ValueError(
                f"damaged data in {folder}: expected as many {stem} labels as images, "
                f"got {len(labels)} labels and {len(images)} images"
            )
        parts.append((images, labels))
    (train, train_labels), (held_out, held_out_labels) = parts
    return DataSet("mnist", train, held_out, train_labels, held_out_labels)


def _cifar10() -> DataSet:
    folder = _folder("cifar10", "cifar-10-batches-py")
    suffix = ".xz" if folder.name == "cifar10" else ""
    names = [f"data_batch_{i}" for i in range(1, 6)]
    batches = [read_cifar_batch(folder / (name + suffix)) for name in names]
    held_out, held_out_labels = read_cifar_batch(folder / ("test_batch" + suffix))
    return DataSet(
        "cifar10",
        torch.cat([images for images, _ in batches]),
        held_out,
        torch.cat([labels for _, labels in batches]),
        held_out_labels,
    )


def read_idx(path: Path, magic: int) -> Tensor:
    """Reads a gzip-compressed IDX file of unsigned bytes: uint8 of the shape in its header.

    magic: the first four bytes, big-endian; their last is the number of axes. Raises ValueError,
    naming the file, where the magic number, the compression or the size is not as expected.
    """
    content = _decompress(path, gzip.open)
    axes = magic & 0xFF
    start = 4 + 4 * axes
    if len(content) < start:
        raise _damaged(path, f"a header of {start} bytes", f"{len(content)} bytes")
    found, *shape = struct.unpack(f">{1 + axes}I", content[:start])
    if found != magic:
        raise _damaged(path, f"magic number {magic:#06x}", f"{found:#06x}")
    expected = start + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise _damaged(path, f"{expected} bytes for shape {tuple(shape)}", f"{len(content)} bytes")
    values = np.frombuffer(content, np.uint8, offset=start).reshape(shape)
    return torch.from_numpy(values.copy())


def read_cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Reads one CIFAR-10 batch: uint8 images (10000, 3, 32, 32) and int64 labels (10000,).

    The file is a pickle, xz-compressed where its name ends in ``.xz``. Its opcodes are only listed,
    never executed: the images are the one constant of 30,720,000 bytes, the labels are the integers
    that follow the key "labels". Raises ValueError, naming the file, where these are not there.
    """
    content = _decompress(path, lzma.open if path.suffix == ".xz" else partial(open, mode="rb"))
    pixels: bytes | None = None
    labels: list[int] = []
    key = ""
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if isinstance(argument, (str, bytes)):
                if len(argument) == CIFAR_ROWS * CIFAR_BYTES:
                    pixels = argument if isinstance(argument, bytes) else argument.encode("latin-1")
                elif opcode.name != "GLOBAL":
                    key = argument if isinstance(argument, str) else argument.decode("latin-1")
            elif key == "labels" and "INT" in opcode.name and isinstance(argument, int):
                labels.append(argument)
    except (ValueError, IndexError) as error:
        raise _damaged(path, "a whole pickle", f"one of {len(content)} bytes ({error})") from error
    if pixels is None:
        raise _damaged(path, f"{CIFAR_ROWS} rows of {CIFAR_BYTES} bytes", "no such block")
    if len(labels) != CIFAR_ROWS or not all(0 <= label < 10 for label in labels):
        raise _damaged(
            path,
            f"{CIFAR_ROWS} labels of 0 ... 9",
            f"{len(labels)} labels of {min(labels, default=None)} ... {max(labels, default=None)}",
        )
    images = np.frombuffer(pixels, np.uint8).reshape(CIFAR_ROWS, 3, 32, 32)
    return torch.from_numpy(images.copy()), torch.from_numpy(np.array(labels))


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


def _decompress(path: Path, opener: Callable) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"expected the data file {path}; it does not exist")
    try:
        with opener(path) as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        size = path.stat().st_size
        raise _damaged(path, "a whole compressed file", f"one of {size} bytes ({error})") from error


def _damaged(path: Path, expected: str, actual: str) -> ValueError:
    return ValueError(f"damaged data file {path}: expected {expected}, got {actual}")


_LOADERS: dict[str, Callable[[], DataSet]] = {
    "digits": _digits,
    "two_moons": partial(_toy, "two_moons"),
    "swiss_roll": partial(_toy, "swiss_roll"),
    "eight_gaussians": partial(_toy, "eight_gaussians"),
    "mnist": _mnist,
    "cifar10": _cifar10,
}
NAMES = tuple(_LOADERS)
