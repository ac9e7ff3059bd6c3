# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the CPU kernels: those that cpu.txt lists, each with tests that it should fail.

A mistake is built for the instruction set alone that runs here.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from mutants.runner import ROOT, Found, Mutant, read, run_pytest

sys.path.append(str(ROOT / "csrc"))
from ninja_build import CPU_SOURCES, cxx, ninja_file

from pfgm_kernels import _C

ISA = _C.build_info()["instruction set"]
TITLE = "The CPU kernels"
ABOUT = (
    f"Found by the first test that fails, with the instruction set {ISA}. The mistakes stand in"
    " `tests/mutants/cpu.txt`."
)
COLUMNS = ("found by",)
TESTS = ["-k", "not triton and not eager"]


def mutants() -> list[Mutant]:
    return read(Path(__file__).with_suffix(".txt"))


class Worker:
    """The kernels' objects as they are, of which a mistake changes a copy."""

    def __init__(self, tree: Path) -> None:
        self.tree, self.unchanged = tree, tree / "build" / "unchanged"
        self.unchanged.mkdir(parents=True)
        links = {
            "csrc": tree / "csrc",
            "output": tree / "pfgm_kernels",
            "pybind11": Path(pybind11.get_include()),
            "python": Path(sysconfig.get_path("include")),
        }
        for name, folder in links.items():
            (self.unchanged / name).symlink_to(folder)
        self.extension = Path("output", Path(_C.__file__).name)
        (self.unchanged / "build.ninja").write_text(ninja_file(self.extension.name))
        self._age(None)
        self._ninja(self.unchanged)

    def __call__(self, mutant: Mutant | None) -> Found:
        if mutant is not None:
            try:
                self._build(mutant)
            except subprocess.CalledProcessError:
                return {"found by": "does not compile"}
        wanted = [mutant] if mutant else mutants()
        arguments = dict.fromkeys(part for m in wanted for part in shlex.split(m.tests))
        return {"found by": run_pytest(self.tree, [*TESTS, *arguments])}

    def _build(self, mutant: Mutant) -> None:
        work = self.tree / "build" / "changed"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.unchanged, work, symlinks=True)
        self._age(mutant.file)
        self._ninja(work, "dispatch.o", *(f"{name}_{ISA}.o" for name in CPU_SOURCES))
        objects = sorted(work.rglob("*.o"))
        command = [*cxx(), "-shared", "-fopenmp", *objects, "-o", self.extension]
        subprocess.run(command, cwd=work, check=True)

    def _age(self, changed: str | None) -> None:
        """Lets ninja take every source but the changed one for older than the objects."""
        for path in (self.tree / "csrc").rglob("*.*"):
            if path != self.tree / (changed or ""):
                os.utime(path, (0, 0))

    def _ninja(self, work: Path, *targets: str) -> None:
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", work, *targets]
        subprocess.run(command, check=True, capture_output=True)
