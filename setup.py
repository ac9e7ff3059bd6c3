# SPDX-License-Identifier: Apache-2.0
"""Builds pfgm_kernels._C with ninja. torch is not needed to build, a GPU is not either.

CXX is the C++ compiler, nvcc's too; "g++" by default.
PFGM_CUDA=0 leaves the CUDA part out, PFGM_CUDA=1 insists on it; otherwise nvcc decides.
PFGM_CUDA_ARCHS lists the architectures, "80;90;100;120" by default (those that nvcc knows).
"""

import os
import re
import shutil
import sys
from pathlib import Path
from subprocess import CalledProcessError, check_call, check_output

import ninja
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
from ninja_build import cxx, find_compiler, prepare


def find_nvcc() -> str | None:
    if (wanted := os.environ.get("PFGM_CUDA")) == "0":
        return None
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if wanted == "1" and nvcc is None:
        raise SystemExit("PFGM_CUDA=1 asks for CUDA, but nvcc is not on PATH nor in CUDA_HOME/bin")
    return nvcc


def cuda_archs(nvcc: str) -> list[str]:
    known = check_output([nvcc, "--list-gpu-arch"], text=True).split()
    wanted = re.findall(r"[^\s,;]+", os.environ.get("PFGM_CUDA_ARCHS") or "")
    return wanted or [a for a in ("80", "90", "100", "120") if f"compute_{a}" in known]


def cuda_version(nvcc: str) -> str:
    return check_output([nvcc, "--version"], text=True).split("release ")[-1].split(",")[0]


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output, work = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp)
        compiler, nvcc = find_compiler(), find_nvcc()
        try:
            host = ["-ccbin", f"./{compiler.name}"] if os.environ.get("CXX") else []
            cuda = ([nvcc, *host], cuda_version(nvcc), cuda_archs(nvcc)) if nvcc else ()
            prepare(work, output, *cuda)
            check_call([str(Path(ninja.BIN_DIR, "ninja")), "-C", str(work)])
        except (CalledProcessError, OSError) as error:
            hint = f" and {nvcc}: PFGM_CUDA=0 leaves the CUDA part out" if nvcc else ""
            message = f"pfgm_kernels could not be built with {' '.join(cxx())}{hint}"
            raise SystemExit(f"{error}\n{message}") from error


# In pyproject.toml the form of the license depends on the version of setuptools.
setup(
    license="Apache-2.0",
    ext_modules=[Extension("pfgm_kernels._C", [])],
    cmdclass={"build_ext": NinjaBuild},
)
