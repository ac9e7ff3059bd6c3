# SPDX-License-Identifier: Apache-2.0
"""Races shared by the tests of a run, and what the JSON tells about the machine and the outcome."""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.results import Results
from benchmarks.machine import gflops, gpu
from benchmarks.measure import Result, race
from benchmarks.problems import Problem, Shape
from benchmarks.providers import Provider
from pfgm_kernels import report

NOT_TIMED = pytest.StashKey[list[dict[str, Any]]]()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Races:
    """Runs the race of a shape and direction among its selected providers when first asked."""

    def __init__(self, config: pytest.Config, items: Iterable[pytest.Item]) -> None:
        self._not_timed = config.stash[NOT_TIMED]
        file = config.getoption("--append")
        self._append = None if file is None else Results(file)
        self._selected: dict[tuple[Shape, str], list[Provider]] = defaultdict(list)
        for item in items:
            callspec = getattr(item, "callspec", None)
            if callspec is not None and "provider" in callspec.params:
                key = (callspec.params["shape"], callspec.params["direction"])
                self._selected[key].append(callspec.params["provider"])
        self._problem: tuple[Shape, Problem] | None = None
        self._results: dict[tuple[Shape, str], dict[str, Result]] = {}

    def result(self, shape: Shape, direction: str, provider: Provider) -> Result:
        key = (shape, direction)
        if key not in self._results:
            if self._problem is None or self._problem[0] != shape:
                self._problem = (shape, shape.problem(device()))
            results = race(self._problem[1], direction, self._selected[key])
            self._results[key] = {result.provider: result for result in results}
            if self._append is not None:
                about = {"what": "race", "shape": asdict(shape), "direction": direction}
                self._append.append(*(about | asdict(result) for result in results))
            self._not_timed += [
                {"shape": asdict(shape), "direction": direction, **asdict(result)}
                for result in results
                if result.status != "timed"
            ]
        return self._results[key][provider.name]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--append", type=Path, help="adds each race to this JSON of gpu.sh")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOT_TIMED] = []
    torch.set_float32_matmul_precision("highest")  # whatever the environment says about TF32
    # Before there are threads, which take it over. Weights that small make peers three times as
    # slow on processors that do not compute with them directly.
    torch.set_flush_denormal(True)


@pytest.fixture(scope="session")
def races(request: pytest.FixtureRequest) -> Races:
    return Races(request.config, request.session.items)


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    del machine_info["node"]  # the machine's name in its network is nobody's business
    where = device()
    cuda = where.type == "cuda"
    machine_info["device"] = (
        torch.cuda.get_device_name(where) if cuda else machine_info["cpu"]["brand_raw"]
    )
    machine_info |= gpu(where) if cuda else {}
    machine_info["threads"] = torch.get_num_threads()
    machine_info["simd"] = torch.backends.cpu.get_cpu_capability()
    speeds = {} if cuda else gflops()
    machine_info["fma_peak_gflops"] = speeds.pop("fma_peak", None)
    machine_info["sgemm_gflops"] = speeds
    machine_info["backends"] = dict(report())
    machine_info["versions"] = {
        "pfgm_kernels": _version("pfgm_kernels"),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        **({"triton": _version("triton"), "cuda": torch.version.cuda} if cuda else {}),
        "python": platform.python_version(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """A copy of the tree without its history is told which revision it is."""
    if commit_info["id"] == "unversioned":
        commit_info["id"] = os.environ.get("PFGM_REVISION") or "unversioned"


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: object, output_json: dict[str, Any]
) -> None:
    output_json["not_timed"] = config.stash[NOT_TIMED]
    for entry in output_json["benchmarks"]:
        # pytest-benchmark's own settings, which the race does not use, and our objects as text.
        del entry["options"], entry["params"]
