# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.disk FOLDER`: what references in files cost beside those in memory.

Writes 8-bit images of 64×64×3, random ones around a few (4 GiB; removed at the end), and measures
for a batch of queries the disk alone, the kernels alone, on a part that memory holds, and the call
that reads everything; before each the system is asked to drop what it has of the files. With it the
most memory that the process took, and what this makes of ImageNet's 1,281,167 images.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from pfgm_kernels import ReferenceSet, poisson_field
from pfgm_kernels.memory import PeakMemory
from pfgm_kernels.training.progress import progress_bar

DIM, PER_FILE, IN_MEMORY = 64 * 64 * 3, 20_000, 20_000
IMAGENET = 1_281_167


def write(folder: Path, count: int) -> list[Path]:
    random = np.random.default_rng(0)
    centres = random.integers(0, 256, (64, DIM), np.uint8)
    paths = []
    with progress_bar(Console(stderr=True), "Writing", count) as update:
        for start in range(0, count, PER_FILE):
            size = min(PER_FILE, count - start)
            images = centres[random.integers(0, 64, size)]
            images += random.integers(0, 32, images.shape, np.uint8)
            paths.append(folder / f"{start:08d}.npy")
            np.save(paths[-1], images)
            update(start + size, f"{start + size} images")
    return paths


def forget(paths: list[Path]) -> None:
    """Has the system write files out and drop its copies."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(paths: list[Path]) -> float:
    """Seconds that reading all of the files takes."""
    buffer, began = bytearray(32 << 20), time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def timed(x: Tensor, references: ReferenceSet) -> float:
    began = time.perf_counter()
    poisson_field(x, 20.0, references)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the files are written")
    parser.add_argument("--count", type=int, default=350_000, help="images of 12 KiB")
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        paths = write(folder, options.count)
        files = ReferenceSet.from_files(paths)
        some = files[: min(IN_MEMORY, options.count)]
        x = torch.rand(options.batch, DIM, generator=torch.Generator().manual_seed(0)) * 2 - 1
        timed(x, some)
        kernel = min(timed(x, some) for _ in range(3)) * options.count / len(some)
        del some
        forget(paths)
        disk = read(paths)
        forget(paths)
        with PeakMemory() as peak:
            call = timed(x, files)
    finally:
        shutil.rmtree(folder)
    print(f"{options.count:,} images of {DIM:,} bytes, {options.batch} queries")
    print(f"disk alone {disk:.2f} s, kernels alone {kernel:.2f} s, the call {call:.2f} s")
    print(f"{max(disk, kernel) / call:.0%} of the slower of the two")
    memory = "not known" if peak.extra_bytes is None else f"{peak.extra_bytes / 2**20:.0f} MiB"
    print(f"memory of the call {memory}; ImageNet {call * IMAGENET / options.count:.0f} s a batch")


if __name__ == "__main__":
    main()
