# SPDX-License-Identifier: Apache-2.0
"""Images to be judged: in the form that they are saved in, and from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pfgm_kernels._checks import integer
from pfgm_kernels.training.data import DataSet

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # of 8 bits: what is beyond would be cut, not scaled


def channels(images: Tensor) -> Tensor:
    """Images (n, h, w) or (n, c, h, w) as (n, c, h, w). Raises ValueError for anything else."""
    if images.dtype != torch.uint8 or images.ndim not in (3, 4):
        kind = str(images.dtype).removeprefix("torch.")
        raise ValueError(
            f"expected uint8 images (n, h, w) or (n, c, h, w), got {kind} of {tuple(images.shape)}"
        )
    return images[:, None] if images.ndim == 3 else images


def stored(samples: Tensor, data: DataSet) -> Tensor:
    """Samples (n, *event) as the data set stores its own: of images 8 bits, as a file would.

    Points in [low, high], and what is beyond goes to the nearer end. Raises ValueError for another
    shape and for what is not finite.
    """
    if samples.shape[1:] != data.event_shape or len(samples) == 0:
        raise ValueError(
            f"samples expects the shape (n, *event) with the event {data.event_shape} of "
            f"{data.name}, got {tuple(samples.shape)}"
        )
    samples = samples.detach().cpu()
    if not data.is_image:
        _finite(samples)
        return samples.float()
    return samples if samples.dtype == torch.uint8 else eight_bits(samples, data.low, data.high)


def eight_bits(samples: Tensor, low: float, high: float) -> Tensor:
    """Images (n, *event), of which low ... high become 0 ... 255, uint8.

    What is beyond goes to the nearer end. Raises ValueError for what is not finite.
    """
    _finite(samples)
    values = (samples.double() - low) * (255 / (high - low))
    return values.round().clamp(0, 255).to(torch.uint8)


def _finite(samples: Tensor) -> None:
    broken = int((~samples.flatten(1).isfinite().all(dim=1)).sum())
    if broken:
        raise ValueError(f"samples expects finite values, got {broken} samples with others")


def read_images(path: Path, data: DataSet, count: int | None = None) -> Tensor:
    """The first ``count`` images of a folder, by name, or of an ``.npz`` file: uint8 (n, *event).

    An ``.npz`` holds them as ``images`` or ``arr_0``, uint8 of shape (n, *event) or (n, h, w, c).
    Raises FileNotFoundError and ValueError, naming the file that is missing, damaged or of another
    size than the images of ``data``, and for a count under 1.
    """
    if count is not None:
        integer("count", count)
    if not data.is_image:
        raise ValueError(f"--images expects a data set of images, got {data.name}")
    images = _npz(path, data) if path.suffix == ".npz" else _folder(path, data, count)
    return images[:count]


def _folder(path: Path, data: DataSet, count: int | None) -> Tensor:
    if not path.is_dir():
        raise FileNotFoundError(f"expected a folder or an .npz file of images: {path} is neither")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"expected images ({', '.join(SUFFIXES)}) in {path}, got none")
    *_, height, width = event = data.event_shape
    grey = len(event) == 2 or event[0] == 1
    images = np.empty((len(files[:count]), height, width, 1 if grey else 3), np.uint8)
    for place, file in zip(images, files, strict=False):
        pixels = None
        try:
            with Image.open(file) as picture:
                size, mode = picture.size, picture.mode
                if mode in MODES and size == (width, height):
                    pixels = np.asarray(picture.convert("L" if grey else "RGB"))
        except Exception as error:  # of a dozen types, by format and damage
            raise ValueError(f"damaged image {file}: {error}") from error
        if pixels is None:
            raise ValueError(
                f"{file} expects 8 bits and the size {width} × {height} of {data.name}, "
                f"got mode {mode} and {size[0]} × {size[1]}"
            )
        place[:] = pixels.reshape(place.shape)
    return torch.from_numpy(images).permute(0, 3, 1, 2).reshape(-1, *event)


def _npz(path: Path, data: DataSet) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"expected the file {path}; it does not exist")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = [name for name in ("images", "arr_0") if name in arrays.files]
            if not names:
                raise ValueError(f"expected an array `images` or `arr_0`, got {arrays.files}")
            images = torch.from_numpy(arrays[names[0]])
    except Exception as error:  # of a dozen types, by damage
        raise ValueError(f"damaged file {path}: {error}") from error
    event = data.event_shape
    if images.dtype == torch.uint8 and len(images):
        if images.shape[1:] == event:
            return images
        if images.ndim == 4 and images.movedim(3, 1).shape[1:] in (event, (1, *event)):
            return images.movedim(3, 1).reshape(-1, *event)
    kind = str(images.dtype).removeprefix("torch.")
    raise ValueError(
        f"{path} expects uint8 images (n, {', '.join(map(str, event))}) or (n, h, w, c) "
        f"as those of {data.name}, got {kind} of shape {tuple(images.shape)}"
    )
