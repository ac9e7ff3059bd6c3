# SPDX-License-Identifier: Apache-2.0
"""The files of MNIST with few images, of noise."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def idx(magic: int, values: np.ndarray) -> bytes:
    return struct.pack(f">{1 + values.ndim}I", magic, *values.shape) + values.tobytes()


def write_mnist(folder: Path, counts: tuple[int, int] = (7, 5)) -> dict[str, np.ndarray]:
    written = {}
    rng = np.random.default_rng(0)
    for stem, count in zip(("train", "t10k"), counts, strict=True):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        (folder / "mnist").mkdir(exist_ok=True)
        for name, magic, values in (
            (f"{stem}-images-idx3-ubyte.gz", 0x803, images),
            (f"{stem}-labels-idx1-ubyte.gz", 0x801, labels),
        ):
            (folder / "mnist" / name).write_bytes(gzip.compress(idx(magic, values)))
            written[name] = values
    return written
