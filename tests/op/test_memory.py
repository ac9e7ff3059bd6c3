# SPDX-License-Identifier: Apache-2.0
"""Does a call take its result, the workspace and 32 MiB, whatever the number of queries?

Measured in a process of its own. The portable backend is too slow here for 128 queries and 50,000
8-bit images at once, and is measured at each in turn.
"""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence

import emulated
import pytest
import torch
from torch import Tensor

from pfgm_kernels import (
    ReferenceSet,
    divergence,
    memory,
    poisson_displacement,
    poisson_field,
    posterior_mean,
)
from pfgm_kernels.backends import cuda
from pfgm_kernels.memory import PeakMemory

MIB = 1 << 20
LIMIT = 300  # MiB
SIZES = {"eager": [(4, 50_000), (128, 2_000)]}


MANY = {  # queries, references, d: of queries, of references, of pairs, of columns that are few
    "images": (4096, 32, 3072),
    "references": (16, 4000, 3072),
    "pairs": (4096, 4096, 40),
    "few columns": (500_000, 4, 3),
}


def warm_up(x: Tensor, t: Tensor, references: ReferenceSet) -> None:
    """What is loaded once is not a call's."""
    small = poisson_displacement(x[:2], t[:2], references)
    torch.autograd.grad(small, [x, t], [torch.ones_like(output) for output in small])
    torch.func.jvp(
        lambda x: poisson_field(x, 1.0, references), (x[:2].detach(),), (x[:2].detach(),)
    )


def measure_images(backend: str, device: str, batch: int, count: int) -> None:
    """Prints the extra memory of a known tensor, of a forward and of a backward pass."""
    images = torch.randint(0, 256, (count, 3072), dtype=torch.uint8).to(device)
    x, t = torch.randn(batch, 3072).to(device).requires_grad_(), torch.rand(batch).to(device)
    t.requires_grad_()
    warm_up(x, t, ReferenceSet.from_images(images[:64], backend=backend))
    references = ReferenceSet.from_images(images, backend=backend)
    with PeakMemory(device) as known:
        torch.ones(100 << 18, device=device)  # 100 MiB, released at once
    with PeakMemory(device) as forward:
        v, log_mass = poisson_displacement(x, 30 * t, references)
    with PeakMemory(device) as backward:
        torch.autograd.grad([v.sum() + log_mass.sum()], [x, t])
    print(*[peak.extra_bytes for peak in (known, forward, backward)])


def measure_many(backend: str, device: str, name: str) -> None:
    """Prints what each call takes beyond its result, and beyond x, which is kept for gradients."""
    batch, count, d = MANY[name]
    batch //= 8 if backend == "eager" else 1  # it is slow
    x, x0 = torch.randn(batch, d).to(device), torch.randn(count, d).to(device)
    t = (1 + torch.rand(batch)).to(device)
    x0[0, 0] = 1e-3 * math.pi  # off any grid of 256 steps
    references = ReferenceSet(x0, workspace=MIB, backend=backend)
    warm_up(x.clone().requires_grad_(), t.clone().requires_grad_(), references)

    def taken(run: Callable[[], Sequence[Tensor]], kept: int = 0) -> int:
        with PeakMemory(device) as peak:
            results = run()
        assert peak.extra_bytes is not None
        return peak.extra_bytes - kept - sum(tensor.nbytes for tensor in results)

    figures = [
        taken(lambda: [poisson_field(x, t, references)]),
        taken(lambda: [posterior_mean(x, t, references)]),
        taken(lambda: poisson_displacement(x, t, references)),
        taken(lambda: [divergence(x, t, references)]),
    ]
    rows = batch * (4 * d + 16)  # a residual, an anchor and its log weight
    x.requires_grad_(), t.requires_grad_()
    results = []
    for run in (poisson_field, posterior_mean, lambda *a: poisson_displacement(*a)[0]):
        figures.append(
            taken(lambda run=run: results.append(run(x, t, references)) or results[-1:], rows)
        )
        g = torch.ones_like(results[-1])
        figures.append(taken(lambda g=g: torch.autograd.grad(results[-1], [x, t], g)))
    few = x[: batch // 16 + 1], t[: batch // 16 + 1]  # the gradient is slow, too
    slope = divergence(*few, references).sum()
    figures.append(taken(lambda: torch.autograd.grad(slope, few)))
    tangents = torch.ones_like(x), torch.ones_like(t)
    figures.append(
        taken(
            lambda: torch.func.jvp(
                lambda x, t: poisson_field(x, t, references), (x.detach(), t.detach()), tangents
            ),
            rows,
        )
    )
    print(*figures)


def run_apart(*arguments: object) -> list[float]:
    """MiB that this file prints in a process of its own."""
    # Not by PYTHONPATH, which has no way to name a folder with a colon.
    code = f"import runpy, sys; sys.path[:] = {sys.path}\n"
    code += f"runpy.run_path({__file__!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return [int(part) / MIB for part in run.stdout.split()]


def skip_where_memory_cannot_be_measured(backend) -> None:
    if backend.interpreted:
        pytest.skip("what the interpreter takes is not what a GPU does")
    reason = backend.reason()
    if reason is not None:
        pytest.skip(f"{backend.name}: {reason}")
    with PeakMemory(backend.device) as meter:
        pass
    if meter.reason is not None:
        pytest.skip(meter.reason)


@pytest.mark.exhaustive
def test_a_whole_data_set(backend):
    skip_where_memory_cannot_be_measured(backend)
    for batch, count in SIZES.get(backend.name, [(128, 50_000)]):
        arguments = "images", backend.name, backend.device.type, batch, count
        known, forward, backward = run_apart(*arguments)
        assert 95 < known < 120  # the meter works
        assert 0 <= forward < LIMIT
        assert 0 <= backward < LIMIT


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MANY)
def test_a_small_workspace(backend, name):
    """Each function, its backward pass and a tangent, with a workspace of 1 MiB."""
    skip_where_memory_cannot_be_measured(backend)
    figures = run_apart("many", backend.name, backend.device.type, name)
    assert len(figures) == 12
    assert max(figures) <= 1 + 32, figures


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
    names += ["projection", "grad_log_mass", "dx", "dt", "x_single", "crowd"]
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
    what, backend_name, device_name, *sizes = sys.argv[1:]
    if what == "images":
        measure_images(backend_name, device_name, *map(int, sizes))
    else:
        measure_many(backend_name, device_name, *sizes)
