# SPDX-License-Identifier: Apache-2.0
"""References in .npy files, read as they are needed."""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

DTYPES = {
    np.dtype(name): getattr(torch, name) for name in ("uint8", "float16", "float32", "float64")
}
SPAN = 4
"""Rows that are read for each that is wanted, where wanted ones lie near each other."""

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


class _File(NamedTuple):
    path: str
    offset: int
    """Of the first row in bytes."""
    size: int
    changed: int
    """When, in nanoseconds."""


class OnDisk:
    """What stands for a tensor of references (N, d): rows are read when an index asks for them.

    Every read looks whether the file is the one that was opened first, by its size and the time of
    its last change. They are read, not mapped into memory: a file that is cut off while it is read
    is an error, not a signal that ends the process, and what was read is not counted as the
    process's.
    """

    requires_grad = False

    def __init__(
        self,
        files: list[_File],
        starts: list[int],
        event_shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        order: Tensor | None = None,
    ) -> None:
        self._files, self._starts, self.order = files, starts, order
        self.near: Any = None
        """What finds those near a query (`nearby.Nearby`), where that was asked for."""
        self.event_shape, self.dtype, self.device = event_shape, dtype, device
        self.shape = torch.Size([starts[-1], math.prod(event_shape)])

    @staticmethod
    def open(paths: Paths, device: torch.device) -> OnDisk:
        """Files of one dtype and event. Raises FileNotFoundError, TypeError or ValueError, naming
        the file, where they are not.
        """
        files, counts, first = [], [], None
        for path in _listed(paths):
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise ValueError(f"{path}: expected a regular file, got a pipe or another device")
            try:
                # It maps the file, reads nothing but the header and unpickles nothing.
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (ValueError, EOFError, OSError) as error:
                raise _damaged(path, error) from error
            if not isinstance(array, np.memmap) or not array.flags.c_contiguous:
                raise ValueError(f"{path}: expected one .npy array in C order, got another file")
            if array.dtype not in DTYPES:
                known = ", ".join(map(str, DTYPES))
                raise TypeError(f"{path}: expected one of {known}, got {array.dtype}")
            if array.ndim < 1 or array.size == 0:
                raise ValueError(f"{path}: expected shape (N, *event), N ≥ 1, got {array.shape}")
            kind = array.shape[1:], array.dtype
            first = first or kind
            if kind != first:
                raise ValueError(
                    f"{path}: expected events {first[0]} of {first[1]} as in the files before it, "
                    f"got {kind[0]} of {kind[1]}"
                )
            status = os.stat(path)
            files.append(_File(str(path), array.offset, status.st_size, status.st_mtime_ns))
            counts.append(len(array))
        assert first is not None
        starts = [0, *accumulate(counts)]
        return OnDisk(files, starts, torch.Size(first[0]), DTYPES[first[1]], device)

    def to(self, device: torch.device, non_blocking: bool = False) -> OnDisk:
        """The same, whose rows are put on another device."""
        return self._like(device, self.order)

    def reordered(self, order: Tensor) -> OnDisk:
        """Row i of it is row order[i] of this one."""
        order = order.cpu()
        return self._like(self.device, order if self.order is None else self.order[order])

    def _like(self, device: torch.device, order: Tensor | None) -> OnDisk:
        made = OnDisk(self._files, self._starts, self.event_shape, self.dtype, device, order)
        if self.near is not None and order is self.order:
            made.near = self.near.to(made)
        return made

    def in_order(self) -> OnDisk:
        """The same references, as they lie in the files."""
        return self._like(self.device, None)

    def identity(self) -> bytes:
        """Tells these files, as they are, from others: by names, sizes, times of the last change
        and some of the content.
        """
        ends = [at for start, end in pairwise(self._starts) for at in (start, end - 1)]
        rows = self.in_order()[torch.tensor(ends, device="cpu")].cpu()
        known = [(Path(file.path).name, *file[1:]) for file in self._files]
        return repr((known, self.shape, self.dtype)).encode() + rows.numpy().tobytes()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """What a row takes while it is used, 16 bits as float32, and the next one is read."""
        size = self.dtype.itemsize
        return self.shape[1] * (2 * size + (4 if size == 2 else 0))

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """Rows (n, d), read now; index: a slice, (N,) bool or (n,) integers."""
        if isinstance(index, slice) and self.order is None and index.step in (None, 1):
            start, stop, _ = index.indices(len(self))
            rows = self.empty(max(0, stop - start))
            self.read(start, rows)
        else:
            places = torch.arange(len(self), device="cpu") if self.order is None else self.order
            rows = self._gathered(places[index if isinstance(index, slice) else index.cpu()])
        return rows.to(self.device)

    def split(self, size: int) -> Iterator[Tensor]:
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def empty(self, count: int) -> Tensor:
        """(count, d) to read into, on the CPU."""
        pinned = self.device.type == "cuda"
        return torch.empty(
            (count, self.shape[1]), dtype=self.dtype, device="cpu", pin_memory=pinned
        )

    def read(self, start: int, out: Tensor) -> None:
        """Rows from `start` on, as they lie in the files, into out (n, d) on the CPU."""
        place, at = bisect.bisect_right(self._starts, start) - 1, 0
        while at < len(out):
            count = min(len(out) - at, self._starts[place + 1] - start)
            self._read(self._files[place], start - self._starts[place], out[at : at + count])
            at, start, place = at + count, start + count, place + 1

    def read_slice(self, references: slice, out: Tensor) -> Tensor:
        """Rows of a slice, in the memory of out where they lie together in the files."""
        if self.order is not None:
            return self._gathered(self.order[references])
        rows = out[: references.stop - references.start]
        self.read(references.start, rows)
        return rows

    def _gathered(self, places: Tensor) -> Tensor:
        """Rows (n, d) of these places in the files."""
        if places.numel() and not 0 <= places.min() <= places.max() < len(self):
            raise IndexError(f"a subset expects references of 0 … {len(self) - 1}")
        wanted, back = places.unique(return_inverse=True)
        rows, found = self.empty(len(wanted)), wanted.tolist()
        begin = 0
        while begin < len(found):
            end = begin + 1
            while end < len(found) and found[end] - found[begin] < SPAN * (end - begin + 1):
                end += 1
            span = self.empty(found[end - 1] - found[begin] + 1)
            self.read(found[begin], span)
            rows[begin:end] = span[wanted[begin:end] - found[begin]]
            begin = end
        return rows[back]

    def _read(self, file: _File, row: int, out: Tensor) -> None:
        view = memoryview(out.view(torch.uint8).flatten().numpy())  # type: ignore[arg-type]
        at = file.offset + row * self.shape[1] * out.element_size()
        try:
            with open(file.path, "rb", buffering=0, opener=_without_waiting) as opened:
                _look_at(file, opened.fileno())
                while view:
                    done = os.preadv(opened.fileno(), [view], at)
                    if not done:
                        raise _changed(file, at)
                    view, at = view[done:], at + done
                _look_at(file, opened.fileno())
        except OSError as error:
            error.filename = error.filename or file.path
            raise


