# SPDX-License-Identifier: Apache-2.0
"""What data from outside may be, and the sentences that refuse the rest."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pfgm_kernels._checks import number

LEAST_PIXELS, MOST_PIXELS = 2, 1 << 24
MOST_BYTES = 4 * MOST_PIXELS
"""Of the file of one image, compressed or not, and of its labels."""
LABELS = 1 << 24


class DataError(ValueError):
    """A sentence that says what was expected and what came."""


def damaged(where: object, expected: str, actual: object) -> DataError:
    return DataError(f"damaged data file {where}: expected {expected}, got {actual}")


@contextmanager
def blaming(where: object, expected: str) -> Iterator[None]:
    """Turns whatever a decoder raises on foreign bytes into a sentence that names the file.

    Decoders promise no set of exceptions for damaged input: Pillow, zipfile and NumPy raise some
    twenty kinds, RuntimeError and MemoryError among them.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise damaged(where, expected, f"{type(error).__name__} ({text})") from error


def check_share(share: float | None) -> float | None:
    """``share`` if it may be held out; raises ValueError otherwise."""
    if share is None:
        return None
    if not 0 <= (value := number("held_out", share)) < 1:
        raise ValueError(f"held_out expects a share from 0 to below 1, got {share}")
    return value


def fits(where: object, shape: Sequence[int], itemsize: int) -> None:
    """Raises unless an array of that shape is smaller than the memory of this machine."""
    size, most = math.prod(shape) * itemsize, memory()
    if size > most:
        raise DataError(
            f"{where}: expected data that fit the {most / 2**30:.3g} GiB of this machine's memory, "
            f"got shape {tuple(shape)}, {size / 2**30:.3g} GiB"
        )


def memory() -> int:
    """Bytes that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def image_size(where: object, height: int, width: int) -> None:
    if not LEAST_PIXELS <= height * width <= MOST_PIXELS:
        raise DataError(
            f"{where}: expected images of {LEAST_PIXELS} to {MOST_PIXELS:,} pixels, "
            f"got {height} × {width}"
        )
