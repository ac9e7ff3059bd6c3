# SPDX-License-Identifier: Apache-2.0
"""Do the host versions of the CUDA intrinsics do what the PTX manual says?

emulation/checks.cuh has the formulas; device_check.cu is the same for a GPU.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import emulated
import pytest
import tensor_core

CHECKS = ["multiply", "load", "load transposed", "product", "product transposed", "copy"]


@pytest.fixture(
    scope="module", params=["plain", pytest.param("races", marks=pytest.mark.exhaustive)]
)
def programs(request: pytest.FixtureRequest) -> ModuleType:
    return emulated.build(request.param, "programs", emulated.PROGRAMS)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("order", "late"), emulated.SCHEDULES)
def test_intrinsic(programs: ModuleType, check: str, order: str, late: int) -> None:
    programs.set_schedule(order, seed=3, late=bool(late))
    programs.run_check(check)


DESCRIPTIONS = {
    "rounded": ("2 or fewer", 0, "rounded to nearest"),
    "bare": ("8", 0, "cut toward zero"),
    "sm_80": ("8", 1, "cut toward zero"),
    "sm_90": ("16 or more", 2, "cut toward zero"),
}


@pytest.mark.parametrize("core", tensor_core.CORES)
def test_what_tensor_cores_do_is_seen(programs: ModuleType, core: str) -> None:
    """As it will be on a chip that no one has tried."""
    at_a_time, guard_bits, sums = DESCRIPTIONS[core]
    programs.set_tensor_core(*tensor_core.CORES[core])
    assert programs.describe_tensor_core().splitlines() == [
        f"products added at a time: {at_a_time}",
        f"guard bits: {guard_bits}",
        "what is less is cut toward zero",
        f"sums are {sums}",
    ]


@pytest.mark.parametrize(
    "arch", [80, *(pytest.param(a, marks=pytest.mark.exhaustive) for a in (90, 120))]
)
def test_the_check_for_the_gpu_compiles(tmp_path: Path, arch: int) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    source = emulated.EMULATION / "device_check.cu"
    command = [
        nvcc,
        "-std=c++17",
        "-gencode",
        f"arch=compute_{arch},code=sm_{arch}",
        "-c",
        str(source),
    ]
    run = subprocess.run([*command, "-o", str(tmp_path / "o")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stdout + run.stderr
