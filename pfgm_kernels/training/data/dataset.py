# SPDX-License-Identifier: Apache-2.0
"""A data set in memory, and which of its rows are held out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pfgm_kernels import ReferenceSet
from pfgm_kernels.training.data.checks import DataError, fits

SHARE, MOST_HELD_OUT = 0.1, 10_000


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
    stand for ``low`` ... ``high``, or float32 points. Images have the event (height, width) where
    they are grey, and (3, height, width). Labels are int64, (N,) and (H,), or None.
    """

    name: str
    train: Tensor
    held_out: Tensor
    train_labels: Tensor | None
    held_out_labels: Tensor | None
    low: float = -1.0
    high: float = 1.0
    share: float | None = None
    """What was held out of the rows; None of data that came with a part held out."""
    flips: bool = False
    """Whether ``train`` has the mirror images, too."""

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

    @cached_property
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

    @cached_property
    def references(self) -> ReferenceSet:
        """The whole training part as the references of the field, prepared once."""
        return self._references(None)

    def references_by_class(self) -> ReferenceSet:
        """The same with its labels."""
        return self._references(self.train_labels)

    def references_of_part(self, rank: int, world: int, device: torch.device) -> ReferenceSet:
        """The same as those of a group, of which each rank holds a part on its device and has its
        own queries.
        """
        part = self.train[rank::world].to(device)
        return replace(self, train=part)._references(None, group=dist.group.WORLD, queries="local")

    def _references(self, labels: Tensor | None, **options: Any) -> ReferenceSet:
        if self.is_image:
            return ReferenceSet.from_images(
                self.train, self.low, self.high, labels=labels, **options
            )
        return ReferenceSet(self.train, labels=labels, **options)

    def with_flips(self) -> DataSet:
        """The same with the mirror image of each training image appended to ``train``.

        Batches and references then come from one distribution: flips of batches alone would be
        points that the field knows nothing of. They take twice the memory, and a step on the whole
        set takes twice as long for its targets. The held-out part stays as it is. Raises ValueError
        where these are not images, or flipped before.
        """
        if not self.is_image or self.flips:
            kind = str(self.train.dtype).removeprefix("torch.")
            got = "flipped ones" if self.is_image else f"{kind} points of shape {self.event_shape}"
            raise ValueError(f"flips expects images of 8 bits, got {got} ({self.name})")
        fits(self.name, (2 * len(self.train), *self.event_shape), 1)
        labels = self.train_labels
        return replace(
            self,
            train=torch.cat([self.train, self.train.flip(-1)]),
            train_labels=None if labels is None else torch.cat([labels, labels]),
            flips=True,
        )


def pictures(samples: Tensor, low: float, high: float) -> Tensor:
    """Images (n, height, width) or (n, channels, height, width) of values low ... high as float64
    (n, channels, height, width) in [0, 1]; what is beyond goes to the nearer end.

    In float64, rounding gives the 8 bits that are saved of them.
    """
    images = ((samples.double() - low) / (high - low)).clamp(0, 1)
    return images if images.dim() == 4 else images[:, None]


class Split(NamedTuple):
    """Where the rows of a data set go in memory: those to train on first, in their order."""

    places: np.ndarray
    """(N,) int64, the place of each row as it is read."""
    train: int
    """How many are to train on."""
    share: float | None
    """Of the rows that is held out; None where the data say which."""

    def data_set(self, name: str, values: np.ndarray, labels: np.ndarray | None) -> DataSet:
        """Of values that are in their places (N, *event), and labels (N,) as they were read."""
        parts = torch.from_numpy(values).tensor_split([self.train])
        placed: tuple[Tensor, ...] | tuple[None, None] = (None, None)
        if labels is not None:
            ordered = np.empty(len(labels), np.int64)
            ordered[self.places] = labels
            placed = torch.from_numpy(ordered).tensor_split([self.train])
        return DataSet(name, parts[0], parts[1], placed[0], placed[1], share=self.share)


def split(where: object, count: int, share: float | None) -> Split:
    """Holds out ``share`` of ``count`` rows, rounded down, at least one (none where share is 0) and
    at most 10,000 (a tenth where it is None): those whose indices have the smallest hashes.

    The hash is that of SplitMix64, so that the same rows are held out with any version of any
    library, and that rows in any regular order, class after class or in turn, are held out alike.
    """
    share = SHARE if share is None else share
    held_out = min(max(1, int(share * count)), MOST_HELD_OUT) if share else 0
    if held_out >= count:
        raise DataError(
            f"{where}: expected at least {held_out + 1} rows, of which {held_out} is held out, "
            f"got {count}"
        )
    z = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    chosen = np.zeros(count, bool)
    chosen[np.argsort(z ^ (z >> np.uint64(31)))[:held_out]] = True
    places = np.empty(count, np.int64)
    places[np.argsort(chosen, kind="stable")] = np.arange(count)
    return Split(places, count - held_out, share)
