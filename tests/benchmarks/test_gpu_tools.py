# SPDX-License-Identifier: Apache-2.0
"""Are CUDA's tools called as they have to be, and what they say understood, as far as stand-ins for
them can tell?
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import tools
from benchmarks.gpu.results import Results
from benchmarks.gpu.runner import SKIPPED

ROOT = Path(__file__).parents[2]
TOOL = """#!/usr/bin/env bash
# Stands for one of CUDA's tools.
echo "$(basename "$0") $*" >>"$CALLS"
{does}
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which tools are found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "basename", "env", "cat"):
        (folder / tool).symlink_to(str(shutil.which(tool)))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return folder


def install(path: Path, name: str, does: str) -> None:
    (path / name).write_text(TOOL.format(does=does))
    (path / name).chmod(0o755)


def calls(path: Path) -> list[str]:
    return (path.parent / "calls").read_text().splitlines()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.tools", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("stage", "tool"),
    [
        (["build", "90", "."], "nvcc"),
        (["intrinsics", "90", "."], "nvcc"),
        (["memcheck", "."], "compute-sanitizer"),
        (["racecheck", "."], "compute-sanitizer"),
        (["ncu", "gpu.json", "."], "ncu"),
    ],
)
def test_a_tool_that_is_missing_is_told(path: Path, stage: list[str], tool: str) -> None:
    ran = run(*stage)
    assert ran.returncode == SKIPPED, ran.stderr
    assert ran.stdout.splitlines()[-1] == f"{tool} is not installed"


@pytest.mark.parametrize("status", [0, 1])
def test_an_extension_takes_its_place_when_it_is_complete(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """Nobody finds half of one: it is put there by one step."""
    install(path, "nvcc", "")
    tree = tmp_path / "tree"
    (tree / "pfgm_kernels").mkdir(parents=True)
    extension = tree / "pfgm_kernels" / "_C.cpython-312-x86_64-linux-gnu.so"
    extension.write_text("old")
    called = []

    def call(command: list[str], **environment: str) -> int:
        called.append((command[1:], environment))
        made = tmp_path / "lib" / "pfgm_kernels"
        made.mkdir(parents=True)
        (made / extension.name).write_text("new")
        return status

    monkeypatch.setattr(tools, "ROOT", tree)
    monkeypatch.setattr(tools, "call", call)
    assert tools.build("90", str(tmp_path)) == status
    assert extension.read_text() == ("old" if status else "new")
    assert os.listdir(extension.parent) == [extension.name]
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "work")]
    environment = {"PFGM_CUDA": "1", "PFGM_CUDA_ARCHS": "90"}
    assert called == [(["setup.py", "build_ext", *folders], environment)]


