# SPDX-License-Identifier: Apache-2.0
"""Do the CPU kernels stay clear of memory errors, undefined behaviour and data races?

python tests/cpu/sanitize.py builds them with the sanitizers, together with cpp/cpu_kernels.cpp,
which runs and checks them with every instruction set that this processor has. What is built, and
for which instruction sets, is what csrc/ninja_build.py says.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import ninja

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "csrc"))
from ninja_build import COMPILE, CPU_SOURCES, FLAGS, ISA_FLAGS, cxx, quoted

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


def ninja_file() -> str:
    """Per sanitizer, every source as it is built, and the program that runs them, from BUILD."""
    flags = f"{FLAGS} -O1 -g1 -Wno-maybe-uninitialized -DPFGM_POISON"
    lines = [f"rule cxx\n  command = {quoted(cxx())} {flags} {COMPILE}"]
    lines += [f"rule link\n  command = {quoted(cxx())} -fopenmp $flags $in -o $out"]
    for sanitizer, sanitizer_flags in SANITIZERS.items():
        objects = {"dispatch": ("csrc/cpu/dispatch.cpp", "")}
        objects["tests"] = ("tests/cpu/cpp/cpu_kernels.cpp", "-Werror")
        for isa, isa_flags in ISA_FLAGS.items():
            for name in CPU_SOURCES:
                flags = f"-DPFGM_ISA={isa} {isa_flags}"
                objects[f"{name}_{isa}"] = (f"csrc/cpu/{name}.cpp", flags)
        for name, (source, flags) in objects.items():
            lines += [f"build {sanitizer}/{name}.o: cxx ../../{source}"]
            lines += [f"  flags = {sanitizer_flags} {flags}"]
        inputs = " ".join(f"{sanitizer}/{name}.o" for name in objects)
        lines += [f"build {sanitizer}/cpu_kernels: link {inputs}\n  flags = {sanitizer_flags}"]
    return "\n".join([*lines, ""])


def main() -> int:
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text(ninja_file())
    start = time.monotonic()
    if subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", BUILD, "--quiet"]).returncode != 0:
        return 1
    print(f"built in {time.monotonic() - start:.0f} s", flush=True)
    failed = False
    for sanitizer in SANITIZERS:
        start = time.monotonic()
        isas = list(ISA_FLAGS)
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
