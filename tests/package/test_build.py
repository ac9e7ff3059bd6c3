# SPDX-License-Identifier: Apache-2.0
"""Does it build in any folder, from a source distribution, and say why where it does not?"""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ninja
import ninja_build
import pytest
import setuptools

ROOT = Path(__file__).parents[2]
ODD = "a $x é:'\"#%&;*\nb"
"""A folder's name with all that ninja, make, a shell, a compiler or a URL may take for its own."""

COMPILER = """#!/bin/sh
# Stands for a compiler: reads its input, makes its output and a list of dependencies.
echo "$0 $*" >> "$LOG"
while [ $# -gt 0 ]; do
  case "$1" in
    -o) out=$2; shift ;;
    -MF) deps=$2; shift ;;
    --threads|-cudart) shift ;;
    -ccbin) [ -e "$2" ] || exit 1; echo "host $(readlink -f "$2")" >> "$LOG"; shift ;;
    -I*) [ -e "${1#-I}" ] || exit 1 ;;
    -*|arch=*) ;;
    *) [ -e "$1" ] || exit 1 ;;
  esac
  shift
done
echo built > "$out"
[ -z "$deps" ] || echo "$out:" > "$deps"
"""
NVCC = """#!/bin/sh
# Of a CUDA that knows nothing beyond compute_90.
[ "$1" = --version ] && echo "Cuda compilation tools, release 12.4, V12.4.1" && exit
[ "$1" = --list-gpu-arch ] && echo "compute_75 compute_80 compute_90" && exit
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def project_files() -> list[Path]:
    """What git knows of, or all that is no output where the project came without git."""
    command = ["git", "ls-files", "-z"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        names = subprocess.check_output(command, cwd=ROOT, text=True).strip("\0").split("\0")
        return [Path(name) for name in names if (ROOT / name).exists()]
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    files = (file.relative_to(ROOT) for file in ROOT.rglob("*") if file.is_file())
    return [f for f in files if not any(Path(p).match(i) for p in f.parts for i in ignored)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the project in an odd folder."""
    folder = tmp_path / ODD
    for file in project_files():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The compiler that CXX names stands in an odd folder; there is no other, and no nvcc."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PFGM", "CUDA", "NVCC"))}
    cxx = executable(tmp_path / "of $é '1'" / "c++", COMPILER)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ninja").symlink_to(Path(ninja.BIN_DIR, "ninja"))
    for tool in ("readlink", "sh"):
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    paths = {"PATH": str(tmp_path / "bin"), "CUDA_HOME": str(tmp_path), "CXX": str(cxx)}
    return {**kept, **paths, "LOG": str(tmp_path / "log")}


def build(tree: Path, what: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """As pip does it, where ninja may be on PATH alone: `what` is wheel, editable or sdist."""
    code = "import ninja; from setuptools import build_meta; ninja.BIN_DIR = ''\n"
    code += f"build_meta.build_{what}('dist')"
    pipe, merged = subprocess.PIPE, subprocess.STDOUT
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=tree, env=environment, text=True, stdout=pipe, stderr=merged, timeout=60
    )


def last_line(run: subprocess.CompletedProcess[str]) -> str:
    assert run.returncode != 0
    return run.stdout.strip().splitlines()[-1]


def test_setup_is_short_and_does_not_need_torch() -> None:
    source = (ROOT / "setup.py").read_text()
    assert len(source.splitlines()) <= 80
    imported = set()
    for text in (source, Path(ninja_build.__file__).read_text()):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).split(".")[0])
    assert imported <= {*sys.stdlib_module_names, "ninja", "ninja_build", "pybind11", "setuptools"}


@pytest.mark.parametrize("cuda", [False, True])
def test_any_folder(cuda: bool, tree: Path, environment: dict[str, str], tmp_path: Path) -> None:
    if cuda:
        executable(tmp_path / "bin" / "nvcc", NVCC + COMPILER)
    run = build(tree, "editable", environment)
    assert run.returncode == 0, run.stdout
    (extension,) = (tree / "pfgm_kernels").glob("_C.*.so")
    assert extension.read_text() == "built\n"
    log = (tmp_path / "log").read_text()
    compiled = set(re.findall(r" -c csrc/(\S+) ", log))
    of_cuda = {file for file in compiled if file.startswith("cuda/")}
    assert of_cuda == {f"cuda/{f.name}" for f in (ROOT / "csrc/cuda").glob("*.cu") if cuda}
    cpu = {str(f.relative_to(ROOT / "csrc")) for f in (ROOT / "csrc").rglob("*.cpp")}
    assert compiled - of_cuda == cpu


