# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on the CPU: csrc/cuda compiled by a C++ compiler for the folder emulation.

python tests/cuda/emulated.py KIND [ARGUMENT ...] runs pytest with the kernels so built, as backend
"cuda" on CPU tensors: "plain"; "races", which finds what no barrier orders; "address", where the
tensors' ends are guarded. Each test runs under one of SCHEDULES and, see tensor_core.py, of CORES.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "csrc"))
from ninja_build import cxx

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "emulation"
BUILD = ROOT / "build" / "emulation"

EMULATOR = [EMULATION / f"{part}.cpp" for part in ("emulator", "schedule", "races")]
PROGRAMS = (EMULATION / "programs.cu", EMULATION / "programs_module.cpp", *EMULATOR)

FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno"]
KINDS = ("plain", "races", "address")
ENTRIES = (
    "field_forward_cuda",
    "field_backward_cuda",
    "prepare_references_cuda",
    "field_finish_cuda",
    "field_begin_cuda",
)

SCHEDULES = tuple((order, late) for order in ("forward", "reverse", "greedy") for late in (0, 1))
"""In which order threads run, and whether asynchronous copies come as late as they may."""


def sources_of_kernels(root: Path = ROOT) -> list[Path]:
    module = root / EMULATION.relative_to(ROOT) / "module.cpp"
    return [*sorted((root / "csrc" / "cuda").glob("*.cu")), module]


def _digest(text: str, sources: Sequence[Path]) -> str:
    """Of everything that a build may depend on."""
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.cuh")]
    files = sorted({*headers, *EMULATION.iterdir(), *sources})
    content = b"".join(os.fsencode(f) + f.read_bytes() for f in files if f.is_file())
    return hashlib.sha256(text.encode() + content).hexdigest()[:16]


def flags(name: str, kind: str) -> list[str]:
    """For all sources of the module of that name."""
    import pybind11

    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    system = [option for path in includes for option in ("-isystem", path)]
    return [*FLAGS, f"-DPFGM_MODULE={name}_{kind}", f"-I{EMULATION}", *system]


def flags_of(source: Path, kind: str) -> list[str]:
    """What the kind adds for one source. races.cpp takes the place of ThreadSanitizer's library."""
    if source.name.endswith("module.cpp"):
        return ["-O0"]  # Python's part
    if kind == "races":
        return ["-DPFGM_RACES", *(["-fsanitize=thread"] if source.suffix == ".cu" else [])]
    return ["-fsanitize=address", "-fno-omit-frame-pointer"] if kind == "address" else []


def compile_source(source: Path, output: Path, flags: list[str]) -> None:
    command = [*cxx(), "-x", "c++", "-c", str(source), "-o", str(output), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


def link(objects: Iterable[Path], output: Path, kind: str) -> None:
    sanitizer = ["-fsanitize=address"] if kind == "address" else []
    command = [*cxx(), "-shared", *sanitizer, "-o", str(output), *map(str, objects)]
    subprocess.run(command, check=True)


@functools.cache
def library(kind: str = "plain", name: str = "kernels", sources: tuple[Path, ...] = ()) -> Path:
    """The shared library of the sources (by default all kernels), built where it is not there."""
    sources = sources or (*sources_of_kernels(), *EMULATOR)
    common = flags(name, kind)
    folder = BUILD / f"{name}-{kind}-{_digest(' '.join(common), sources)}"
    output = folder / f"{name}_{kind}.so"
    if output.exists():
        return output
    work = folder.with_suffix(f".{os.getpid()}")
    work.mkdir(parents=True, exist_ok=True)
    objects = {source: work / f"{source.name}.o" for source in sources}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = [
            pool.submit(compile_source, source, target, [*common, *flags_of(source, kind)])
            for source, target in objects.items()
        ]
    for task in tasks:
        task.result()
    link(objects.values(), work / output.name, kind)
    for old in BUILD.glob(f"{name}-{kind}-{'?' * 16}"):
        if time.time() - old.stat().st_mtime > 3600:  # another process may be about to load it
            shutil.rmtree(old, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        work.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(work)
    return output


def tensor_core_library() -> Path:
    """tensor_core.cpp, for kernels that are interpreted."""
    return library("plain", "tensor_core", (EMULATION / "tensor_core.cpp",))


@functools.cache
def build(kind: str = "plain", name: str = "kernels", sources: tuple[Path, ...] = ()) -> ModuleType:
    """The kernels as a module. "address" wants AddressSanitizer's library loaded first, as
    `address_environment` does for a process of its own.
    """
    return load(library(kind, name, sources))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def address_environment() -> dict[str, str]:
    """What a Python needs that loads the kind "address"."""
    # The sanitizer looks for the function that throws when it starts: the C++ library comes along.
    queries = [[*cxx(), f"-print-file-name=lib{name}.so"] for name in ("asan", "stdc++")]
    runtime = " ".join(subprocess.check_output(query, text=True).strip() for query in queries)
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    return {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": options}


class Extension:
    """pfgm_kernels._C with the entry points of the emulated kernels."""

    def __init__(self, extension: object, kernels: ModuleType) -> None:
        self._extension, self._kernels = extension, kernels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels if name in ENTRIES else self._extension, name)


def install(kernels: ModuleType) -> None:
    """Lets the backend "cuda" compute on CPU tensors, with the kernels that `build` returned."""
    from pfgm_kernels.backends import _native, cuda

    def unsupported_reason(device: torch.device | None = None) -> str | None:
        on_cpu = device is None or device.type == "cpu"
        return None if on_cpu else f"it is emulated on the CPU, got {device}"

    setattr(_native, "_C", Extension(getattr(_native, "_C", None), kernels))  # noqa: B010
    cuda.unsupported_reason = unsupported_reason


def set_up(kernels: ModuleType, test: str, core: tuple[int, int]) -> None:
    """One of the schedules for a test, always the same one; and how tensor cores sum."""
    seed = zlib.crc32(test.encode())
    order, late = SCHEDULES[seed % len(SCHEDULES)]
    kernels.set_schedule(order, seed, bool(late))
    kernels.set_tensor_core(*core)


def kernels_that_did_not_run(kernels: ModuleType) -> list[str]:
    """Their names and template arguments."""
    table = subprocess.check_output(["nm", "-C", str(kernels.__file__)], text=True)
    table = table.replace("pfgm::(anonymous namespace)::", "")
    found = re.findall(r"^(\w+) [tT] (?:void )?(\w+_kernel(?:<.*>)?)\(", table, re.MULTILINE)
    ran = kernels.launches()
    return sorted(name for offset, name in found if int(offset, 16) not in ran)


def main(kind: str, arguments: list[str]) -> int:
    if kind not in KINDS:
        raise SystemExit(f"{kind!r} is none of {', '.join(KINDS)}")
    library(kind)  # once, before pytest's workers would
    environment = address_environment() if kind == "address" else dict(os.environ)
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.call(command, env={**environment, "PFGM_EMULATION": kind})


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
