# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the CPU kernels: those that cpu.txt lists, each with tests that it should fail.

The kernels are built as csrc/ninja_build.py says, a mistake for the instruction set alone that runs
here.
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import ninja
from mutants.runner import Found, Mutant, read, run_pytest

from pfgm_kernels import _C

TITLE = "The CPU kernels"
ABOUT = (
    "Found by the first test that fails, with the instruction set "
    f"{_C.build_info()['instruction set']}. The mistakes stand in `tests/mutants/cpu.txt`."
)
COLUMNS = ("found by",)
TESTS = ["-k", "not triton"]


def mutants() -> list[Mutant]:
    return read(Path(__file__).with_suffix(".txt"))


class Worker:
    """Objects of the kernels as they are, a copy of which a mistake changes."""

    def __init__(self, tree: Path) -> None:
        self.tree, self.unchanged = tree, tree / "build" / "unchanged"
        self.unchanged.mkdir(parents=True)
        self.output = tree / "pfgm_kernels" / Path(_C.__file__).name
        build = runpy.run_path(str(tree / "csrc" / "ninja_build.py"))
        build["prepare"](self.unchanged, self.output)
        isa = _C.build_info()["instruction set"]
        self.targets = ["dispatch.o", *(f"{name}_{isa}.o" for name in build["CPU_SOURCES"])]
        self._age(None)
        self._ninja(self.unchanged)

    def __call__(self, mutant: Mutant | None) -> Found:
        if mutant is not None:
            work = self.tree / "build" / "changed"
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(self.unchanged, work, symlinks=True)
            self._age(mutant.file)
            try:
                self._ninja(work, *self.targets)
            except subprocess.CalledProcessError:
                return {"found by": "does not compile"}
            self._link(work)
        wanted = [mutant] if mutant else mutants()
        arguments = dict.fromkeys(part for m in wanted for part in shlex.split(m.tests))
        return {"found by": run_pytest(self.tree, [*TESTS, *arguments])}

    def _age(self, changed: str | None) -> None:
        """Lets ninja take every source but the changed one for older than the objects."""
        for path in (self.tree / "csrc").rglob("*.*"):
            if path != self.tree / (changed or ""):
                os.utime(path, (0, 0))

    def _ninja(self, work: Path, *targets: str) -> None:
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", work, "--quiet", *targets]
        subprocess.run(command, check=True, capture_output=True)

    def _link(self, work: Path) -> None:
        objects = sorted(work.rglob("*.o"))
        subprocess.run(["g++", "-shared", "-fopenmp", *objects, "-o", self.output], check=True)
