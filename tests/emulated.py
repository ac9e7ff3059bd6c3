# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on the CPU: csrc/cuda compiled by a C++ compiler for tests/emulation."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
EMULATION = ROOT / "tests" / "emulation"
BUILD = ROOT / "build" / "emulation"

COMPILER = os.environ.get("CXX", "g++")
EMULATOR = [EMULATION / f"{part}.cpp" for part in ("emulator", "schedule", "races")]
PROGRAMS = (EMULATION / "programs.cu", EMULATION / "programs_module.cpp")

FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno"]
KINDS = ("plain", "races", "address")


def sources_of_kernels() -> list[Path]:
    return [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), EMULATION / "module.cpp"]


def _digest(text: str, sources: Sequence[Path]) -> str:
    """Of everything that a build may depend on."""
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.cuh")]
    files = sorted({*headers, *EMULATION.iterdir(), *sources})
    content = b"".join(str(f).encode() + f.read_bytes() for f in files if f.is_file())
    return hashlib.sha256(text.encode() + content).hexdigest()[:16]


def _flags(source: Path, kind: str) -> list[str]:
    """What the kind adds for one source. races.cpp takes the place of ThreadSanitizer's library."""
    if kind == "races":
        return ["-DPFGM_RACES", *(["-fsanitize=thread"] if source.suffix == ".cu" else [])]
    watched = kind == "address" and not source.name.endswith("module.cpp")
    return ["-fsanitize=address", "-fno-omit-frame-pointer"] if watched else []


def _compile(source: Path, output: Path, flags: list[str]) -> None:
    command = [COMPILER, "-x", "c++", "-c", str(source), "-o", str(output), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


@functools.cache
def library(kind: str = "plain", name: str = "kernels", sources: tuple[Path, ...] = ()) -> Path:
    """The shared library of the sources (by default all kernels), built where it is not there."""
    import pybind11

    sources = sources or tuple(sources_of_kernels())
    flags = [*FLAGS, f"-DPFGM_MODULE={name}", f"-I{EMULATION}"]
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    flags += [option for path in includes for option in ("-isystem", path)]
    folder = BUILD / f"{name}-{kind}-{_digest(' '.join(flags), sources)}"
    output = folder / f"{name}.so"
    if output.exists():
        return output
    work = folder.with_suffix(f".{os.getpid()}")
    work.mkdir(parents=True, exist_ok=True)
    objects = {source: work / f"{source.name}.o" for source in (*sources, *EMULATOR)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = [
            pool.submit(_compile, source, target, [*flags, *_flags(source, kind)])
            for source, target in objects.items()
        ]
    for task in tasks:
        task.result()
    link = [COMPILER, "-shared", *(["-fsanitize=address"] if kind == "address" else [])]
    subprocess.run([*link, "-o", str(work / output.name), *map(str, objects.values())], check=True)
    for old in BUILD.glob(f"{name}-{kind}-{'?' * 16}"):
        if time.time() - old.stat().st_mtime > 3600:  # another process may be about to load it
            shutil.rmtree(old, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        work.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(work)
    return output


@functools.cache
def build(kind: str = "plain", name: str = "kernels", sources: tuple[Path, ...] = ()) -> ModuleType:
    """The kernels as a module. "address" wants AddressSanitizer's library loaded first, as
    `address_environment` does for a process of its own.
    """
    path = library(kind, name, sources)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_LOCAL)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.setdlopenflags(flags)
    return module


def address_environment() -> dict[str, str]:
    """What a Python needs that loads the kind "address"."""
    # The sanitizer looks for the function that throws when it starts: the C++ library comes along.
    queries = [[COMPILER, f"-print-file-name=lib{name}.so"] for name in ("asan", "stdc++")]
    runtime = " ".join(subprocess.check_output(query, text=True).strip() for query in queries)
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    return {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": options}
