# SPDX-License-Identifier: Apache-2.0
"""Arrays in .npy and .npz files, read row by row into their places; never unpickled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from pfgm_kernels.training.data.checks import (
    LABELS,
    DataError,
    blaming,
    damaged,
    fits,
    image_size,
)
from pfgm_kernels.training.data.dataset import DataSet, split
from pfgm_kernels.training.data.sources import Archive

VALUES, CLASSES = ("images", "x", "data", "arr_0"), ("labels", "y")
CHUNK = 1 << 24
"""Bytes that are read at a time."""


def load_npy(
    name: str, path: Path, held_out: float | None, progress: Callable[[float], None]
) -> DataSet:
    with path.open("rb") as file:
        array = _Array.open(file, path, path.stat().st_size)
        return _data_set(name, array, None, held_out, progress)


def load_npz(
    name: str, path: Path, held_out: float | None, progress: Callable[[float], None]
) -> DataSet:
    with Archive(path) as archive:
        values, classes = (_chosen(archive, names) for names in (VALUES, CLASSES))
        if values is None:
            raise DataError(
                f"{path} expects one of the arrays {', '.join(VALUES)}, "
                f"got {', '.join(archive.names) or 'none'}"
            )
        labels = None
        if classes is not None:
            with archive.open(classes) as file:
                labels = _labels(_Array.open(file, archive.where(classes), archive.size(classes)))
        with archive.open(values) as file:
            array = _Array.open(file, archive.where(values), archive.size(values))
            return _data_set(name, array, labels, held_out, progress)


def _chosen(archive: Archive, names: tuple[str, ...]) -> str | None:
    found = [f"{name}.npy" for name in names if f"{name}.npy" in archive.names]
    if len(found) > 1:
        raise DataError(
            f"{archive.path} expects one of the arrays {', '.join(names)}, got {', '.join(found)}"
        )
    return found[0] if found else None


class _Array(NamedTuple):
    """An array in a file, its header read."""

    file: IO[bytes]
    where: object
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype

    @classmethod
    def open(cls, file: IO[bytes], where: object, size: int) -> _Array:
        """size: bytes of the file, which has to be that of its array."""
        with blaming(where, "an array of NumPy"):
            version = npy.read_magic(file)
            readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
            if version not in readers:
                raise damaged(where, "a file of version 1.0 or 2.0", version)
            shape, fortran, dtype = readers[version](file)
        if dtype.kind not in "uif":
            raise DataError(f"{where}: expected an array of numbers, got {dtype}")
        expected = file.tell() + math.prod(shape) * dtype.itemsize
        if size != expected or min(shape, default=1) < 0:
            raise damaged(where, f"{expected} bytes for shape {shape} of {dtype}", f"{size} bytes")
        return cls(file, where, shape, fortran, dtype)

    def rows(self) -> Iterator[np.ndarray]:
        """The array in consecutive parts, along its first axis."""
        row = math.prod(self.shape[1:])
        step = max(1, CHUNK // (row * self.dtype.itemsize))
        if self.fortran:  # the last axis comes first in the file
            whole = self._read(math.prod(self.shape)).reshape(self.shape[::-1]).T
            yield from (whole[start : start + step] for start in range(0, len(whole), step))
            return
        for start in range(0, self.shape[0], step):
            count = min(step, self.shape[0] - start)
            yield self._read(count * row).reshape(count, *self.shape[1:])

    def _read(self, count: int) -> np.ndarray:
        size = count * self.dtype.itemsize
        with blaming(self.where, "a whole array"):
            content = self.file.read(size)
        if len(content) != size:
            raise damaged(self.where, "a whole array", "an end within it")
        return np.frombuffer(content, self.dtype)


def _data_set(
    name: str,
    array: _Array,
    labels: np.ndarray | None,
    held_out: float | None,
    progress: Callable[[float], None],
) -> DataSet:
    event, channels_last = _event(array)
    count = array.shape[0]
    if labels is not None and len(labels) != count:
        raise DataError(
            f"{array.where}: expected as many labels as rows, {count}, got {len(labels)}"
        )
    division = split(array.where, count, held_out)
    dtype = np.dtype(np.uint8 if array.dtype == np.uint8 else np.float32)
    fits(array.where, (count, *event), dtype.itemsize)
    stored = np.empty((count, *event), dtype)
    start = 0
    for rows in array.rows():
        if channels_last:
            rows = np.moveaxis(rows, -1, 1)
        with np.errstate(over="ignore"):
            converted = rows.reshape(len(rows), *event).astype(dtype)
        if not np.isfinite(converted).all():
            raise DataError(f"{array.where}: expected finite float32 values, got NaN or Inf")
        stored[division.places[start : start + len(rows)]] = converted
        start += len(rows)
        progress(start / count)
    return division.data_set(name, stored, labels)


def _event(array: _Array) -> tuple[tuple[int, ...], bool]:
    """The shape of one row in memory, and whether its channels come last in the file."""
    where, shape, dtype = array.where, array.shape, array.dtype
    if not (dtype == np.uint8 or dtype.kind == "f"):
        raise DataError(f"{where}: expected uint8 or floating-point values, got {dtype}")
    if len(shape) == 2 and dtype.kind == "f" and shape[1] > 0:
        return shape[1:], False
    last = len(shape) == 4 and shape[3] in (1, 3)
    if not (len(shape) == 3 or last or (len(shape) == 4 and shape[1] in (1, 3))):
        raise DataError(
            f"{where}: expected images (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3, or "
            f"floating-point vectors (N, d), got shape {shape} of {dtype}"
        )
    height, width = shape[1:3] if last or len(shape) == 3 else shape[2:]
    image_size(where, height, width)
    grey = len(shape) == 3 or shape[3 if last else 1] == 1
    return (height, width) if grey else (3, height, width), last


def _labels(array: _Array) -> np.ndarray:
    where, shape = array.where, array.shape
    if len(shape) != 1 or array.dtype.kind not in "ui":
        raise DataError(f"{where}: expected integers (N,), got shape {shape} of {array.dtype}")
    fits(where, shape, 8)
    labels = np.concatenate([*array.rows(), np.empty(0, array.dtype)])
    if len(labels) and not (labels.min() >= 0 and labels.max() < LABELS):
        raise DataError(
            f"{where}: expected labels from 0 to {LABELS - 1}, got {labels.min()} to {labels.max()}"
        )
    return labels.astype(np.int64)
