# SPDX-License-Identifier: Apache-2.0
"""The one place that launches kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton

MOST_PROGRAMS = 2**31 - 1, 65_535, 65_535  # along the axes of a grid
LARGEST_BLOCK = 4096


class Kernel:
    """Decorates a kernel in place of triton.jit: kernel[grid](*arguments, **options) launches it on
    the device of the first argument, a tensor. Options in upper case are constants of the kernel.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.name, self.jit = function.__name__, triton.jit(function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        for axis, programs, most in zip("xyz", grid, MOST_PROGRAMS, strict=False):
            if not 1 <= programs <= most:
                raise RuntimeError(f"{self.name}: {programs} programs along {axis}, 1 to {most} go")
        for name, size in options.items():
            if name.isupper() and size > LARGEST_BLOCK:
                raise RuntimeError(f"{self.name}: {name} is {size}, {LARGEST_BLOCK} at most goes")
        # Said outright, since Triton's default is to change: a product may be added unrounded.
        # What takes a number apart does so by sums and conversions. Where the number is a product
        # the parts are then those of the product itself, or of it once rounded: no difference.
        with torch.cuda.device_of(arguments[0]):
            self.jit[grid](*arguments, enable_fp_fusion=True, **options)
