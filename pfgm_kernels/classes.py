# SPDX-License-Identifier: Apache-2.0
"""Classes of references: a query with a label sees those of its class, a range of them all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pfgm_kernels._checks import INTEGER, tensor
from pfgm_kernels.on_disk import OnDisk


class Classes(NamedTuple):
    """Labels of references, which are stored class by class."""

    labels: Tensor
    """(N,) int64, in the order in which the references were given"""
    order: Tensor
    """(N,) int64: which of those given lies where"""
    starts: Tensor
    """(C + 1,) int64: class c lies from starts[c] to starts[c + 1]"""
    counts: Tensor
    """(C,) int64: how many references each class has, those of other processes too"""

    @staticmethod
    def group(labels: Tensor, count: int, device: torch.device) -> Classes:
        """Raises TypeError or ValueError unless labels are (N,) integers ≥ 0 on the device."""
        labels = _integers(labels, count, device)
        if (least := int(labels.min())) < 0:
            raise ValueError(f"labels expects classes ≥ 0, got {least}")
        if (most := int(labels.max())) >= 1 << 24:
            raise ValueError(f"labels expects classes below {1 << 24}, got {most}")
        counts = labels.bincount()
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Classes(labels, labels.argsort(stable=True), starts, counts)

    def among(self, counts: Tensor) -> Classes:
        """The same beside the references of other processes: counts (C,) are those of all."""
        more = self.starts[-1:].expand(len(counts) - len(self.counts))
        return self._replace(starts=torch.cat([self.starts, more]), counts=counts)

    @property
    def grouped(self) -> bool:
        """Whether the references were given class by class."""
        return bool((self.labels.diff() >= 0).all())

    def place(self) -> Tensor:
        """(N,) int64: where each of those given lies."""
        return self.order.argsort()

    def to(self, device: torch.device) -> Classes:
        return Classes(*(each.to(device) for each in self))

    def ranges(self, labels: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """First and last + 1 reference of each query's class, (B, 2); its class (B,), the number of
        classes where it has no reference; and whether that is so (B,), where the range is that of
        all.

        Raises TypeError or ValueError unless labels are (B,) integers on the device of the set, or
        where one has no reference. Labels on a GPU, which would have to be waited for, and those of
        a compiled call are not looked at.
        """
        labels = _integers(labels, batch, self.starts.device)
        last = len(self.starts) - 2
        at = labels.clamp(0, last)
        ranges = torch.stack([self.starts[at], self.starts[at + 1]], 1)
        missing = (labels != at) | (self.counts[at] == 0)
        looked = labels.device.type == "cpu" and not torch.compiler.is_compiling()
        if looked and bool(missing.any()):
            raise ValueError(
                f"labels expects classes of 0 … {last} that have references, "
                f"got {int(labels[missing][0])}"
            )
        everything = torch.stack([self.starts[0], self.starts[-1]])
        at = at.masked_fill(missing, last + 1)
        return torch.where(missing[:, None], everything, ranges), at, missing


def grouped(
    values: Tensor | OnDisk, labels: Tensor | None
) -> tuple[Tensor | OnDisk, Classes | None]:
    """values (N, d) class by class."""
    if labels is None:
        return values, None
    classes = Classes.group(labels, len(values), values.device)
    if classes.grouped:
        return values, classes
    if isinstance(values, OnDisk):
        return values.reordered(classes.order), classes
    return values[classes.order], classes


def _integers(labels: Tensor, count: int, device: torch.device) -> Tensor:
    tensor("labels", labels, INTEGER, "integers, one a row")
    if labels.shape != (count,):
        raise ValueError(f"labels expects shape ({count},), got {tuple(labels.shape)}")
    if labels.device != device:
        raise ValueError(f"labels expects the device {device}, got {labels.device}")
    return labels.long()
