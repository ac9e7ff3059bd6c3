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

ISAS = list(ISA_FLAGS)
RUN = {"address": ISAS, "thread": [isa for isa in ISAS if isa in (ISAS[0], ISAS[-1])]}
"""Which instruction sets run: how threads share the work does not depend on them."""
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
    """Per sanitizer, every source as it is built, and the program that runs them, from BUILD. What
    is but linked is compiled as fast as can be, and linked last: it is not to stand for the rest.
    """
    flags = f"{FLAGS} -g1 -Wno-maybe-uninitialized -DPFGM_POISON"
    lines = [f"rule cxx\n  command = {quoted(cxx())} {flags} {COMPILE}"]
    lines += [f"rule link\n  command = {quoted(cxx())} -fopenmp $flags $in -o $out"]
    for sanitizer, extra in SANITIZERS.items():
        runs, sanitizer_flags = RUN[sanitizer], f"-O1 {extra}"
        objects = {"dispatch": ("csrc/cpu/dispatch.cpp", sanitizer_flags)}
        objects["tests"] = ("tests/cpu/cpp/cpu_kernels.cpp", f"{sanitizer_flags} -Werror")
        for isa in sorted(ISAS, key=lambda isa: isa not in runs):
            how = sanitizer_flags if isa in runs else "-O0"
            flags = f"{how} -DPFGM_ISA={isa} {ISA_FLAGS[isa]}"
            for name in CPU_SOURCES:
                objects[f"{name}_{isa}"] = (f"csrc/cpu/{name}.cpp", flags)
        for name, (source, flags) in objects.items():
            lines += [f"build {sanitizer}/{name}.o: cxx ../../{source}", f"  flags = {flags}"]
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
        program = [BUILD / sanitizer / "cpu_kernels", *RUN[sanitizer]]
        status = subprocess.run(program, env=os.environ | OPTIONS).returncode
        failed |= status != 0
        outcome = f"failed with {status}" if status else "passed"
        print(f"{sanitizer}: {outcome} in {time.monotonic() - start:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
