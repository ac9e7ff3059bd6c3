# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.disk FOLDER`: what references in files cost beside those in memory.

Writes 8-bit images of 64×64×3, smooth random ones (4 GiB; removed at the end), and measures for a
batch of queries the disk alone, the kernels alone, on a part that memory holds, and the call that
reads everything; before each the system is asked to drop what it has of the files. With it the most
memory that the process took, and what this makes of ImageNet's 1,281,167 images. Then the same with
a sketch, for queries of several noise levels: the time, and what each of them reads.
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
from pfgm_kernels.flow.constants import PUBLISHED
from pfgm_kernels.memory import PeakMemory
from pfgm_kernels.on_disk import OnDisk
from pfgm_kernels.training.progress import progress_bar

SIDE, PER_FILE, IN_MEMORY = 64, 10_000, 20_000
DIM = 3 * SIDE * SIDE
STEPS = (60, 90, 110, 130, 150, 170, 190)
"""Of 1.03^m in Eq. (11), for the queries with a sketch."""
IMAGENET = 1_281_167
T = 20.0


def write(folder: Path, count: int) -> list[Path]:
    """Images with the spectrum of photographs, roughly: most of it in few waves, and noise."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.linspace(0, 31, SIDE // 2).square()
    strength = 1 / (1 + (frequency[:, None] + frequency).sqrt())
    waves = torch.fft.irfft2(
        torch.randn(256, 3, SIDE, SIDE // 2 + 1, dtype=torch.complex64, generator=generator)
        * torch.nn.functional.pad(strength, (0, 1)).repeat(2, 1)
    ).flatten(1)
    waves *= 30 / waves.std()
    paths = []
    with progress_bar(Console(stderr=True), "Writing", count) as update:
        for start in range(0, count, PER_FILE):
            size = min(PER_FILE, count - start)
            images = torch.randn(size, len(waves), generator=generator) @ waves
            images.div_(len(waves) ** 0.5 / 1.5).add_(128)
            images += torch.randn(images.shape, generator=generator)
            paths.append(folder / f"{start:08d}.npy")
            np.save(paths[-1], images.clamp_(0, 255).byte().numpy())
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


def queries(batch: int, references: ReferenceSet, m: int) -> tuple[Tensor, Tensor]:
    """Of Eq. (11), with 1.03^m."""
    generator = torch.Generator().manual_seed(m)
    places = torch.randint(len(references), (batch,), generator=generator)
    sigma = PUBLISHED.sigma * 1.03**m
    codes = references[places].values
    assert isinstance(codes, Tensor)
    x = codes / 127.5 - 1
    x = x + sigma * torch.randn(x.shape, generator=generator)
    return x, sigma * torch.randn(batch, generator=generator).abs()


def timed(x: Tensor, t: Tensor | float, references: ReferenceSet) -> float:
    began = time.perf_counter()
    poisson_field(x, t, references)
    return time.perf_counter() - began


class Counter:
    """Of the bytes that are read of files."""

    def __init__(self) -> None:
        self.bytes, self._read = 0, OnDisk.read

    def __enter__(self) -> Counter:
        def read(source: OnDisk, start: int, out: Tensor) -> None:
            self.bytes += out.nbytes
            self._read(source, start, out)

        setattr(OnDisk, "read", read)  # noqa: B010
        return self

    def __exit__(self, *_: object) -> None:
        setattr(OnDisk, "read", self._read)  # noqa: B010


def with_sketch(paths: list[Path], batch: int) -> None:
    plain = ReferenceSet.from_files(paths)
    kept = paths[0].with_name("sketch.npz")
    began = time.perf_counter()
    references = ReferenceSet.from_files(paths, sketch=kept)
    made = time.perf_counter() - began
    print(f"\nA sketch of {kept.stat().st_size / 2**20:.0f} MiB, made in {made:.0f} s:\n")
    print("| m | seconds a call | read, MiB a query | beside the call without |")
    print("| --- | --- | --- | --- |")
    for m in STEPS:
        x, t = queries(batch, plain, m)
        forget(paths)
        with Counter() as read:
            seconds = timed(x, t, references)
        forget(paths)
        whole = timed(x, t, plain)
        print(
            f"| {m} | {seconds:.2f} | {read.bytes / batch / 2**20:.2f} | {whole / seconds:.1f} × |"
        )


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
        timed(x, T, some)
        kernel = min(timed(x, T, some) for _ in range(3)) * options.count / len(some)
        del some
        forget(paths)
        disk = read(paths)
        forget(paths)
        with PeakMemory() as peak:
            call = timed(x, T, files)
        report(options.count, options.batch, disk, kernel, call, peak)
        with_sketch(paths, options.batch)
    finally:
        shutil.rmtree(folder)


def report(
    count: int, batch: int, disk: float, kernel: float, call: float, peak: PeakMemory
) -> None:
    print(f"{count:,} images of {DIM:,} bytes, {batch} queries")
    print(f"disk alone {disk:.2f} s, kernels alone {kernel:.2f} s, the call {call:.2f} s")
    print(f"{max(disk, kernel) / call:.0%} of the slower of the two")
    memory = "not known" if peak.extra_bytes is None else f"{peak.extra_bytes / 2**20:.0f} MiB"
    print(f"memory of the call {memory}; ImageNet {call * IMAGENET / count:.0f} s a batch")


if __name__ == "__main__":
    main()
