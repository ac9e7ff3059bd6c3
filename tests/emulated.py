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

FLAGS = "-std=c++17 -O2 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno".split()
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
KINDS = {
    "plain": [],
    "races": ["-DPFGM_RACES"],
    "address": ["-fsanitize=address", "-fno-omit-frame-pointer"],
}
RACES = ["-fsanitize=thread"]  # the kernels alone: races.cpp stands in for the sanitizer's library


def sources_of_kernels() -> list[Path]:
    return [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), EMULATION / "module.cpp"]


def _digest(text: str, sources: Sequence[Path]) -> str:
    """Of everything that a build may depend on."""
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.cuh")]
    files = sorted({*headers, *EMULATION.iterdir(), *sources})
    content = b"".join(str(f).encode() + f.read_bytes() for f in files if f.is_file())
    return hashlib.sha256(text.encode() + content).hexdigest()[:16]


def _compile(source: Path, output: Path, flags: list[str]) -> None:
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-x", "c++", "-c", str(source), "-o", str(output), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


@functools.cache
def library(kind: str = "plain", name: str = "kernels", sources: tuple[Path, ...] = ()) -> Path:
    """The shared library of the sources (by default all kernels), built where it is not there."""
    import pybind11

    sources = sources or tuple(sources_of_kernels())
    flags = [*FLAGS, *WARNINGS, *KINDS[kind], f"-DPFGM_MODULE={name}", f"-I{EMULATION}"]
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    flags += [option for path in includes for option in ("-isystem", path)]
    folder = BUILD / f"{name}-{kind}-{_digest(' '.join(flags), sources)}"
    output = folder / f"{name}.so"
    if output.exists():
        return output
    work = folder.with_suffix(f".{os.getpid()}")
    work.mkdir(parents=True, exist_ok=True)
    jobs = {}
    for source in (*sources, *EMULATION.glob("*.cpp")):
        if source.name == "module.cpp" and source not in sources:
            continue
        instrumented = kind == "races" and source.suffix == ".cu"
        jobs[source] = (work / f"{source.name}.o", [*flags, *(RACES if instrumented else [])])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda item: _compile(item[0], *item[1]), jobs.items()))
    link = [os.environ.get("CXX", "g++"), "-shared", *KINDS[kind], "-o", str(work / output.name)]
    subprocess.run([*link, *(str(target) for target, _ in jobs.values())], check=True)
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
    assert spec is not None and spec.loader is not None
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
    compiler = os.environ.get("CXX", "g++")
    runtime = subprocess.check_output([compiler, "-print-file-name=libasan.so"], text=True).strip()
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    return {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": options}
