# SPDX-License-Identifier: Apache-2.0
"""Data sets by name, or from the files of their users.

Every file is checked against its own header, checksum or fixed layout, and one that is damaged or
hostile is named in one sentence. No pickle is ever executed and no archive unpacked to the disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pfgm_kernels.training.data.arrays import load_npy, load_npz
from pfgm_kernels.training.data.builtin import LOADERS
from pfgm_kernels.training.data.checks import DataError, check_share
from pfgm_kernels.training.data.dataset import DataSet, Moments
from pfgm_kernels.training.data.idx_cifar import find_mnist, load_mnist
from pfgm_kernels.training.data.images import load_images
from pfgm_kernels.training.data.sources import Archive, Folder

__all__ = ["NAMES", "DataSet", "Moments", "load"]

NAMES = tuple(LOADERS)
PATHS = "a folder or .zip of images, a .npy or a .npz file"


def load(
    data: str | os.PathLike[str],
    *,
    held_out: float | None = None,
    flips: bool = False,
    progress: Callable[[float], None] | None = None,
) -> DataSet:
    """Loads a data set, one of ``NAMES`` or from a path; its name is then the absolute path.

    A path leads to one of

    * a folder of PNG, JPEG, WebP and BMP images, at any depth, in the order of their names, or a
      ZIP of such a folder, as StyleGAN's and EDM's ``dataset_tool`` makes it, too. Labels are those
      of ``dataset.json``; without one, folders at the top are the classes, numbered in sorted
      order. Images are of one size; all grey, or all RGB, grey ones among them repeated.
    * ``.npy``: images (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3, uint8 or floats, or
      vectors (N, d) of floats; or ``.npz`` with such an array named images, x or data and, if
      there are labels, one of integers (N,) named labels or y. Floats are taken as they are.
    * a folder with the four files of MNIST, as torchvision unpacks them, too.

    Args:
        data: name or path; a name that is also a file or folder is that with ``./`` before it.
        held_out: the share of the rows that is held out, at most 10,000, always the same ones
            (`split` says which); at least one, and none where it is 0. By default a tenth, and of
            data that come with a part held out, that part: names, MNIST, and images in ``train/``
            beside ``val/`` or ``test/``. These take no other share, but images take 0: all of them
            are then to train on.
        flips: whether to append the mirror images, as `DataSet.with_flips` does.
        progress: called now and then with the fraction that is read.

    Raises:
        ValueError: an unknown name, ``PFGM_DATA`` not set where it is needed, data that are
            damaged, hostile or not of these kinds; the message names the file. A share for data
            that come with a part held out, and flips of what is no image.
        FileNotFoundError: a file that is missing.
    """
    found = _load(data, check_share(held_out), progress or (lambda fraction: None))
    if held_out is not None and found.share is None:
        raise DataError(
            f"held_out expects no share for {found.name}, which comes with a part held out, "
            f"got {held_out}"
        )
    return found.with_flips() if flips else found


def _load(
    data: str | os.PathLike[str], share: float | None, report: Callable[[float], None]
) -> DataSet:
    if data in LOADERS:
        return LOADERS[str(data)]()
    path = Path(os.path.abspath(data))
    name = str(path)
    if path.is_dir() and os.fspath(data):
        if (mnist := find_mnist(path)) is not None:
            return load_mnist(name, mnist)
        return load_images(name, Folder(path), share, report)
    if not path.is_file():
        if os.path.dirname(data) or path.suffix:
            raise FileNotFoundError(f"expected {PATHS}; {path} is none, or does not exist")
        raise ValueError(
            f"unknown data set {str(data)!r}; expected one of {', '.join(NAMES)}, or {PATHS}"
        )
    match path.suffix.lower():
        case ".zip":
            with Archive(path) as archive:
                return load_images(name, archive, share, report)
        case ".npy":
            return load_npy(name, path, share, report)
        case ".npz":
            return load_npz(name, path, share, report)
    raise ValueError(f"{path}: expected {PATHS}, got a file that ends in {path.suffix or 'none'!r}")
