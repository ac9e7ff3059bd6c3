# SPDX-License-Identifier: Apache-2.0
"""Is what the kernels take from an instruction set the same with all of them? And on a processor of
another kind, by a cross compiler and an emulator where there are any?
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import ninja
import ninja_build
import pytest

ROOT = Path(__file__).parents[2]
CPP = Path(__file__).parent / "cpp"
CHECKED = "-Wall -Wextra -Werror -Wno-psabi"
AARCH64 = "aarch64-linux-gnu-g++"
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
aarch64 = pytest.mark.skipif(
    shutil.which(AARCH64) is None or QEMU is None,
    reason=f"there is no {AARCH64} or no qemu-aarch64",
)


def check(folder: Path, compiler: str, flags: str, *emulator: str) -> None:
    program = folder / "vectors"
    options = f"-std=c++17 -O1 -fno-math-errno {CHECKED} {flags}".split()
    subprocess.run([compiler, *options, "-o", program, CPP / "vectors.cpp"], check=True)
    run = subprocess.run([*emulator, program], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "")


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
class TestVectors:
    def test_of_an_instruction_set(self, instruction_set: str, tmp_path: Path) -> None:
        check(tmp_path, "g++", ninja_build.ISA_FLAGS[instruction_set])

    def test_without_instructions_of_their_own(self, tmp_path: Path) -> None:
        check(tmp_path, "g++", "-U__SSE2__ -U__aarch64__")


@aarch64
def test_vectors_on_aarch64(tmp_path: Path) -> None:
    check(tmp_path, AARCH64, "-static", str(QEMU))


@aarch64
@pytest.mark.exhaustive
def test_kernels_on_aarch64(tmp_path: Path) -> None:
    names = [*ninja_build.CPU_SOURCES, "dispatch"]
    sources = {name: f"{ROOT}/csrc/cpu/{name}.cpp" for name in names}
    sources["tests"] = f"{CPP}/cpu_kernels.cpp"
    flags = f"{ninja_build.FLAGS} {CHECKED} -O3 -DPFGM_ISA=portable -DPFGM_POISON"
    lines = [f"rule cxx\n  command = {AARCH64} {flags} -c $in -o $out"]
    lines += [f"rule link\n  command = {AARCH64} -static -fopenmp $in -o $out"]
    lines += [f"build {name}.o: cxx {source}" for name, source in sources.items()]
    lines += [f"build cpu_kernels: link {' '.join(f'{name}.o' for name in sources)}", ""]
    (tmp_path / "build.ninja").write_text("\n".join(lines))
    subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", tmp_path, "--quiet"], check=True)
    subprocess.run([str(QEMU), tmp_path / "cpu_kernels", "portable"], check=True)