def test_the_instructions_are_checked_where_there_is_nvcc(path: Path, tmp_path: Path) -> None:
    program = tmp_path / "device_check"
    made = f"""printf '#!/usr/bin/env bash\\necho all is well\\n' >{program}
    /bin/chmod +x {program}"""
    install(path, "nvcc", made)
    ran = run("intrinsics", "90", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "all is well"
    source = "tests/cuda/emulation/device_check.cu"
    assert calls(path) == [f"nvcc -std=c++17 -arch=sm_90 -o {program} {source}"]
    ran = run("intrinsics", "90", str(tmp_path), "--dry-run")
    assert ran.returncode == SKIPPED
    assert ran.stdout.splitlines()[-1].startswith("it compiles")
    install(path, "nvcc", "exit 2")
    assert run("intrinsics", "90", str(tmp_path), "--dry-run").returncode == 2


SAYS = 'echo "========= {0}" >{1}/memcheck.txt'


@pytest.mark.parametrize(
    ("said", "status", "options", "outcome"),
    [
        ("cuda, d ≤ 32, float, forward  proven", 0, [], 0),
        ("cuda, d ≤ 32, float, forward  FAILED", 1, [], 1),
        ("pfgm: report --check expects a GPU that kernels can run on", 2, ["--dry-run"], SKIPPED),
        ("pfgm: report --check expects a GPU that kernels can run on", 2, [], 2),
        ("No such option: --check", 2, ["--dry-run"], 2),
    ],
)
def test_the_self_check_may_refuse_in_a_dry_run(
    monkeypatch: pytest.MonkeyPatch, said: str, status: int, options: list[str], outcome: int
) -> None:
    def ran(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:] == ["-m", "pfgm_kernels.cli", "report", "--check"]
        return subprocess.CompletedProcess(command, status, said)

    monkeypatch.setattr(subprocess, "run", ran)
    monkeypatch.setattr(sys, "argv", ["tools.py", "check", *options])
    if outcome == SKIPPED:
        with pytest.raises(SystemExit, match=str(SKIPPED)):
            tools.check()
    else:
        assert tools.check() == outcome


CASE = """echo '[{{{{"status": "{0}"}}}}]' >{1}/memcheck.json; """
REFUSES = SAYS.format("Error: Device not supported.", "{0}") + "; exit 1"


@pytest.mark.parametrize(
    ("does", "outcome", "last"),
    [
        (SAYS.format("ERROR SUMMARY: 0 errors", "{0}"), 0, "ERROR SUMMARY: 0 errors"),
        (SAYS.format("ERROR SUMMARY: 7 errors", "{0}") + "; exit 1", 1, "ERROR SUMMARY: 7 errors"),
        (REFUSES, SKIPPED, "compute-sanitizer cannot run here: Device not supported."),
        (CASE.format("failed", "{0}") + REFUSES, SKIPPED, "cannot run here: Device not supported."),
        # It did look at something.
        (CASE.format("right", "{0}") + REFUSES, 1, "Error: Device not supported."),
        # It is the program that fails.
        (
            SAYS.format("Error: process didn't terminate successfully", "{0}") + "; exit 1",
            1,
            "successfully",
        ),
        ("exit 3", 3, "--patience 600"),
    ],
)
def test_the_sanitizer_runs_where_it_can(
    path: Path, tmp_path: Path, does: str, outcome: int, last: str
) -> None:
    install(path, "compute-sanitizer", does.format(tmp_path))
    ran = run("memcheck", str(tmp_path))
    assert ran.returncode == outcome, ran.stderr
    assert ran.stdout.rstrip().splitlines()[-1].endswith(last)
    general = "--tool memcheck --error-exitcode 1 --report-api-errors no --target-processes all"
    small = "-m benchmarks.gpu.small --backend cuda --runs 1"
    files = [f"{tmp_path}/memcheck.{kind}" for kind in ("txt", "json")]
    assert calls(path) == [
        f"compute-sanitizer {general} --log-file {files[0]} "
        f"{sys.executable} {small} --json {files[1]} --patience 600"
    ]


PAGES = """==PROF== Connected to process 1
  compare_kernel (391, 4, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    DRAM Throughput                   %        45.07
    Duration                         us     1,017.70
    ----------------------- ----------- ------------

    OPT   This kernel grid is too small to fill the available resources on this device, 1
    Section: Launch Statistics
    -------------------------------- --------------- ---------------
    Metric Name                          Metric Unit    Metric Value
    -------------------------------- --------------- ---------------
    Block Size                                                   128
    Function Cache Configuration                     CachePreferNone
    Registers Per Thread             register/thread             168
    -------------------------------- --------------- ---------------
"""
METRICS = {
    "DRAM Throughput": "45.07 %",
    "Duration": "1,017.70 us",
    "Block Size": "128",
    "Registers Per Thread": "168 register/thread",
}


def listed(backend: str, direction: str, **kernels: float) -> dict[str, Any]:
    """Of one of a dry run's cases."""
    shape = {"B": 9, "N": 70, "d": 48, "source": "synthetic"}
    return {
        "what": "kernels",
        "status": "listed",
        "shape": shape,
        "stored": "float32",
        "direction": direction,
        "backend": backend,
        "kernels": [{"name": n, "launches": 1, "seconds": s} for n, s in kernels.items()],
    }


def test_the_heaviest_kernels_are_ours_and_of_each_backend() -> None:
    one = listed("triton", "forward", a_kernel=3.0, b_kernel=2.0, c_kernel=1.0)
    two = listed("triton", "backward", a_kernel=9.0, **{"void at::native::d_kernel<4>()": 99.0})
    names = {"void pfgm::(anonymous namespace)::a_kernel<2>(pfgm::Params)": 8.0, "Memset": 9.0}
    three = listed("cuda", "forward", **names)
    heaviest = tools.heaviest([one, two, three])
    assert [(name, entry["backend"], entry["direction"]) for name, entry in heaviest] == [
        ("a_kernel", "triton", "forward"),
        ("a_kernel", "cuda", "forward"),
        ("b_kernel", "triton", "forward"),
        ("c_kernel", "triton", "forward"),
    ]
    assert len(tools.heaviest([one, three], 2)) == 2


def look(path: Path, does: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """What ncu, which does that, is called for, and the last entry then."""
    folder = path.parent
    results = Results(folder / "gpu.json")
    results.start([listed("cuda", "backward", sum_kernel=2.0)])
    install(path, "ncu", does)
    ran = run("ncu", str(results.path), str(folder), "--dry-run")
    return ran, results.read()[-1]


@pytest.mark.exhaustive
def test_nsight_compute_looks_at_the_heaviest_kernels(path: Path, tmp_path: Path) -> None:
    (tmp_path / "pages").write_text(PAGES)
    log = tmp_path / "ncu-cuda-sum_kernel.txt"
    ran, entry = look(path, f"cat {tmp_path}/pages >{log}")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert entry["what"] == "ncu"
    assert entry["status"] == "listed"
    assert entry["kernel"] == "sum_kernel"
    assert entry["metrics"] == METRICS
    general = "--clock-control none --target-processes all --launch-count 1"
    which = f"--profile-from-start off --set detailed --kernel-name sum_kernel --log-file {log}"
    once = f"{sys.executable} -m benchmarks.gpu.times once --start 3 --dry-run"
    assert calls(path) == [f"ncu {general} {which} {once}"]


@pytest.mark.exhaustive
def test_nsight_compute_that_may_not_look_is_told(path: Path, tmp_path: Path) -> None:
    error = "ERR_NVGPUCTRPERM - The user does not have permission"
    ran, entry = look(path, f'echo "==ERROR== {error}" >{tmp_path}/ncu-cuda-sum_kernel.txt; exit 1')
    assert ran.returncode == SKIPPED
    assert ran.stdout.splitlines()[-1] == f"ncu cannot run here: {error}"
    assert entry["what"] == "kernels"


@pytest.mark.exhaustive
def test_nsight_compute_that_shows_nothing_has_failed(path: Path, tmp_path: Path) -> None:
    error = "The application returned an error code (1)."
    ran, entry = look(path, f'echo "==ERROR== {error}" >{tmp_path}/ncu-cuda-sum_kernel.txt; exit 9')
    assert ran.returncode == 1
    assert (entry["what"], entry["status"], entry["reason"]) == ("ncu", "failed", "exit status 9")
