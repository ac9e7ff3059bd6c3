# SPDX-License-Identifier: Apache-2.0
"""Randomness by sample: what a draw is depends on its own seed, and not on the batch around it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pfgm_kernels._checks import integer

MOST_SEED = (1 << 32) - 1  # torch's generator on a CPU looks at no more than 32 bits
STRIDE = 0x9E3779B9  # odd: streams of seeds that are used together, small numbers, do not meet


def generators(seeds: Iterable[int] | Tensor, stream: int = 0) -> list[torch.Generator]:
    """A generator on the CPU for each seed, from 0 to 2³² − 1.

    Draw from the i-th what the i-th sample needs, by itself, and move it where it is needed: it is
    then the same in any batch and on any device. What is drawn for another purpose from the same
    seeds asks for another `stream`; in the same one it would be the same numbers again.
    """
    if isinstance(seeds, str) or not isinstance(seeds, Iterable) or getattr(seeds, "ndim", 1) != 1:
        raise TypeError(f"seeds expects a sequence of integers, got {type(seeds).__name__}")
    checked = [integer("seeds", seed, least=0) for seed in seeds]
    for seed in checked:
        if seed > MOST_SEED:
            raise ValueError(f"seeds expects integers ≤ {MOST_SEED}, got {seed}")
    numbers = [seed ^ (stream * STRIDE & MOST_SEED) for seed in checked]
    return [torch.Generator("cpu").manual_seed(number) for number in numbers]
