# SPDX-License-Identifier: Apache-2.0
"""The stages of the two calls in the order of worth, and of their dry runs: the same elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.results import BAD, Entry, Results
from benchmarks.gpu.runner import Stage

Wave = Sequence[Stage]

SECONDS = 315
"""Of a call; with what ends late and the archive it stays under 330."""
PATIENCE = 5
"""So many times as long a dry run may take, whose machine may be busy with other things."""
TESTS = [
    *("tests/op", "tests/triton/test_triton.py", "tests/cuda/test_gpu.py"),
    *("tests/cuda/test_cuda_direct.py", "tests/cuda/test_cuda_two_pass.py"),
]
DRY_RUN_TESTS = ["tests/op/test_mean.py"]
CASE_SECONDS, TEST_SECONDS = 40, 60
"""Of one case that is measured, and of one test where pytest-timeout is there."""
WORKERS = 12
FIRST_WAVE = ("build", "fill", "intrinsics")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
NOT_INTERPRETED = {"TRITON_INTERPRET": "0"}
NO_CHANGE: dict[str, str] = {}


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
    def patience(self) -> int:
        return PATIENCE if self.dry_run else 1

    @property
    def environment(self) -> dict[str, str]:
        """Whatever is kept is kept in `work`: a home may be small, slow or not for writing."""
        folders = {
            "TRITON_CACHE_DIR": "triton",
            "TORCHINDUCTOR_CACHE_DIR": "inductor",
            "CUDA_CACHE_PATH": "cuda",
            "XDG_CACHE_HOME": "cache",
        }
        path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
        return {name: str(self.work / folder) for name, folder in folders.items()} | {
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "PYTHONUNBUFFERED": "1",
            "TRITON_INTERPRET": "1" if self.dry_run else "0",
        }

    def stage(
        self,
        name: str,
        seconds: float,
        *words: str,
        environment: Mapping[str, str] = NO_CHANGE,
        finish: Callable[[], Entry] = dict,
    ) -> Stage:
        """`python -m` with these words, of which one of ours is told of a dry run."""
        told = ["--dry-run"] if self.dry_run and words[0].startswith("benchmarks.gpu.") else []
        command = [sys.executable, "-m", *words, *told]
        return Stage(name, seconds * self.patience, command, environment, finish)

    def measurement(self, name: str, seconds: float, *words: str) -> Stage:
        return self.stage(name, seconds, *words, "--json", str(self.results.path))

    def tool(self, name: str, seconds: float, *arguments: str) -> Stage:
        words = ["benchmarks.gpu.tools", name, *arguments]
        return self.stage(name, seconds, *words, environment=NOT_INTERPRETED)

    def machine(self) -> Stage:
        """The first to import torch, which can take long on a machine that is new."""
        return self.measurement("machine", 90, "benchmarks.gpu.machine")

    def ready(self) -> bool:
        """Whether that found something to run on."""
        return self.results.latest("stage")[-1]["status"] == "passed"

    def arch(self) -> str:
        """What to compile for, "90"."""
        capability = self.results.latest("machine")[-1].get("capability", "9.0")
        return str(capability).replace(".", "")


def by_name(site: Site) -> dict[str, Stage]:
    """Those that a second call may have to run again."""
    work, patience = str(site.work), f"--patience={CASE_SECONDS * site.patience}"
    stages = [
        site.tool("build", 120, site.arch(), work),
        site.stage("fill", 100, "benchmarks.gpu.fill", environment=NOT_INTERPRETED),
        site.tool("intrinsics", 60, site.arch(), work),
        site.tool("check", 60),
        site.measurement("small", 40, "benchmarks.gpu.small", patience),
        site.measurement("time", 90, "benchmarks.gpu.times", "time", patience),
        site.measurement("kernels", 45, "benchmarks.gpu.times", "kernels", patience),
        run_tests(site),
        site.tool("memcheck", 100, str(site.logs)),
    ]
    return {stage.name: stage for stage in stages}


def run_tests(site: Site, again: Sequence[str] = ()) -> Stage:
    """The thin part of the tests of what runs on a GPU; or some of them, by their names."""
    cache, workers = site.work / "pytest", min(WORKERS, len(os.sched_getaffinity(0)))
    options = ["-q", "--durations=5", "-o", f"cache_dir={cache}"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(workers)]
    if importlib.util.find_spec("pytest_timeout"):
        # By a thread, which ends the process: no signal reaches one that waits for the GPU.
        options += [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]
    thin = [*(DRY_RUN_TESTS if site.dry_run else TESTS), "--part", "thin", "-k", "triton or cuda"]

    def failed() -> Entry:
        try:
            return {"failed": list(json.loads((cache / "v/cache/lastfailed").read_text()))}
        except (OSError, ValueError):
            return {"failed": []}

    words = ["pytest", *options, *(again or thin)]
    return site.stage("tests", 110, *words, environment=ONE_THREAD, finish=failed)


def first(site: Site) -> Iterator[Wave]:
    for folder in (site.logs, site.work / "pytest", site.work / "cache"):
        shutil.rmtree(folder, ignore_errors=True)
    site.logs.mkdir(parents=True)
    site.results.start([])
    yield [site.machine()]
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
    yield [site.machine()]
    if not site.ready():
        return
    stages = by_name(site)
    # Where the machine is the first call's there is nothing left to do for these.
    yield [stages["build"], stages["fill"]]
    for entry in before:
        if entry["what"] == "stage" and entry["call"] == "first" and entry["status"] in BAD:
            if entry["stage"] == "tests":
                yield [run_tests(site, entry["failed"])]
            elif entry["stage"] in stages and entry["stage"] not in ("build", "fill"):
                yield [stages[entry["stage"]]]
    yield [benchmark(site)]
    yield [site.tool("ncu", 100, str(site.results.path), str(site.logs))]
    yield [site.tool("racecheck", 60, str(site.logs))]


def benchmark(site: Site) -> Stage:
    words = ["benchmarks", "--out", str(site.logs), "--append", str(site.results.path)]
    if site.dry_run:
        few = "64x1024-d2-normal and forward and not compile and (composite or pfgm_kernels)"
        words += ["-k", few]
    return site.stage("benchmark", 150, *words, environment=NOT_INTERPRETED)
