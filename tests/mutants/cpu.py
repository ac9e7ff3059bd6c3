# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the CPU kernels: those that cpu.txt lists, each with tests that it should fail.

The kernels are built as csrc/ninja_build.py says, but for the instruction set alone that runs here.
Of a mistake ninja compiles what reads the file that has it.
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

import ninja
from mutants.runner import ROOT, Found, Mutant, read, run_pytest

from pfgm_kernels import _C

ISA = _C.build_info()["instruction set"]
TITLE = "The CPU kernels"
ABOUT = (
    f"Found by the first test that fails, with the instruction set {ISA}. The mistakes stand in "
    "`tests/mutants/cpu.txt`."
)
COLUMNS = ("found by",)

ISAS = list(runpy.run_path(str(ROOT / "csrc" / "ninja_build.py"))["ISA_FLAGS"])
ELSEWHERE = ["eager", "triton", "cuda", *(isa for isa in ISAS if isa != ISA)]
TESTS = ["-k", " and ".join(f"({ISA} or not {name})" for name in ELSEWHERE)]
PASSIVE = {"OMP_WAIT_POLICY": "passive"}  # for jobs share the cores
ENTRY_POINTS = (
    "field_forward",
    "field_backward_queries",
    "field_backward_references",
    "prepare_references",
    "field_finish",
    "field_begin",
)


def mutants() -> list[Mutant]:
    return read(Path(__file__).with_suffix(".txt"))


def other_instruction_sets() -> str:
    """A source that the extension can be linked with in their place."""
    functions = [f"void {name}(const FieldParams&) {{ std::abort(); }}" for name in ENTRY_POINTS]
    lines = ['#include "csrc/poisson_field.h"', "#include <cstdlib>"]
    for isa in ISAS:
        if isa != ISA:
            lines += [f"namespace pfgm::{isa} {{", *functions, "}"]
    return "\n".join([*lines, ""])


class Worker:
    """Objects of the kernels as they are, a copy of which a mistake changes."""

    built: ClassVar[Path | None] = None  # by the first job

    def __init__(self, tree: Path) -> None:
        self.tree, self.unchanged = tree, tree / "build" / "unchanged"
        self.output = tree / "pfgm_kernels" / Path(_C.__file__).name
        if Worker.built is not None and Worker.built.exists():
            shutil.copytree(Worker.built, self.unchanged, symlinks=True)
        build = runpy.run_path(str(tree / "csrc" / "ninja_build.py"))
        build["prepare"](self.unchanged, self.output)
        self.targets = ["dispatch.o", *(f"{name}_{ISA}.o" for name in build["CPU_SOURCES"])]
        self._age(None)
        self._ninja(self.unchanged, *self.targets, "bindings.o")
        (self.unchanged / "others.cpp").write_text(other_instruction_sets())
        self._run(self.unchanged, "g++", "-std=c++17", "-fPIC", "-c", "others.cpp")
        Worker.built = self.unchanged

    def __call__(self, mutant: Mutant) -> Found:
        work = self.tree / "build" / "changed"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.unchanged, work, symlinks=True)
        self._age(mutant.file)
        try:
            self._ninja(work, *self.targets)
        except subprocess.CalledProcessError:
            return {"found by": "does not compile"}
        objects = sorted(path.relative_to(work) for path in work.rglob("*.o"))
        self._run(work, "g++", "-shared", "-fopenmp", *objects, "-o", self.output)
        arguments = [*TESTS, *shlex.split(mutant.tests)]
        return {"found by": run_pytest(self.tree, arguments, PASSIVE)}

    def _age(self, changed: str | None) -> None:
        """Lets ninja take every source but the changed one for older than the objects."""
        for path in (self.tree / "csrc").rglob("*.*"):
            if path != self.tree / (changed or ""):
                os.utime(path, (1, 1))

    def _ninja(self, work: Path, *targets: str) -> None:
        self._run(work, Path(ninja.BIN_DIR) / "ninja", "--quiet", *targets)

    def _run(self, work: Path, *command: str | Path) -> None:
        subprocess.run(command, cwd=work, check=True, capture_output=True)
