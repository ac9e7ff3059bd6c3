# SPDX-License-Identifier: Apache-2.0
"""Do the CPU kernels stay clear of memory errors, undefined behaviour and data races?

python tests/cpu/sanitize.py builds them with the sanitizers, together with cpp/cpu_kernels.cpp,
which runs and checks them with every instruction set that this processor has. What is built, and
for which instruction sets, is what setup.py says.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import ninja

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
SANITIZERS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-fsanitize=thread -DPFGM_STD_THREADS",
}
OPTIONS = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def read_setup(root: Path = ROOT) -> dict[str, Any]:
    """What setup.py defines, with nothing built."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(root / "setup.py"))


def ninja_file(setup: dict[str, Any]) -> str:
    """Per sanitizer, every source as setup.py compiles it, and the program that runs them."""
    flags = f"{setup['FLAGS']} -O1 -g1 -Wno-maybe-uninitialized -DPFGM_POISON $flags"
    compile_ = f"{setup['CXX']} {flags} -c $in -o $out"
    lines = [f"rule cxx\n  command = {compile_} -MD -MF $out.d\n  deps = gcc\n  depfile = $out.d"]
    lines += [f"rule link\n  command = {setup['CXX']} -fopenmp $flags $in -o $out"]
    kernels, tests = setup["SOURCES"] / "cpu", Path(__file__).parent / "cpp"
    for sanitizer, sanitizer_flags in SANITIZERS.items():
        objects = {"dispatch": (kernels / "dispatch.cpp", "")}
        objects["tests"] = (tests / "cpu_kernels.cpp", "-Werror")
        for isa, isa_flags in setup["ISA_FLAGS"].items():
            for name in setup["CPU_SOURCES"]:
                flags = f"-DPFGM_ISA={isa} {isa_flags}"
                objects[f"{name}_{isa}"] = (kernels / f"{name}.cpp", flags)
        for name, (source, flags) in objects.items():
            lines += [f"build {sanitizer}/{name}.o: cxx {source}"]
            lines += [f"  flags = {sanitizer_flags} {flags}"]
        inputs = " ".join(f"{sanitizer}/{name}.o" for name in objects)
        lines += [f"build {sanitizer}/cpu_kernels: link {inputs}\n  flags = {sanitizer_flags}"]
    return "\n".join([*lines, ""])


def main() -> int:
    setup = read_setup()
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text(ninja_file(setup))
    start = time.monotonic()
    if subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", BUILD, "--quiet"]).returncode != 0:
        return 1
    print(f"built in {time.monotonic() - start:.0f} s", flush=True)
    failed = False
    for sanitizer in SANITIZERS:
        start = time.monotonic()
        isas = list(setup["ISA_FLAGS"])
        # How threads share the work does not depend on the instruction set: the first and the last.
        program = [
            BUILD / sanitizer / "cpu_kernels",
            *({isas[0], isas[-1]} if sanitizer == "thread" else isas),
        ]
        status = subprocess.run(program, env=os.environ | OPTIONS).returncode
        failed |= status != 0
        outcome = f"failed with {status}" if status else "passed"
        print(f"{sanitizer}: {outcome} in {time.monotonic() - start:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
