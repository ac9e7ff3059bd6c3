# SPDX-License-Identifier: Apache-2.0
"""What the processor can do: its peak of fused multiply-adds, and what matrix products reach."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
STEPS = 2_000_000
ROUNDS = 20


def cxx_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++")


def cannot_compile(*folders: Path | str) -> str | None:
    """Why libraries in these folders that compile C++ in a shell, unquoted, cannot; else None."""
    if cxx_compiler() is None:
        return "a C++ compiler is needed, and there is none"
    split = [str(folder) for folder in folders if re.search(r"[^\w@%+=:,./-]", str(folder))]
    return f"it cannot compile, for a space or the like in the path {split[0]!r}" if split else None


def compiled(source: str) -> ctypes.CDLL | None:
    """A C++ file of this folder compiled for this processor, None where there is no compiler for
    it.
    """
    compiler = cxx_compiler()
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp"]
        command = [compiler, *flags, str(HERE / source), "-o", str(library)]
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


def pack_queries(library: ctypes.CDLL, x: Tensor) -> Tensor:
    """float32 queries x (B, d) as our kernels read them, (B/64, d, 64), by as many threads as torch
    has. Raises ValueError where B is not a multiple of 64.
    """
    (B, d), tile = x.shape, library.tile_queries()
    if B % tile:
        raise ValueError(f"expected a multiple of {tile} queries, got {B}")
    packed = torch.empty(B // tile, d, tile)
    library.pack_queries(torch.get_num_threads(), *_longs(B, d), *_pointers(x, packed))
    return packed


def tile_products(library: ctypes.CDLL, packed: Tensor, x0: Tensor) -> Tensor:
    """x0_j · x_q by the product of our kernels, (B/64, N, 64), for packed queries and float32
    references x0 (N, d), by as many threads as torch has.
    """
    tiles, d, tile = packed.shape
    out = torch.empty(tiles, len(x0), tile)
    sizes, arrays = _longs(tiles, len(x0), d), _pointers(packed, x0, out)
    library.tile_products(torch.get_num_threads(), *sizes, *arrays)
    return out


def _longs(*sizes: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(size) for size in sizes]


def _pointers(*arrays: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(array.data_ptr()) for array in arrays]


def gflops(B: int = 128, d: int = 3072, N: int = 4096) -> dict[str, float]:
    """Operations a second, 10⁹, with as many threads as torch has, in the best of some rounds in
    which these take turns:

    "fma_peak": fused multiply-adds in registers, which are two operations each (where fma_peak.cpp
    can be compiled); and (B, d) @ (d, N) in float32 by what `torch.mm` calls ("mkl", else "blas"),
    by "onednn", where torch is built with it, and by the product of our kernels with and without
    packing the queries (where product.cpp can be compiled).
    """
    generator = torch.Generator().manual_seed(0)
    x, x0 = torch.randn(B, d, generator=generator), torch.randn(N, d, generator=generator)
    transposed, threads = x0.T.contiguous(), torch.get_num_threads()
    calls: dict[str, Callable[[], object]] = {
        "mkl" if torch.backends.mkl.is_available() else "blas": lambda: torch.mm(x, transposed)
    }
    if torch.backends.mkldnn.is_available():
        a, b = x.to_mkldnn(), x0.to_mkldnn()
        calls["onednn"] = lambda: torch._C._nn.mkldnn_linear(a, b, None)
    product = compiled("product.cpp")
    if product is not None:
        packed = pack_queries(product, x)
        calls["pfgm_kernels"] = lambda: tile_products(product, pack_queries(product, x), x0)
        calls["pfgm_kernels on packed queries"] = lambda: tile_products(product, packed, x0)
    operations = dict.fromkeys(calls, 2 * B * d * N)
    peak = compiled("fma_peak.cpp")
    if peak is not None:
        calls["fma_peak"] = lambda: fma_sums(peak, threads, STEPS, 0.5, 1.0)
        operations["fma_peak"] = 2 * STEPS * threads * peak.chain_count() * peak.lane_count()
    return {name: operations[name] / seconds / 1e9 for name, seconds in _best(calls).items()}


def gpu(device: torch.device) -> dict[str, Any]:
    """What the JSON tells about a GPU; its driver where nvidia-smi is there to say it."""
    properties = torch.cuda.get_device_properties(device)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        version = "unknown"
    else:
        version = driver.stdout.splitlines()[0].strip()
    return {
        "driver": version,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


def _best(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each call, the calls taking turns."""
    for call in calls.values():
        call()
    best = dict.fromkeys(calls, math.inf)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best
