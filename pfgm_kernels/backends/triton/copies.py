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

    Each leaves its name in a slot, which it shares with its copies and few others.
    """
    # To a millionth: copies that roundings tell apart mostly have one name.
    place = (mark.to(tl.int64, bitcast=True) >> 30) * 40503
    place = (place + (norm.to(tl.int64, bitcast=True) >> 32)) * 0x9E3779B1
    name = (place & 0x7FFFFFFF).to(tl.int32) | 1  # none is that of an empty slot
    slot_ptr = copies_ptr + 2 + 2 * ((place >> 20) & (slots - 1))
    same = mask & (tl.atomic_xchg(slot_ptr, name, mask=mask) == name)
    before = tl.atomic_add(slot_ptr + 1, 1, mask=same)
    tl.atomic_max(copies_ptr, tl.max(tl.where(same, before + 1, 0), 0))
    tl.atomic_add(copies_ptr + 1, tl.sum(same.to(tl.int32), 0))


@triton.jit
def load_sample(marks_ptr, i, samples, N):
    """Of each share of the references one at random, as an order may have a period."""
    row = i.to(tl.int64) * N // samples + i * 40503 % (N // samples)
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
    """How many of a sample of values (N, d), one of each share of them, equal another."""
    count, own = len(values), torch.arange(min(len(values), SAMPLE.value), device=values.device)
    # At random, as an order may have a period; N may be no multiple of the sample.
    rows = own * count // len(own) + own * 40503 % max(count // len(own), 1)
    # A number that is the same for equal rows and hardly else.
    factors = torch.arange(values.shape[1], device=values.device) * 40503 % 65521 + 1
    ordered = (values[rows].double() * factors).sum(1).sort().values
    return (ordered[1:] == ordered[:-1]).sum()
