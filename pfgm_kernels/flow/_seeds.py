# SPDX-License-Identifier: Apache-2.0
"""One source of randomness a sample, so that a draw does not depend on the batch it is in."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pfgm_kernels._checks import integer


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """A generator on the CPU for each seed."""
    if not isinstance(seeds, Iterable):
        raise TypeError(f"seeds expects integers, got {type(seeds).__name__}")
    return [torch.Generator("cpu").manual_seed(integer("seeds", seed, 0)) for seed in seeds]