class Reader:
    """Chunks of rows in a known order, the next one read while the last one is in use. It holds
    two.
    """

    def __init__(self, source: OnDisk, order: list[slice]) -> None:
        self._source = source
        self._following = {_ends(a): b for a, b in pairwise(order) if a != b}
        most = max((each.stop - each.start for each in order), default=0)
        self._buffers = [source.empty(most), source.empty(most)]
        self._thread = ThreadPoolExecutor(1, "pfgm-reader")
        self._next: tuple[slice, Future[Tensor]] | None = None
        self._streams = None
        if source.device.type == "cuda":
            # Its own, so that copies do not wait for the kernels that the caller's has.
            using = torch.cuda.current_stream(source.device)
            self._streams = using, torch.cuda.Stream(source.device)

    def __call__(self, references: slice) -> Tensor:
        """The rows (n, d) on the source's device. Raises ValueError where one is not finite."""
        if self._next is not None and self._next[0] == references:
            rows = self._next[1].result()
        else:
            if self._next is not None:
                self._next[1].exception()  # its buffer is being written to
            rows = self._read(references)
        self._next = None
        following = self._following.get(_ends(references))
        if following is not None:
            self._next = following, self._thread.submit(self._read, following)
        return rows

    def _read(self, references: slice) -> Tensor:
        self._buffers.reverse()
        rows = self._source.read_slice(references, self._buffers[0])
        if self._streams is not None:
            using, stream = self._streams
            with torch.cuda.stream(stream):
                rows = rows.to(self._source.device, non_blocking=True)
            stream.synchronize()
            rows.record_stream(using)
        check_finite(rows, references.start)
        return rows


def check_finite(rows: Tensor, start: int) -> None:
    """Raises ValueError where one of the rows (n, d) from `start` on is not finite."""
    if rows.is_floating_point() and not bool(torch.stack(rows.aminmax()).isfinite().all()):
        raise ValueError(
            "references in files are finite, got NaN or Inf among those from "
            f"{start} to {start + len(rows)}"
        )


def _ends(references: slice) -> tuple[int, int]:
    return references.start, references.stop  # slices have no hash before Python 3.12


def _listed(paths: Paths) -> list[Path]:
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files = []
    for each in map(Path, listed):
        inside = sorted(each.glob("*.npy")) if each.is_dir() else [each]
        if not inside:
            raise FileNotFoundError(f"expected .npy files in the folder {each}, got none")
        files += inside
    if not files:
        raise ValueError("from_files expects at least one file, got none")
    return files


def _damaged(path: Path, error: Exception) -> Exception:
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"expected the file {path}; it does not exist")
    if isinstance(error, OSError):
        return error
    return ValueError(f"damaged file {path}: expected a whole .npy array, got {error}")


def _without_waiting(path: str, flags: int) -> int:
    """Opens what has become a pipe, too, at once."""
    return os.open(path, flags | os.O_NONBLOCK)


def _look_at(file: _File, opened: int) -> None:
    """Raises ValueError where the file is not what it was."""
    status = os.fstat(opened)
    if (status.st_size, status.st_mtime_ns) != (file.size, file.changed):
        raise _changed(file, status.st_size)


def _changed(file: _File, size: int) -> ValueError:
    return ValueError(
        f"{file.path} was changed since it was opened: expected {file.size} bytes as they were, "
        f"got {size}"
    )
