# SPDX-License-Identifier: Apache-2.0
"""Copies among references, which round alike: no sum of their terms averages that out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CROWD = tl.constexpr(8)  # so many equal references: their rounding errors are seen
CROWDED_SHARE = tl.constexpr(128)  # or where of so many references one equals another
SAMPLE = tl.constexpr(1024)  # references that are compared with each other
NEARLY = tl.constexpr(1e-6)  # what sums may differ by: float32 has hardly more digits of r
GROUP = tl.constexpr(16)


@triton.jit
def count_copies(copies_ptr, slots, norm, mark, mask):
    """Of references with these ‖y‖² and sums that are the same for equal ones and hardly else: how
    many copies one has, at most, and how many are a copy of one before, at the head of copies.

    Each looks for its name from a slot on and leaves it in the first that is empty, so that the
    counts are the same in any order.
    """
    # To a millionth: copies that roundings tell apart mostly have one name.
    place = (mark.to(tl.int64, bitcast=True) >> 30) * 40503
    place = (place + (norm.to(tl.int64, bitcast=True) >> 32)) * 0x9E3779B1
    name = (place & 0x7FFFFFFF).to(tl.int32) | 1  # none is that of an empty slot
    place = place >> 20
    searching = mask
    while tl.max(searching.to(tl.int32), 0) > 0:
        slot_ptr = copies_ptr + 2 + 2 * (place & (slots - 1))
        # None holds -1: where the search is over nothing is exchanged.
        held = tl.atomic_cas(slot_ptr, tl.where(searching, 0, -1), name)
        searching &= (held != 0) & (held != name)
        place += searching.to(tl.int64)
    before = tl.atomic_add(copies_ptr + 3 + 2 * (place & (slots - 1)), 1, mask=mask)
    before = tl.where(mask, before, 0)
    tl.atomic_max(copies_ptr, tl.max(before, 0))
    tl.atomic_add(copies_ptr + 1, tl.sum((before > 0).to(tl.int32), 0))


@triton.jit
def row_of_sample(i, samples, count):
    """Of each share of the rows one at random, as an order may have a period; of tensors, too."""
    return i * count // samples + i * 40503 % (count // samples)


@triton.jit
def load_sample(marks_ptr, i, samples, N):
    row = row_of_sample(i.to(tl.int64), samples, N)
    return tl.load(marks_ptr + row, mask=i < samples, other=0.0)


@triton.jit
def crowded(copies_ptr, marks_ptr, N):
    """Are there so many copies that sums do not average out how they round? Or, in a sample, sums
    (N,) of `count_copies` so near that r has no digits to tell the references apart by?
    """
    copies, equal = tl.load(copies_ptr), tl.load(copies_ptr + 1).to(tl.int64)
    found = (copies >= CROWD) | ((equal >= CROWD) & (equal * CROWDED_SHARE >= N))
    samples = tl.minimum(N, SAMPLE)
    ids = tl.arange(0, SAMPLE)
    marks = load_sample(marks_ptr, ids, samples, N)
    nearly = tl.max(tl.abs(marks), 0) * NEARLY
    alike = 0
    for first in range(0, samples, GROUP):
        i = first + tl.arange(0, GROUP)
        own = load_sample(marks_ptr, i, samples, N)
        same = (tl.abs(own[:, None] - marks[None, :]) <= nearly) & (ids[None, :] < i[:, None])
        one = tl.max(same.to(tl.int32), 1)
        alike += tl.sum(tl.where(i < samples, one, 0), 0)
    return found | (alike >= CROWD)


def room_for_copies(count: int, device: torch.device) -> Tensor:
    """What `count_copies` counts in: two numbers, and two for each slot."""
    return torch.zeros(2 + 2 * triton.next_power_of_2(2 * count), dtype=torch.int32, device=device)


def count_equal(values: Tensor) -> Tensor:
    """How many of a sample of values (N, d) equal another."""
    samples = min(len(values), SAMPLE.value)
    rows = row_of_sample.fn(torch.arange(samples, device=values.device), samples, len(values))
    # A number that is the same for equal rows and hardly else.
    factors = torch.arange(values.shape[1], device=values.device) * 40503 % 65521 + 1
    ordered = (values[rows].double() * factors).sum(1).sort().values
    return (ordered[1:] == ordered[:-1]).sum()
