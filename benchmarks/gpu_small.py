# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.gpu_small`: every kernel of the GPU once, on shapes that fit no tile,
against the oracle. Small enough for compute-sanitizer, which makes it a hundred times slower.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from benchmarks.problems import synthetic_images
from pfgm_kernels import ReferenceSet, poisson_displacement
from pfgm_kernels.backends import BACKENDS
from tests.op import oracle

SHAPES = [
    # B, N, d, 8-bit images
    (3, 50, 2, False),
    (33, 300, 40, False),
    (17, 200, 300, False),
    (19, 150, 768, True),
]


def main(device: torch.device) -> int:
    """Prints a line for each backend and shape. The exit status: 1 where one broke the contract, or
    where none has kernels.
    """
    names = [n for n, b in BACKENDS.items() if b.unsupported_reason(device) is None]
    kernels = [name for name in names if name != "eager"]
    failures = 0
    for name in kernels:
        for B, N, d, images in SHAPES:
            outcome = BACKENDS[name].unsupported_reason(device, d)
            if outcome is None:
                try:
                    outcome = check(name, device, B, N, d, images)
                except Exception as error:  # the other shapes may tell more
                    outcome = f"WRONG: {type(error).__name__}: {error}"
            failures += outcome.startswith("WRONG")
            print(f"{name} {B}x{N}-d{d}{' 8-bit' if images else ''}: {outcome}", flush=True)
    if not kernels:
        print(f"no backend with kernels of its own runs on {device}")
    return int(failures > 0 or not kernels)


def check(backend: str, device: torch.device, B: int, N: int, d: int, images: bool) -> str:
    """Values and, where the backend has them, gradients on one shape. Returns "right", raises
    AssertionError where they are not.
    """
    generator = torch.Generator().manual_seed(d)
    codes = synthetic_images(N, d, generator) if images else None
    if codes is None:
        x0 = torch.randn(N, d, generator=generator)
    else:
        x0 = (-1 + 2 * codes.double() / 255).float()
    # Noise of every size: from one reference that matters to all of them.
    level = torch.logspace(-2, 1, B)[:, None]
    x = x0[torch.arange(B) % N] + level * torch.randn(B, d, generator=generator)
    t = level[:, 0] * torch.randn(B, generator=generator).abs()
    truth = oracle.solve(x, t, x0)
    sources: Tensor | ReferenceSet = x0.to(device)
    if codes is not None:
        sources = ReferenceSet.from_images(codes.to(device))
    differentiable = BACKENDS[backend].unsupported_reason(device, d, True) is None
    queries, times = (part.to(device).requires_grad_(differentiable) for part in (x, t))
    leaves = [queries, times]
    if differentiable and isinstance(sources, Tensor):
        leaves.append(sources.requires_grad_())
    v, log_mass = poisson_displacement(queries, times, sources, backend=backend)
    tolerance = oracle.float32_contract(backend, named=images or d <= 16)
    oracle.assert_displacement(v.detach().cpu(), truth, tolerance)
    oracle.assert_log_mass(log_mass.detach().cpu(), truth)
    if differentiable:
        g_v = torch.randn(B, d, generator=generator)
        g_m = torch.randn(B, generator=generator, dtype=torch.float64)
        cotangents = (g_v.to(device), g_m.to(device))
        actual = torch.autograd.grad((v, log_mass), leaves, cotangents)
        expected = oracle.differentiate(truth, x, x0, g_v, g_m)
        oracle.assert_gradients(expected, *(gradient.cpu() for gradient in actual))
    return "right" if differentiable else "right, forward only"


if __name__ == "__main__":
    sys.exit(main(torch.device("cuda")))
