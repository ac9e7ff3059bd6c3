# SPDX-License-Identifier: Apache-2.0
"""Block sizes by kernel and kind of chip. Nothing is tuned when a program runs."""

from __future__ import annotations

import functools

import torch
import triton
from triton import knobs

from pfgm_kernels.backends.triton import numbers

INTERPRETED = bool(knobs.runtime.interpret)
Blocks = dict[str, int]

# Kinds of chip: "small" has 99 KiB of shared memory for a block (sm_86, 89 and 120), "ampere" 163
# (sm_80), "hopper" and "blackwell" 227 (sm_90; sm_100 and 103).
#
# Before Triton 3.9 a Hopper's wait for products holds for the four warps that wait: with more, an
# asynchronous copy may overwrite what others still multiply. No kernel with products has more but
# from there on, by a table of its own.
# Before 3.9, too, a Blackwell's sums of several products are wrong where they go on from one
# iteration of a loop to the next. Here each iteration sums its products from zero, however wide its
# block of columns; several of integers, which need it nowhere else, where CARRY is not set. But
# before 3.8 what threads compute and then multiply may be read too early, and with 3.6 the one pass
# (fused.py) does not compile there: by 32 rows it keeps to synchronous products.
TABLE: dict[str, dict[str, Blocks]] = {
    "small": {
        "screen": dict(CARRY=True, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=2),
        "compare": dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=4),
        "sum": dict(BLOCK_M=128, BLOCK_D=128, BLOCK_K=32, num_warps=8, num_stages=4),
        "fused 64": dict(BLOCK_M=64, BLOCK_N=32, SLICE=32, SLICES=2, num_warps=4, num_stages=2),
        "fused 128": dict(BLOCK_M=32, BLOCK_N=32, SLICE=64, SLICES=2, num_warps=4, num_stages=2),
    },
    "ampere": {
        "screen": dict(CARRY=True, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
        "compare": dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=4),
        "sum": dict(BLOCK_M=128, BLOCK_D=128, BLOCK_K=32, num_warps=8, num_stages=4),
        "fused 64": dict(BLOCK_M=64, BLOCK_N=32, SLICE=32, SLICES=2, num_warps=4, num_stages=2),
        "fused 128": dict(BLOCK_M=32, BLOCK_N=32, SLICE=64, SLICES=2, num_warps=4, num_stages=2),
    },
    "hopper": {
        "screen": dict(CARRY=True, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=3),
        "compare": dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=2),
        "sum": dict(BLOCK_M=64, BLOCK_D=128, BLOCK_K=64, num_warps=4, num_stages=2),
        "fused 64": dict(BLOCK_M=64, BLOCK_N=32, SLICE=64, SLICES=1, num_warps=4, num_stages=2),
        "fused 128": dict(BLOCK_M=64, BLOCK_N=32, SLICE=64, SLICES=2, num_warps=4, num_stages=2),
    },
    "blackwell": {
        "screen": dict(CARRY=False, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
        "compare": dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=4, num_stages=3),
        "sum": dict(BLOCK_M=64, BLOCK_D=128, BLOCK_K=64, num_warps=4, num_stages=3),
        "fused 64": dict(BLOCK_M=32, BLOCK_N=32, SLICE=64, SLICES=1, num_warps=4, num_stages=2),
        "fused 128": dict(BLOCK_M=32, BLOCK_N=32, SLICE=64, SLICES=2, num_warps=4, num_stages=2),
    },
    "interpreter": {
        "screen": dict(CARRY=True, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "compare": dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "sum": dict(BLOCK_M=128, BLOCK_D=256, BLOCK_K=64),
        "exact": dict(TILE=1024, GROUP=128, BLOCK_D=1024),
        "gather": dict(GROUP=128, BLOCK_D=1024),
        "references": dict(BLOCK_N=256, BLOCK_D=256),
        "split": dict(BLOCK_R=64, BLOCK_D=1024),
        "fused 64": dict(BLOCK_M=64, BLOCK_N=64, SLICE=64, SLICES=1),
        "fused 128": dict(BLOCK_M=64, BLOCK_N=64, SLICE=64, SLICES=2),
        "direct": dict(BLOCK_M=128, BLOCK_N=256),
        "direct wide": dict(BLOCK_M=128, BLOCK_N=256),
    },
}
TABLE["hopper 3.9"] = TABLE["hopper"] | {
    "screen": dict(CARRY=True, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
}
# Kernels without matrix products run alike on all chips.
ANY: dict[str, Blocks] = {
    "exact": dict(TILE=256, GROUP=8, BLOCK_D=256),
    "gather": dict(GROUP=4, BLOCK_D=512),
    "references": dict(BLOCK_N=32, BLOCK_D=64),
    "split": dict(BLOCK_R=8, BLOCK_D=256),
    "direct": dict(BLOCK_M=32, BLOCK_N=16, num_warps=1),
    "direct wide": dict(BLOCK_M=32, BLOCK_N=8, num_warps=1),
}


def blocks(kernel: str, device: torch.device) -> Blocks:
    """Block sizes and launch options of a kernel on a device."""
    table = TABLE[kind(device)]
    return table[kernel] if kernel in table else ANY[kernel]


@functools.cache
def kind(device: torch.device) -> str:
    if INTERPRETED:
        return "interpreter"
    capability = torch.cuda.get_device_capability(device)
    if capability == (8, 0):
        return "ampere"
    if capability[0] == 9:
        return "hopper 3.9" if numbers(triton.__version__) >= (3, 9) else "hopper"
    return "blackwell" if capability[0] == 10 else "small"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if INTERPRETED:
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
