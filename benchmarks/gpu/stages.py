# SPDX-License-Identifier: Apache-2.0
"""The stages of the two calls in the order of worth, and of their dry runs: the same elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.results import BAD, Entry, Results
from benchmarks.gpu.runner import Stage

Wave = Sequence[Stage]

SECONDS = 320
"""Of a call; with what ends late and the archive it stays under 330."""
TESTS = ("tests/op", "tests/triton/test_triton.py", "tests/cuda/test_gpu.py")
TESTS += ("tests/cuda/test_cuda_direct.py", "tests/cuda/test_cuda_two_pass.py")
DRY_RUN_TESTS = ("tests/op/test_singular.py",)
TEST_SECONDS = 60
"""Of one test, where pytest-timeout is there."""
WORKERS = 12
FIRST_WAVE = ("build", "fill", "intrinsics")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
NOT_INTERPRETED = {"TRITON_INTERPRET": "0"}


@dataclass(frozen=True)
class Site:
    """Where a call runs: `out` is for the JSON and the archive, `logs` for what goes into that, and
    `work` for what is built and compiled.
    """

    out: Path
    work: Path
    dry_run: bool

    @property
    def logs(self) -> Path:
        return self.work / "logs"

    @property
    def results(self) -> Results:
        return Results(self.out / "gpu.json")

    @property
    def environment(self) -> dict[str, str]:
        """Whatever is kept is kept in `work`: a home may be small, slow or not for writing."""
        folders = {
            "TRITON_CACHE_DIR": "triton",
            "TORCHINDUCTOR_CACHE_DIR": "inductor",
            "CUDA_CACHE_PATH": "cuda",
            "XDG_CACHE_HOME": "cache",
        }
        found = {name: str(self.work / folder) for name, folder in folders.items()}
        return found | {
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "PYTHONUNBUFFERED": "1",
            "TRITON_INTERPRET": "1" if self.dry_run else "0",
        }

    def stage(
        self, name: str, seconds: float, module: str, *arguments: str, **environment: str
    ) -> Stage:
        dry_run = ["--dry-run"] if self.dry_run else []
        command = [sys.executable, "-m", f"benchmarks.gpu.{module}", *arguments, *dry_run]
        return Stage(name, seconds, command, environment)

    def measurement(self, name: str, seconds: float, module: str, *what: str) -> Stage:
        return self.stage(name, seconds, module, *what, "--json", str(self.results.path))

    def tool(self, name: str, seconds: float, *arguments: str) -> Stage:
        return self.stage(name, seconds, "tools", name, *arguments)

    def arch(self) -> str:
        """ "90": for what chip there is to build."""
        machine = self.results.latest("machine")[-1]
        return str(machine.get("capability", "9.0")).replace(".", "")

    def begin(self) -> Stage:
        return self.measurement("machine", 60, "machine")

    def ready(self) -> bool:
        """Whether there is something to run on."""
        return [e for e in self.results.read() if e["what"] == "stage"][-1]["status"] == "passed"


def by_name(site: Site) -> dict[str, Stage]:
    """Those that a second call may have to run again."""
    work, check = str(site.work), [sys.executable, "-m", "pfgm_kernels.cli", "report", "--check"]
    stages = [
        site.tool("build", 120, site.arch(), work),
        site.stage("fill", 100, "fill", **NOT_INTERPRETED),
        site.tool("intrinsics", 60, site.arch(), work),
        Stage("check", 45, check, NOT_INTERPRETED),
        site.measurement("small", 40, "small"),
        site.measurement("time", 90, "times", "time"),
        site.measurement("kernels", 45, "times", "kernels"),
        tests(site),
        site.tool("memcheck", 90),
    ]
    return {stage.name: stage for stage in stages}


def tests(site: Site, again: Sequence[str] = ()) -> Stage:
    """The thin part of the tests of what runs on a GPU; or some of them, by their names."""
    cores = len(os.sched_getaffinity(0))
    cache = site.work / "pytest"
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", "-o", f"cache_dir={cache}"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(WORKERS, cores))]
    if importlib.util.find_spec("pytest_timeout"):
        # By a thread, that ends the process: no signal reaches one that waits for the GPU.
        command += [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]
    thin = [*(DRY_RUN_TESTS if site.dry_run else TESTS), "--part", "thin", "-k", "triton or cuda"]

    def failed() -> Entry:
        try:
            return {"failed": list(json.loads((cache / "v/cache/lastfailed").read_text()))}
        except (OSError, ValueError):
            return {"failed": []}

    return Stage("tests", 110, [*command, *(again or thin)], ONE_THREAD, failed)


def first(site: Site) -> Iterator[Wave]:
    for folder in (site.logs, site.work / "pytest", site.work / "cache"):
        shutil.rmtree(folder, ignore_errors=True)
    site.logs.mkdir(parents=True)
    site.results.start([])
    yield [site.begin()]
    if not site.ready():
        return
    stages = by_name(site)
    yield [stages[name] for name in FIRST_WAVE]
    for name in ("check", "small", "time", "kernels"):
        yield [stages[name]]
    # Neither is timed.
    yield [stages["tests"], stages["memcheck"]]


def second(site: Site, before: list[Entry]) -> Iterator[Wave]:
    """before: what a first call found, to which this one adds."""
    site.logs.mkdir(parents=True, exist_ok=True)
    site.results.start(before)
    yield [site.begin()]
    if not site.ready():
        return
    stages = by_name(site)
    # Where the machine is the first call's there is nothing left to do for these.
    yield [stages["build"], stages["fill"]]
    for entry in before:
        if entry["what"] == "stage" and entry["call"] == "first" and entry["status"] in BAD:
            if entry["stage"] == "tests":
                yield [tests(site, entry["failed"])]
            elif entry["stage"] in stages and entry["stage"] not in ("build", "fill"):
                yield [stages[entry["stage"]]]
    yield [benchmark(site)]
    yield [site.tool("ncu", 100, str(site.results.path))]
    yield [site.tool("racecheck", 60)]


def benchmark(site: Site) -> Stage:
    command = [sys.executable, "-m", "benchmarks", "--out", str(site.logs)]
    command += ["--append", str(site.results.path)]
    if site.dry_run:
        few = "64x1024-d2-normal and forward and not compile and (composite or pfgm_kernels)"
        command += ["-k", few]
    return Stage("benchmark", 150, command, NOT_INTERPRETED)
