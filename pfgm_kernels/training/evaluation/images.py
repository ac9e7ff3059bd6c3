# SPDX-License-Identifier: Apache-2.0
"""Images to be judged: in the form that they are saved in, and from files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pfgm_kernels._checks import integer
from pfgm_kernels.training import data as data_sets
from pfgm_kernels.training.data import DataSet


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
    """The first ``count`` images of what `data.load` reads, in its order: uint8 (n, *event). Grey
    ones are repeated where those of ``data`` are in colour.

    Raises FileNotFoundError and ValueError as `data.load` does, and for images of another size than
    those of ``data``, for colours where these are grey, and for a count under 1.
    """
    if count is not None:
        integer("count", count)
    if not data.is_image:
        raise ValueError(f"--images expects a data set of images, got {data.name}")
    found = data_sets.load(path.absolute(), held_out=0)
    images = found.train[:count]
    *_, height, width = event = data.event_shape
    if not found.is_image or found.event_shape[-2:] != (height, width):
        kind = str(images.dtype).removeprefix("torch.")
        raise ValueError(
            f"{path} expects uint8 images of {height} × {width} pixels as those of {data.name}, "
            f"got {kind} of shape {tuple(images.shape)}"
        )
    grey = len(event) == 2 or event[0] == 1
    if grey and images.ndim == 4:
        if not torch.equal(images, images[:, :1].expand_as(images)):
            raise ValueError(f"{path} expects grey images as those of {data.name}, got colours")
        images = images[:, 0]
    return channels(images).expand(-1, 1 if grey else 3, -1, -1).reshape(-1, *event)
