# SPDX-License-Identifier: Apache-2.0
"""Does gpu.sh run what it says, without a GPU too, and leave one JSON and one archive?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import stages
from benchmarks.gpu.results import Results
from benchmarks.gpu.runner import Stage
from benchmarks.gpu.stages import Site, first, second

ROOT = Path(__file__).parents[2]
STAGES = ["build", "fill", "intrinsics", "check", "small", "time", "kernels", "tests", "memcheck"]
H200 = {"what": "machine", "capability": "9.0", "status": "listed"}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "out").mkdir()
    return Site(tmp_path / "out", tmp_path / "work", dry_run=False)


def ended(call: str, stage: str, status: str, **more: Any) -> dict[str, Any]:
    return {"what": "stage", "call": call, "stage": stage, "status": status, **more}


def played(site: Site, call: str, waves: Any, machine: str = "passed") -> list[list[Stage]]:
    """The waves of a call of which the first stage finds an H200, or ends as it is told."""
    found = []
    for wave in waves:
        found.append(wave)
        if wave[0].name == "machine":
            site.results.append(H200, ended(call, "machine", machine))
    return found


def names(waves: list[list[Stage]]) -> list[list[str]]:
    return [[stage.name for stage in wave] for wave in waves]


def test_the_first_call_goes_by_worth(site: Site) -> None:
    site.results.start([ended("first", "machine", "failed")])  # of a call before
    waves = played(site, "first", first(site))
    assert names(waves) == [
        ["machine"],
        ["build", "fill", "intrinsics"],
        *[[name] for name in ("check", "small", "time", "kernels")],
        ["tests", "memcheck"],
    ]
    by_name = {stage.name: stage for wave in waves for stage in wave}
    command = [sys.executable, "-m", "benchmarks.gpu.tools", "build", "90", str(site.work)]
    assert by_name["build"].command == command
    assert all("--dry-run" not in stage.command for stage in by_name.values())
    assert [e["status"] for e in site.results.read()] == ["listed", "passed"]


def test_without_a_gpu_nothing_else_is_tried(site: Site) -> None:
    for call, waves in (("first", first(site)), ("second", second(site, []))):
        assert names(played(site, call, waves, machine="failed")) == [["machine"]]


def test_the_second_call_repeats_what_failed(site: Site) -> None:
    test = "tests/op/test_mean.py::test_value[triton-a b]"
    before = [
        H200,
        ended("first", "machine", "passed"),
        *[ended("first", name, "passed") for name in ("fill", "check", "kernels")],
        *[ended("first", name, "failed") for name in ("build", "intrinsics")],
        ended("first", "small", "late"),
        ended("first", "time", "interrupted"),
        ended("first", "tests", "failed", failed=[test]),
        ended("first", "memcheck", "skipped"),
        ended("second", "benchmark", "failed"),
        ended("second", "machine", "failed"),
    ]
    waves = played(site, "second", second(site, before))
    repeated = [["intrinsics"], ["small"], ["time"], ["tests"]]
    rest = [["benchmark"], ["ncu"], ["racecheck"]]
    assert names(waves) == [["machine"], ["build", "fill"], *repeated, *rest]
    again = waves[5][0].command
    assert again[-1] == test
    assert "-k" not in again
    assert site.results.read()[: len(before)] == before


def test_nothing_to_repeat_is_no_reason_to_stop(site: Site) -> None:
    waves = played(site, "second", second(site, []))
    assert names(waves)[2:] == [["benchmark"], ["ncu"], ["racecheck"]]


@pytest.mark.parametrize("found", [["a::b[c d]"], []])
def test_tests_leave_the_names_of_those_that_failed(site: Site, found: list[str]) -> None:
    stage = stages.run_tests(site)
    assert stage.finish() == {"failed": []}
    left = site.work / "pytest" / "v" / "cache" / "lastfailed"
    left.parent.mkdir(parents=True)
    left.write_text(json.dumps(dict.fromkeys(found, True)))
    assert stage.finish() == {"failed": found}


def test_the_environment_keeps_what_is_needed(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wheels that somebody put into a folder stay; nothing is kept in a home."""
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    found = site.environment
    assert found["PYTHONPATH"] == f"{ROOT}{os.pathsep}/somewhere"
    assert found["TRITON_INTERPRET"] == "0"
    folders = [value for name, value in found.items() if name.endswith(("DIR", "PATH", "HOME"))]
    assert sum(folder.startswith(str(tmp_path)) for folder in folders) == 4


def test_another_folder_of_tests_is_not_taken_for_ours(tmp_path: Path) -> None:
    """Some packages leave theirs among those that are installed."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    code = "import benchmarks.problems as p; print(p.oracle.__file__)"
    command = [sys.executable, "-c", code]
    found = subprocess.check_output(command, env=environment, cwd=ROOT, text=True)
    assert Path(found.strip()) == ROOT / "tests" / "op" / "oracle.py"


def gpu_sh(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "benchmarks" / "gpu.sh")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [script, *arguments],
        env={**clean, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=1800,
    )


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    for file, words in ((other, "is no JSON of gpu.sh"), (tmp_path / "none", "is not there")):
        ran = gpu_sh("--dry-run", "second", str(file), OUT=str(tmp_path / "out"))
        assert ran.returncode == 2
        assert words in ran.stderr


@pytest.mark.exhaustive
def test_without_a_gpu_the_script_says_so(tmp_path: Path) -> None:
    ran = gpu_sh("first", OUT=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert ran.returncode == 1
    assert "needs an NVIDIA GPU" in ran.stdout
    assert sorted(os.listdir(tmp_path)) == ["gpu.json", "gpu.tar.gz"]
    assert [e["stage"] for e in Results(tmp_path / "gpu.json").read()] == ["machine"]


@pytest.mark.exhaustive
def test_a_dry_run_goes_through_all_stages(tmp_path: Path) -> None:
    """On hardware there is no time for a script that fails."""
    ran = gpu_sh("--dry-run", OUT=str(tmp_path))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert sorted(os.listdir(tmp_path)) == ["gpu.json", "gpu.tar.gz"]
    results = Results(tmp_path / "gpu.json")
    found = {(e["call"], e["stage"]): e for e in results.latest("stage")}
    again = ["machine", "build", "fill", "benchmark", "ncu", "racecheck"]
    expected = {*(("first", s) for s in ["machine", *STAGES]), *(("second", s) for s in again)}
    assert set(found) == expected
    may_be_skipped = ("intrinsics", "check", "memcheck", "ncu", "racecheck")
    for (_, name), entry in found.items():
        assert entry["status"] == "passed" or (
            entry["status"] == "skipped" and name in may_be_skipped and entry["reason"]
        ), entry
    assert {e["status"] for e in results.latest("small")} == {"right"}
    times = results.latest("time")
    assert {e["status"] for e in times} == {"timed"}
    assert {(e["backend"], e["stored"], e["direction"]) for e in times} == {
        (backend, stored, direction)
        for backend in ("triton", "cuda")
        for stored in ("float32", "uint8")
        for direction in ("forward", "backward")
    }
    assert len(results.latest("kernels")) == len(times)
    races = {e["provider"]: e["status"] for e in results.latest("race")}
    assert races["float32 composite"] == races["pfgm_kernels cpu, tensor"] == "timed"
    with tarfile.open(tmp_path / "gpu.tar.gz") as archive:
        files = archive.getnames()
    assert {f"gpu/{call}-{stage}.log" for call, stage in expected} <= set(files)
    assert {"gpu/gpu.json", "gpu/table.txt"} <= set(files)
