# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.gpu.small`: every kernel of the GPU on shapes that fit no tile, against the
oracle, three times, and equal bit for bit. Small enough for compute-sanitizer, which makes it a
hundred times slower, with `--runs 1`.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from benchmarks.gpu.cases import Case, Options, options, work_through
from benchmarks.gpu.results import Entry
from benchmarks.problems import Shape, synthetic_images
from pfgm_kernels import ReferenceSet, poisson_displacement
from tests.op import oracle

SHAPES = [
    (Shape(3, 50, 2, "normal"), "float32"),
    (Shape(33, 300, 40, "normal"), "float32"),
    (Shape(17, 200, 300, "normal"), "float32"),
    (Shape(19, 150, 768, "synthetic"), "uint8"),
]


def main(given: Options) -> int:
    cases = [Case(*shape, "both", backend) for shape in SHAPES for backend in given.backends]
    return work_through("small", cases, lambda case: check(case, given.device, given.runs), given)


def check(case: Case, device: torch.device, runs: int) -> Entry:
    """Values and gradients. Raises AssertionError where they break the contract, or differ from one
    run to the next.
    """
    B, N, d = case.shape.B, case.shape.N, case.shape.d
    generator = torch.Generator().manual_seed(d)
    codes = synthetic_images(N, d, generator) if case.stored == "uint8" else None
    if codes is None:
        x0 = torch.randn(N, d, generator=generator)
    else:
        x0 = (-1 + 2 * codes.double() / 255).float()
    # Noise of every size: from one reference that matters to all of them.
    level = torch.logspace(-2, 1, B)[:, None]
    x = x0[torch.arange(B) % N] + level * torch.randn(B, d, generator=generator)
    t = level[:, 0] * torch.randn(B, generator=generator).abs()
    g_v = torch.randn(B, d, generator=generator)
    g_m = torch.randn(B, generator=generator, dtype=torch.float64)

    sources: Tensor | ReferenceSet = x0.to(device)
    if codes is not None:
        sources = ReferenceSet.from_images(codes.to(device), backend=case.backend)
    found = [compute(case.backend, x, t, sources, g_v, g_m) for _ in range(runs)]
    for again in found[1:]:
        same = [torch.equal(a, b) for a, b in zip(found[0], again, strict=True)]
        assert all(same), f"two runs differ: equal are v, log_mass and gradients {same}"

    v, log_mass, *gradients = found[0]
    truth = oracle.solve(x, t, x0)
    tolerance = oracle.float32_contract(case.backend, named=codes is not None or d <= 16)
    oracle.assert_displacement(v, truth, tolerance)
    oracle.assert_log_mass(log_mass, truth)
    oracle.assert_gradients(oracle.differentiate(truth, x, x0, g_v, g_m), *gradients)
    error = float(((v.double() - truth.v).norm(dim=1) / truth.term_norm).max())
    return {"status": "right", "error": error, "tolerance": tolerance, "runs": runs}


def compute(
    backend: str, x: Tensor, t: Tensor, sources: Tensor | ReferenceSet, g_v: Tensor, g_m: Tensor
) -> list[Tensor]:
    """v, log_mass and the gradients of x, t and, where they are a tensor, the references."""
    # Copies: nothing of a run before is where the results come to lie.
    device = sources.device
    x, t = (part.to(device, copy=True).requires_grad_() for part in (x, t))
    leaves = [x, t]
    if isinstance(sources, Tensor):
        sources = sources.clone().requires_grad_()
        leaves.append(sources)
    results = poisson_displacement(x, t, sources, backend=backend)
    gradients = torch.autograd.grad(results, leaves, (g_v.to(device), g_m.to(device)))
    return [result.detach().cpu() for result in (*results, *gradients)]


if __name__ == "__main__":
    sys.exit(main(options()))
