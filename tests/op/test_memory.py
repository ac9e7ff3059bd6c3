# SPDX-License-Identifier: Apache-2.0
"""Does a call's extra memory stay under 300 MiB at B = 128, N = 50,000, d = 3072?

Measured in a process of its own, over 8-bit references (which are not extra). The portable backend
is too slow here for B and N at full size together: a chunk is 1,702 references, so it is
measured at each in turn.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys

import emulated
import pytest
import torch

from pfgm_kernels import memory
from pfgm_kernels.backends import cuda
from pfgm_kernels.memory import PeakMemory

LIMIT = 300  # MiB
SIZES = {"eager": [(4, 50_000), (128, 2_000)]}


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
    with PeakMemory(device) as known:
        torch.ones(100 << 18, device=device)  # 100 MiB, released at once
    with PeakMemory(device) as forward:
        v, log_mass = poisson_displacement(x, 30 * t, references, backend=backend)
    with PeakMemory(device) as backward:
        torch.autograd.grad([v.sum() + log_mass.sum()], [x, t])
    print(*[peak.extra_bytes for peak in (known, forward, backward)])


def test_extra_memory(backend):
    if backend.interpreted:
        pytest.skip("what the interpreter takes is not what a GPU does")
    reason = backend.reason(3072, requires_grad=True)
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")
    with PeakMemory(backend.device) as meter:
        pass
    if meter.reason is not None:
        pytest.skip(meter.reason)
    for batch, count in SIZES.get(backend.name, [(128, 50_000)]):
        arguments = [backend.name, backend.device.type, str(batch), str(count)]
        command = [sys.executable, __file__, *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=300, env=environment
        )
        known, forward, backward = (int(part) / 2**20 for part in run.stdout.split())
        assert 95 < known < 120  # the meter works
        assert 0 <= forward < LIMIT
        assert 0 <= backward < LIMIT


@pytest.mark.parametrize("workspace", [1 << 20, 1 << 24, 1 << 28])
@pytest.mark.parametrize("batch", [1, 129, 5_000, 3_000_000])
@pytest.mark.parametrize("count", [1, 1_000, 10_000_000])
@pytest.mark.parametrize("d", [1, 32, 64, 3072])
def test_cuda_temporaries_stay_within_the_workspace(batch, count, d, workspace):
    """What the entry points ask for, but for what keeps a GPU busy with a single query."""
    least = (9 << 20) + 128 * 32 + 64 * d
    module = emulated.build("plain")
    names = ["x", "t", "values", "header", "origin", "mean", "squares", "parts", "displacement"]
    names += ["anchor", "log_mass", "anchor_log_weight", "anchor_square", "grad_displacement"]
    names += ["projection", "grad_log_mass", "dx", "dt"]
    for flags in itertools.product((False, True), repeat=3):
        prepared, values_grad, single = flags
        rows, references = cuda.chunk_shape(batch, count, d, workspace, prepared, values_grad)
        arguments = dict.fromkeys([*names, *(["dvalues"] if values_grad else [])], 256)
        arguments |= {"batch": rows, "count": references, "dim": d, "half_k": d / 2 + 1}
        arguments |= {"num_parts": 2, "plane": references * -(-d // 64) * 64, "workspace": 0}
        arguments |= {"value_type": "float32", "single": single}
        left = workspace if prepared or d <= cuda.MAX_DIRECT_DIM else workspace * 3 // 8
        for entry in ["field_backward_cuda"] + ["field_forward_cuda"] * (not values_grad):
            taken = getattr(module, entry)(**arguments)
            assert 0 < taken <= max(left, least), (entry, flags, rows, references)


def test_a_system_that_keeps_its_high_water_mark_gives_no_figure(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    with PeakMemory() as peak:
        torch.ones(100)
    assert peak.extra_bytes is None
    assert re.fullmatch(
        r"this system does not let a process reset its peak memory \(.*No such file.*\)",
        peak.reason,
    )


if __name__ == "__main__":
    measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
