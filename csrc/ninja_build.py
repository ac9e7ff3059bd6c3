# SPDX-License-Identifier: Apache-2.0
"""How the extension is compiled: sources, flags and the folder that ninja works in."""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pybind11

SOURCES = Path(__file__).resolve().parent
CPU = SOURCES / "cpu"
CPU_SOURCES = sorted({str(f.relative_to(CPU))[:-4] for f in CPU.rglob("*.cpp")} - {"dispatch"})
FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -fopenmp -fno-math-errno -Wall -Wextra -Wno-psabi"
CUDA_FLAGS = "-std=c++17 -O3 --threads 2 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
AVX512 = "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma"
X86 = {"avx2": "-mavx2 -mfma", "avx512": AVX512, "avx512vnni": f"{AVX512} -mavx512vnni"}
ISA_FLAGS = {"portable": "", **(X86 if os.uname().machine == "x86_64" else {})}
COMPILE = "$flags -MD -MF $out.d -c $in -o $out\n  deps = gcc\n  depfile = $out.d"


def cxx() -> list[str]:
    """The command that CXX is: a path, or words such as "ccache g++"; "g++" where it is empty."""
    wanted = os.environ.get("CXX") or "g++"
    return [wanted] if shutil.which(wanted) else shlex.split(wanted)


def find_compiler() -> Path:
    """The compiler itself where CXX has one before it, as in "ccache g++"."""
    found = [Path(path).absolute() for word in cxx()[:2] if (path := shutil.which(word))]
    if not found:
        words = "is not found: install one, or let CXX name it"
        raise SystemExit(f"pfgm_kernels needs a C++ compiler, and {cxx()[0]!r} {words}")
    return found[-1]


def quoted(command: Sequence[str]) -> str:
    """For ninja, and for the shell that it starts."""
    return shlex.join(command).replace("$", "$$")


def prepare(work: Path, output: Path, *cuda: Any) -> None:
    """Lets ninja make `output` in the folder `work`; `cuda` are the arguments of `ninja_file`.

    It goes by links to all else. So no path has to be escaped, for which nvcc knows no way.
    """
    compiler = find_compiler()
    links = {compiler.name: compiler, "csrc": SOURCES, "output": output.parent}
    links["pybind11"] = Path(pybind11.get_include())
    links["python"] = Path(sysconfig.get_path("include"))
    for folder in (work, output.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for name, target in links.items():
        (work / name).unlink(missing_ok=True)
        (work / name).symlink_to(target.absolute())
    (work / "build.ninja").write_text(ninja_file(output.name, *cuda))


def ninja_file(
    output: str, nvcc: Sequence[str] = (), cuda_version: str = "", archs: Sequence[str] = ()
) -> str:
    """Without the CUDA part where there is no command `nvcc`."""
    edges = {"dispatch.o": ("cxx", "cpu/dispatch.cpp", "-O2")}  # object: (rule, source, flags)
    link, defines = f"{quoted(cxx())} -shared -fopenmp", ""
    if nvcc:
        code = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
        code += [f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"]  # PTX
        for file in sorted((SOURCES / "cuda").glob("*.cu")):
            edges[f"{file.stem}_cuda.o"] = ("nvcc", f"cuda/{file.name}", " ".join(code))
        names = {"PFGM_CUDA_VERSION": cuda_version, "PFGM_CUDA_ARCHS": ";".join(archs)}
        defines = quoted([f'-D{name}="{value}"' for name, value in names.items()])
        link = f"{quoted(nvcc)} -shared -cudart static -Xcompiler -fopenmp"
    for isa, flags in ISA_FLAGS.items():
        for name in CPU_SOURCES:
            edges[f"{name}_{isa}.o"] = ("cxx", f"cpu/{name}.cpp", f"-O3 -DPFGM_ISA={isa} {flags}")
    edges["bindings.o"] = ("cxx", "bindings.cpp", f"-O1 -Ipybind11 -Ipython {defines}")
    rules = {"cxx": f"{quoted(cxx())} {FLAGS} {COMPILE}", "link": f"{link} $in -o $out"}
    rules["nvcc"] = f"{quoted(nvcc)} {CUDA_FLAGS} {COMPILE}"
    lines = [f"rule {name}\n  command = {command}" for name, command in rules.items()]
    for target, (rule, source, flags) in edges.items():
        lines += [f"build {target}: {rule} csrc/{source}\n  flags = {flags}"]
    return "\n".join([*lines, f"build output/{output}: link {' '.join(edges)}", ""])