def test_a_source_distribution_holds_the_project_and_gives_a_wheel(
    tree: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    files = {str(f.relative_to(tree)) for f in tree.rglob("*") if f.is_file()}
    run = build(tree, "sdist", environment)
    assert run.returncode == 0, run.stdout
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        assert files <= names
        assert not [name for name in names if name.endswith((".pyc", ".so", ".log"))]
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    run = build(unpacked, "wheel", environment)
    assert run.returncode == 0, run.stdout
    assert "Deprecat" not in run.stdout
    (wheel,) = (unpacked / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        package = {name for name in names if name.startswith("pfgm_kernels/")}
        (extension,) = (name for name in package if name.endswith(".so"))
        assert package - {extension} == {f for f in files if f.startswith("pfgm_kernels/")}
        metadata = packed.read("pfgm_kernels-0.1.0.dist-info/METADATA").decode()
    assert "\nLicense: Apache-2.0\n" in metadata
    assert [name for name in names if name.endswith("/LICENSE")]


def test_nothing_in_pyproject_is_news_to_setuptools_64() -> None:
    tomllib = pytest.importorskip("tomllib")
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "setuptools>=64" in content["build-system"]["requires"]
    known = {"name", "version", "description", "readme", "requires-python", "dependencies"}
    known |= {"classifiers", "scripts", "optional-dependencies", "dynamic"}
    assert content["project"].keys() <= known


@pytest.mark.parametrize("launcher", ["", "ccache"])
def test_the_compiler_is_that_of_nvcc_too(
    launcher: str, tree: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    executable(tmp_path / "bin" / "nvcc", NVCC + COMPILER)
    cxx = environment["CXX"]
    if launcher:
        executable(tmp_path / "bin" / launcher, '#!/bin/sh\nexec "$@"\n')
        cxx = str(executable(tmp_path / "c++-12", COMPILER))
        environment["CXX"] = f"{launcher} {cxx}"
    run = build(tree, "editable", environment)
    assert run.returncode == 0, run.stdout
    log = (tmp_path / "log").read_text().splitlines()
    hosts = [line for line in log if line.startswith("host ")]
    assert hosts == (len(list((ROOT / "csrc/cuda").glob("*.cu"))) + 1) * [f"host {cxx}"]


BROKEN = {
    "it does not compile": NVCC + "echo 'no such instruction' >&2\nexit 1\n",
    "it is of another CUDA": "#!/bin/sh\necho 'Unknown option' >&2\nexit 1\n",
    "it is of another processor": "\0",
}


@pytest.mark.parametrize("how", BROKEN)
def test_an_nvcc_that_fails_ends_with_the_way_round_it(
    how: str, tree: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    nvcc = executable(tmp_path / "bin" / "nvcc", BROKEN[how])
    line = last_line(build(tree, "editable", environment))
    assert line.endswith(f" and {nvcc}: PFGM_CUDA=0 leaves the CUDA part out")
    assert build(tree, "editable", {**environment, "PFGM_CUDA": "0"}).returncode == 0


@pytest.mark.parametrize("cxx", ["", "no-such-compiler", "/no/such/compiler -m64"])
def test_a_missing_compiler_is_one_sentence(
    cxx: str, tree: Path, environment: dict[str, str]
) -> None:
    run = build(tree, "editable", {**environment, "CXX": cxx})
    name = repr((cxx or "g++").split()[0])
    assert last_line(run).startswith(f"pfgm_kernels needs a C++ compiler, and {name} is not found")
    assert "Traceback" not in run.stdout
    assert len(run.stdout.splitlines()) < 40


def test_a_compiler_that_fails_is_named_last(
    tree: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    cxx = executable(tmp_path / "old", "#!/bin/sh\necho unknown option >&2\nexit 1\n")
    run = build(tree, "editable", {**environment, "CXX": str(cxx)})
    assert last_line(run) == f"pfgm_kernels could not be built with {cxx}"


def test_cuda_can_be_insisted_on(tree: Path, environment: dict[str, str]) -> None:
    line = last_line(build(tree, "editable", {**environment, "PFGM_CUDA": "1"}))
    assert re.match(r"PFGM_CUDA=1 .* nvcc is not on PATH", line)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines, with nothing built and no variable of the environment set."""
    for name in ("PFGM_CUDA", "PFGM_CUDA_ARCHS", "CUDA_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_an_empty_variable_is_not_set(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> list[Any]:
        return [script["find_nvcc"](), script["cuda_archs"](nvcc), ninja_build.cxx()]

    nvcc = str(executable(tmp_path / "nvcc", NVCC))
    monkeypatch.setenv("PATH", str(tmp_path))
    unset = found()
    assert unset == [nvcc, ["80", "90"], ["g++"]]
    for name in ("PFGM_CUDA", "PFGM_CUDA_ARCHS", "CUDA_HOME", "CXX"):
        monkeypatch.setenv(name, "")
    assert found() == unset


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_instruction_sets_are_those_of_the_processor(
    machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine))
    build = runpy.run_path(str(ROOT / "csrc" / "ninja_build.py"))
    text = build["ninja_file"]("_C.so")
    assert ("-mavx" in text) == (machine == "x86_64")
    isas = set(re.findall(r"-DPFGM_ISA=(\w+)", text))
    dispatched = (ROOT / "csrc/cpu/dispatch.cpp").read_text().split("namespace pfgm")[0]
    if machine != "x86_64":
        dispatched = re.sub(r"(?s)#if defined\(__x86_64__\).*?#endif", "", dispatched)
    assert isas == set(re.findall(r"PFGM_DECLARE_KERNELS\((\w+)\)", dispatched))


@pytest.mark.parametrize("wanted", ["90", "75,80;90", " 80 90;"])
def test_architectures(
    wanted: str, script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PFGM_CUDA_ARCHS", wanted)
    archs = script["cuda_archs"](str(executable(tmp_path / "nvcc", NVCC)))
    assert archs == re.findall(r"\d+", wanted)
    text = ninja_build.ninja_file("_C.so", ["an nvcc"], "12.4", archs)
    lines = [line for line in text.splitlines() if "-gencode" in line]
    assert len(lines) == len(list(ROOT.glob("csrc/cuda/*.cu")))
    assert len(set(lines)) == 1
    code = [word for word in lines[0].split() if word.startswith("arch=")]
    ptx = f"arch=compute_{archs[-1]},code=compute_{archs[-1]}"
    assert code == [*(f"arch=compute_{a},code=sm_{a}" for a in archs), ptx]
    assert f"'-DPFGM_CUDA_ARCHS=\"{';'.join(archs)}\"'" in text
    assert "'-DPFGM_CUDA_VERSION=\"12.4\"'" in text
    assert "command = 'an nvcc' -shared -cudart static" in text
