# SPDX-License-Identifier: Apache-2.0
"""The files of MNIST (IDX) and of CIFAR-10 (its "python version"), checked and never unpickled."""

from __future__ import annotations

import gzip
import lzma
import math
import pickletools
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from pfgm_kernels.training.data.checks import damaged, fits
from pfgm_kernels.training.data.dataset import DataSet

CIFAR_ROWS, CIFAR_BYTES = 10_000, 3 * 32 * 32
CIFAR_FILE = 1 << 26
"""More bytes than a batch has, however it was pickled."""
IDX_IMAGES, IDX_LABELS = 0x803, 0x801


def find_mnist(folder: Path) -> Path | None:
    """Where in ``folder`` the IDX files of MNIST are, compressed or not: there, or where
    torchvision unpacks them.
    """
    for inner in (folder, folder / "raw", folder / "MNIST" / "raw"):
        if _idx(inner, "train-images-idx3-ubyte").is_file():
            return inner
    return None


def load_mnist(name: str, folder: Path) -> DataSet:
    parts = []
    for stem in ("train", "t10k"):
        images = read_idx(_idx(folder, f"{stem}-images-idx3-ubyte"), IDX_IMAGES)
        labels = read_idx(_idx(folder, f"{stem}-labels-idx1-ubyte"), IDX_LABELS).long()
        if len(images) != len(labels):
            raise ValueError(
                f"damaged data in {folder}: expected as many {stem} labels as images, "
                f"got {len(labels)} labels and {len(images)} images"
            )
        parts.append((images, labels))
    (train, train_labels), (held_out, held_out_labels) = parts
    return DataSet(name, train, held_out, train_labels, held_out_labels)


def load_cifar10(name: str, folder: Path) -> DataSet:
    suffix = ".xz" if folder.name == "cifar10" else ""
    names = [f"data_batch_{i}" for i in range(1, 6)]
    batches = [read_cifar_batch(folder / (name + suffix)) for name in names]
    held_out, held_out_labels = read_cifar_batch(folder / ("test_batch" + suffix))
    return DataSet(
        name,
        torch.cat([images for images, _ in batches]),
        held_out,
        torch.cat([labels for _, labels in batches]),
        held_out_labels,
    )


def read_idx(path: Path, magic: int) -> Tensor:
    """Reads an IDX file of unsigned bytes, gzip-compressed where its name ends in ``.gz``: uint8 of
    the shape in its header.

    magic: the first four bytes, big-endian; their last is the number of axes. Raises ValueError,
    naming the file, where the magic number, the compression or the size is not as expected.
    """
    axes = magic & 0xFF
    start = 4 + 4 * axes
    with _decompressed(path) as file:
        header = file.read(start)
        if len(header) < start:
            raise damaged(path, f"a header of {start} bytes", f"{len(header)} bytes")
        found, *shape = struct.unpack(f">{1 + axes}I", header)
        if found != magic:
            raise damaged(path, f"magic number {magic:#06x}", f"{found:#06x}")
        fits(path, shape, 1)
        expected = math.prod(shape)
        content = bytearray(file.read(expected + 1))
    if len(content) != expected:
        raise damaged(
            path,
            f"{start + expected} bytes for shape {tuple(shape)}",
            f"{start + len(content)} bytes" + " or more" * (len(content) > expected),
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape))


def read_cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Reads one CIFAR-10 batch: uint8 images (10000, 3, 32, 32) and int64 labels (10000,).

    The file is a pickle, xz-compressed where its name ends in ``.xz``. Its opcodes are only listed,
    never executed: the images are the one constant of 30,720,000 bytes, the labels are the integers
    that follow the key "labels". Raises ValueError, naming the file, where these are not there.
    """
    with _decompressed(path) as file:
        content = file.read(CIFAR_FILE)
    pixels: bytes | None = None
    labels: list[int] = []
    key = ""
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if isinstance(argument, (str, bytes)):
                if len(argument) == CIFAR_ROWS * CIFAR_BYTES:
                    pixels = argument if isinstance(argument, bytes) else argument.encode("latin-1")
                elif opcode.name != "GLOBAL":
                    key = argument if isinstance(argument, str) else argument.decode("latin-1")
            elif key == "labels" and "INT" in opcode.name and isinstance(argument, int):
                labels.append(argument)
    except (ValueError, IndexError) as error:
        raise damaged(path, "a whole pickle", f"one of {len(content)} bytes ({error})") from error
    if pixels is None:
        raise damaged(path, f"{CIFAR_ROWS} rows of {CIFAR_BYTES} bytes", "no such block")
    if len(labels) != CIFAR_ROWS or not all(0 <= label < 10 for label in labels):
        raise damaged(
            path,
            f"{CIFAR_ROWS} labels of 0 ... 9",
            f"{len(labels)} labels of {min(labels, default=None)} ... {max(labels, default=None)}",
        )
    images = np.frombuffer(pixels, np.uint8).reshape(CIFAR_ROWS, 3, 32, 32)
    return torch.from_numpy(images.copy()), torch.from_numpy(np.array(labels))


def _idx(folder: Path, name: str) -> Path:
    plain = folder / name
    return plain if plain.is_file() else folder / (name + ".gz")


@contextmanager
def _decompressed(path: Path) -> Iterator[BinaryIO]:
    if not path.is_file():
        raise FileNotFoundError(f"expected the data file {path}; it does not exist")
    openers: dict[str, Callable] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix, open)(path, "rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        size = path.stat().st_size
        raise damaged(path, "a whole compressed file", f"one of {size} bytes ({error})") from error
