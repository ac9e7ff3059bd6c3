# SPDX-License-Identifier: Apache-2.0
"""What the processor can do: its peak of fused multiply-adds, and what matrix products reach."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("fma_peak.cpp")
STEPS = 1_000_000
ROUNDS = 10


def cxx_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def fma_library() -> ctypes.CDLL | None:
    """fma_peak.cpp compiled for this processor, None where there is no compiler for it."""
    compiler = cxx_compiler()
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        command = [compiler, *flags, str(SOURCE), "-o", str(library)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            return None
        return ctypes.CDLL(str(library))


def fma_sums(library: ctypes.CDLL, threads: int, steps: int, a: float, b: float) -> list[float]:
    """For each thread the sum of its values after `steps` of value = value · a + b: they start as
    each number below `chain_count()`, `lane_count()` times.
    """
    sums = (ctypes.c_float * threads)()
    library.fma_chains(threads, ctypes.c_long(steps), ctypes.c_float(a), ctypes.c_float(b), sums)
    return list(sums)


def fma_peak_gflops() -> float | None:
    """The best of some rounds in float32 with as many threads as torch has, 10⁹ operations a second
    (a fused multiply-add is two); None where fma_peak.cpp cannot be compiled.
    """
    library = fma_library()
    if library is None:
        return None
    threads = torch.get_num_threads()
    flops = 2 * STEPS * threads * library.chain_count() * library.lane_count()
    return flops / _best_seconds(lambda: fma_sums(library, threads, STEPS, 0.5, 1.0)) / 1e9


def sgemm_gflops(B: int = 128, d: int = 3072, N: int = 4096) -> dict[str, float]:
    """The best of some rounds of (B, d) @ (d, N) in float32 by each library, 10⁹ operations a
    second: what `torch.mm` calls ("mkl", where torch is built with it), and oneDNN.
    """
    generator = torch.Generator().manual_seed(0)
    x, x0 = torch.randn(B, d, generator=generator), torch.randn(N, d, generator=generator)
    transposed = x0.T.contiguous()
    products: dict[str, Callable[[], torch.Tensor]] = {
        "mkl" if torch.backends.mkl.is_available() else "blas": lambda: torch.mm(x, transposed)
    }
    if torch.backends.mkldnn.is_available():
        a, b = x.to_mkldnn(), x0.to_mkldnn()
        products["onednn"] = lambda: torch._C._nn.mkldnn_linear(a, b, None)
    return {name: 2e-9 * B * d * N / _best_seconds(call) for name, call in products.items()}


def _best_seconds(call: Callable[[], object]) -> float:
    call()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
