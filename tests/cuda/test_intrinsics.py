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


def test_the_check_for_the_gpu_compiles(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    source = emulated.EMULATION / "device_check.cu"
    command = [nvcc, "-std=c++17", "-gencode", "arch=compute_80,code=sm_80", "-c", str(source)]
    run = subprocess.run([*command, "-o", str(tmp_path / "o")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stdout + run.stderr
