# SPDX-License-Identifier: Apache-2.0
"""Are training points of the range that the references have?"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pfgm_kernels._checks import blind
from pfgm_kernels.backends._values import decode
from pfgm_kernels.on_disk import OnDisk
from pfgm_kernels.references import ReferenceSet

# How much is looked at, and what counts as far: measured on images, toy sets and random numbers, so
# that one held-out image beside 512 is no false alarm and an image in [0, 1] beside [-1, 1] is one.
MOST, FEWEST, VALUES = 512, 16, 1 << 22
FAR = 1.5
"""Distances to the references over those among them."""
MARGIN = 0.2
"""Of the extremes, in widths of the references' range."""
SHARE = 0.1
"""Of the references' values, left out by the points' extremes."""


class RangeWatch:
    """A loss's look at its first batch, `warn_of_another_range`."""

    def __init__(self) -> None:
        self.looked = False

    def __call__(self, points: Tensor, references: ReferenceSet) -> None:
        """Within a compiled or captured call, which cannot look at values, nothing."""
        if not (self.looked or blind(points)):
            self.looked = True
            warn_of_another_range(points, references)


def warn_of_another_range(points: Tensor, references: ReferenceSet) -> None:
    """Warns where points (B, *event) are not in the range of the references, as with [0, 255]
    beside [-1, 1]: training goes on all the same, toward a field that has nothing to learn.

    Either most of the points lie further from all references than these lie from each other, or
    most of them have a smallest or a largest value that hardly a reference has, and which leaves
    out some of the references' values. (The first alone misses images in [0, 1] beside [-1, 1],
    which lie between them; the second says nothing of a few dimensions.) Held-out points, parts of
    the data and augmentations do neither. A handful of references, or equal ones, have no range.

    Looks at up to 512 of each and 4 million values, and reads the outcome on the host.
    """
    known = decode(_some(references.own), references.table)
    x = _some(points.detach().flatten(1)).double()
    if len(known) < FEWEST or bool((known == known[0]).all()):
        return
    if not (_far(x, known) or _outside(x, known)):
        return
    (low, high), (known_low, known_high) = (
        [value.item() for value in values.aminmax()] for values in (x, known)
    )
    warnings.warn(
        "the batch lies far from all references: expected points in their range, "
        f"[{known_low:.4g}, {known_high:.4g}], got values in [{low:.4g}, {high:.4g}]",
        stacklevel=5,  # whoever called the loss
    )


def _some(rows: Tensor | OnDisk) -> Tensor:
    """Up to MOST of the rows (N, d), evenly spread: sorted data is seen in all its parts."""
    count, d = rows.shape
    wanted = min(count, MOST, max(FEWEST, VALUES // d))
    places = torch.linspace(0, count - 1, wanted, dtype=torch.float64, device=rows.device)
    return rows[places.round().long()]


def _far(x: Tensor, known: Tensor) -> bool:
    """Is the median distance of x to the nearest reference well above those between references?"""
    center = known.mean(0)
    between = (2 * (known - center).square().sum(1).mean()).sqrt()
    nearest = torch.cdist(x - center, known - center).amin(1).median()
    return bool(nearest > FAR * between)


def _outside(x: Tensor, known: Tensor) -> bool:
    """Do the extremes of most points lie beyond, or short of, those of nearly all references?"""
    uncertain = 1 + FEWEST / len(known)  # the fewer there are, the less they tell of their range
    margin = MARGIN * uncertain * (known.amax() - known.amin())
    # Noise that is added moves extremes outward, but nothing usual those of many points inward.
    inward = margin / min(len(x), FEWEST) ** 0.5
    low, high = x.amin(1).median(), x.amax(1).median()
    lows, highs = known.amin(1), known.amax(1)
    beyond = (low < lows.quantile(0.01) - margin) | (high > highs.quantile(0.99) + margin)
    left_out = ((known < low).double().mean() > SHARE) & (low > lows.quantile(0.99) + inward)
    left_out |= ((known > high).double().mean() > SHARE) & (high < highs.quantile(0.01) - inward)
    return bool(beyond | left_out)
