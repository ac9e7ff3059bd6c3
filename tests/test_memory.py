# SPDX-License-Identifier: Apache-2.0
"""Does a call's extra memory stay under 300 MiB at B = 128, N = 50,000, d = 3072?

Measured in a process of its own, over 8-bit references (which are not extra). The portable backend
is too slow here for B and N at full size together: a chunk is 1,702 references, so it is
measured at each in turn.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

LIMIT = 300  # MiB
SIZES = {"eager": [(4, 50_000), (128, 2_000)]}


def host_memory(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class Peak:
    """Peak memory above that at the start, in MiB."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> Peak:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self.start = host_memory("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            self.extra = torch.cuda.max_memory_allocated() / 2**20 - self.start
        else:
            self.extra = host_memory("VmHWM") - self.start


def measure(backend: str, device: str, batch: int, count: int) -> None:
    """Prints the extra memory of a known tensor, of a forward and of a backward pass."""
    from pfgm_kernels import ReferenceSet, poisson_displacement

    images = torch.randint(0, 256, (count, 3072), dtype=torch.uint8).to(device)
    x, t = torch.randn(batch, 3072).to(device).requires_grad_(), torch.rand(batch).to(device)
    t.requires_grad_()
    small = poisson_displacement(
        x[:2], t[:2], ReferenceSet.from_images(images[:64]), backend=backend
    )
    (small[0].sum() + small[1].sum()).backward()
    references = ReferenceSet.from_images(images)
    with Peak(device) as known:
        torch.ones(100 << 18, device=device)  # 100 MiB, released at once
    with Peak(device) as forward:
        v, log_mass = poisson_displacement(x, 30 * t, references, backend=backend)
    with Peak(device) as backward:
        torch.autograd.grad([v.sum() + log_mass.sum()], [x, t])
    print(known.extra, forward.extra, backward.extra)


@pytest.fixture(scope="module")
def clear_refs() -> None:
    if not torch.cuda.is_available():
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:
            pytest.skip(f"this machine does not let a process reset its peak memory ({error})")


def test_extra_memory(backend, clear_refs):
    reason = backend.reason(3072, requires_grad=True)
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")
    for batch, count in SIZES.get(backend.name, [(128, 50_000)]):
        arguments = [backend.name, backend.device.type, str(batch), str(count)]
        command = [sys.executable, __file__, *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        known, forward, backward = map(float, run.stdout.split())
        assert 95 < known < 120  # the meter works
        assert 0 <= forward < LIMIT
        assert 0 <= backward < LIMIT


if __name__ == "__main__":
    measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
