# SPDX-License-Identifier: Apache-2.0
"""How much memory a computation takes at its peak."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


class PeakMemory:
    """The most memory that a block of code holds beyond what was held before; results count::

        with PeakMemory(device) as peak:
            output = compute()
        print(peak.extra_bytes)

    On a GPU by PyTorch's allocator. Else it is the resident memory of the whole process, whose
    high-water mark Linux keeps: it misses no spike, whoever allocates.

    extra_bytes: in bytes; None where the system does not let a process start its high-water mark
    anew. reason: a sentence that says so, else None.
    """

    extra_bytes: int | None = None
    reason: str | None = None

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        try:
            # Freed memory that the allocator still holds would hide what the block takes.
            ctypes.CDLL(None).malloc_trim(0)
            CLEAR_REFS.write_text("5")
            self._before = _status_bytes("VmRSS")
        except (OSError, AttributeError) as error:  # not Linux with glibc, or not allowed
            self.reason = f"this system does not let a process reset its peak memory ({error})"
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.extra_bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif self.reason is None:
            self.extra_bytes = max(0, _status_bytes("VmHWM") - self._before)


def _status_bytes(key: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"{STATUS} has no {key}")
