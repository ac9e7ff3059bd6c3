# SPDX-License-Identifier: Apache-2.0
"""Builds pfgm_kernels._C with ninja. torch is not needed to build, a GPU is not either.

PFGM_CUDA=0 leaves the CUDA part out, PFGM_CUDA=1 insists on it; otherwise nvcc decides.
PFGM_CUDA_ARCHS lists the architectures, "80;90;100;120" by default (those that nvcc knows).
"""

import os
import shutil
import sysconfig
from pathlib import Path
from subprocess import check_call, check_output

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path(__file__).parent.resolve() / "csrc"
CXX = os.environ.get("CXX", "g++")
FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -fopenmp -fno-math-errno -Wall -Wextra -Wno-psabi"
CUDA_FLAGS = "-std=c++17 -O3 --threads 2 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
CPU = SOURCES / "cpu"
CPU_SOURCES = sorted({str(f.relative_to(CPU))[:-4] for f in CPU.rglob("*.cpp")} - {"dispatch"})
AVX512 = "-mavx512f -mavx512dq -mavx512vl -mfma"
X86 = {"avx2": "-mavx2 -mfma", "avx512": AVX512, "avx512vnni": f"{AVX512} -mavx512bw -mavx512vnni"}
ISA_FLAGS = {"portable": "", **(X86 if os.uname().machine == "x86_64" else {})}


def find_nvcc() -> str | None:
    if (wanted := os.environ.get("PFGM_CUDA")) == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if wanted == "1" and nvcc is None:
        raise SystemExit("PFGM_CUDA=1 asks for CUDA, but nvcc is not on PATH nor in CUDA_HOME/bin")
    return nvcc


def cuda_archs(nvcc: str) -> list[str]:
    known = check_output([nvcc, "--list-gpu-arch"], text=True).split()
    default = ";".join(arch for arch in ("80", "90", "100", "120") if f"compute_{arch}" in known)
    return (os.environ.get("PFGM_CUDA_ARCHS") or default).replace(",", ";").split(";")


def ninja_file(output: Path) -> str:
    edges = {"dispatch.o": ("cxx", "cpu/dispatch.cpp", "-O2")}  # object: (rule, source, flags)
    nvcc, link, defines = find_nvcc(), f"{CXX} -shared -fopenmp", ""
    if nvcc:
        archs = cuda_archs(nvcc)
        version = check_output([nvcc, "--version"], text=True).split("release ")[1].split(",")[0]
        code = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
        code += [f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"]  # PTX
        for file in sorted((SOURCES / "cuda").glob("*.cu")):
            edges[f"{file.stem}_cuda.o"] = ("nvcc", f"cuda/{file.name}", " ".join(code))
        defines = f"-DPFGM_CUDA_VERSION='\"{version}\"' -DPFGM_CUDA_ARCHS='\"{';'.join(archs)}\"'"
        link = f"{nvcc} -shared -cudart static -Xcompiler -fopenmp"
    for isa, flags in ISA_FLAGS.items():
        for name in CPU_SOURCES:
            edges[f"{name}_{isa}.o"] = ("cxx", f"cpu/{name}.cpp", f"-O3 -DPFGM_ISA={isa} {flags}")
    include = f"-O1 -I{pybind11.get_include()} -I{sysconfig.get_path('include')} {defines}"
    edges["bindings.o"] = ("cxx", "bindings.cpp", include)
    compile_ = "$flags -MD -MF $out.d -c $in -o $out\n  deps = gcc\n  depfile = $out.d"
    rules = {"cxx": f"{CXX} {FLAGS} {compile_}", "nvcc": f"{nvcc} {CUDA_FLAGS} {compile_}"}
    rules["link"] = f"{link} $in -o $out"
    lines = [f"rule {name}\n  command = {command}" for name, command in rules.items()]
    for target, (rule, source, flags) in edges.items():
        lines += [f"build {target}: {rule} {SOURCES / source}\n  flags = {flags}"]
    return "\n".join([*lines, f"build {output}: link {' '.join(edges)}", ""])


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output, work = Path(self.get_ext_fullpath(ext.name)).resolve(), Path(self.build_temp)
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(ninja_file(output))
        check_call([Path(ninja.BIN_DIR) / "ninja", "-C", work])


setup(ext_modules=[Extension("pfgm_kernels._C", [])], cmdclass={"build_ext": NinjaBuild})
