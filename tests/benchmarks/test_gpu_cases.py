# SPDX-License-Identifier: Apache-2.0
"""Is what is measured on a GPU checked first, and does one case take no other along?"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg

pytest.importorskip("pytest_benchmark")

from benchmarks.gpu import cases, small, times
from benchmarks.gpu.cases import Case, Options, UsedUpError, work_through
from benchmarks.gpu.results import Results
from benchmarks.problems import Shape
from pfgm_kernels.backends import BACKENDS, cpu

CPU = torch.device("cpu")
SHAPE = Shape(5, 40, 3, "normal")
CASES = [Case(SHAPE, stored, "forward", "cuda") for stored in ("float32", "uint8")]
RIGHT = {"status": "timed", "seconds": [1.0]}


class ReplacedError(Exception):
    """By a fresh process, which begins with the case of this number."""


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's kernels in the place of the GPU's, in one process."""

    def go_on(number: int) -> None:
        raise ReplacedError(number)

    monkeypatch.setattr(cases, "go_on", go_on)
    for name in cases.KERNELS:
        monkeypatch.setitem(BACKENDS, name, cpu)


@pytest.fixture
def given(tmp_path: Path) -> Options:
    return Options(CPU, True, tmp_path / "gpu.json", ("cuda",), 0, 60.0, 2)


def entries(given: Options) -> list[dict[str, Any]]:
    assert given.json is not None
    return Results(given.json).read()


def test_results_are_there_as_soon_as_they_are_known(given: Options) -> None:
    def measure(case: Case) -> dict[str, Any]:
        assert len(entries(given)) == CASES.index(case)
        return RIGHT

    assert work_through("time", CASES, measure, given) == 0
    first, second = entries(given)
    assert first == {**dataclasses.asdict(CASES[0]), "what": "time", **RIGHT}
    assert second["stored"] == "uint8"


@pytest.mark.parametrize(
    ("error", "status"),
    [(AssertionError("off by 1"), "wrong"), (RuntimeError("off by 1"), "failed")],
)
def test_a_case_that_breaks_is_told_and_the_next_is_measured(
    given: Options, error: Exception, status: str
) -> None:
    def measure(case: Case) -> dict[str, Any]:
        if case == CASES[0]:
            raise error
        return RIGHT

    assert work_through("time", CASES, measure, given) == 1
    first, second = entries(given)
    assert (first["status"], second["status"]) == (status, "timed")
    assert "off by 1" in first["reason"]
    assert "seconds" not in first


def test_what_is_known_as_right_is_not_measured_again(given: Options) -> None:
    measured = []

    def measure(case: Case) -> dict[str, Any]:
        measured.append(case)
        return RIGHT if len(measured) != 1 else {"status": "wrong", "reason": "it is off"}

    assert work_through("time", CASES, measure, given) == 1
    assert work_through("time", CASES, measure, given) == 0
    assert work_through("time", CASES, measure, given) == 0
    assert measured == [*CASES, CASES[0]]


def test_a_process_whose_device_is_broken_is_replaced(
    given: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    monkeypatch.setattr(Case, "refusal", lambda *_: None)
    on_gpu = dataclasses.replace(given, device=torch.device("cuda"))
    with pytest.raises(ReplacedError, match="1"):
        work_through("time", CASES, fail, on_gpu)
    (entry,) = entries(given)
    assert entry["status"] == "failed"
    assert cases.broken(on_gpu.device)
    assert not cases.broken(CPU)


def test_a_case_that_does_not_end_is_told_and_left(
    given: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(cases, "go_on", left.append)

    def measure(case: Case) -> dict[str, Any]:
        while not left:
            time.sleep(0.01)
        return RIGHT

    work_through("time", CASES[:1], measure, dataclasses.replace(given, patience=0.05))
    assert left == [1]
    assert entries(given)[0]["status"] == "hung"


def test_a_process_goes_on_as_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    called = []
    monkeypatch.setattr(cases.os, "execv", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "benchmarks.gpu.times", "time"])
    cases.go_on(7)
    command = [sys.executable, "-m", "benchmarks.gpu.times", "time", "--start=7"]
    assert called == [(sys.executable, command)]


def test_the_first_case_of_a_process_may_ask_for_no_other_process(given: Options) -> None:
    measured: list[Case] = []

    def measure(case: Case) -> dict[str, Any]:
        measured.append(case)
        if len(measured) > 1:
            raise UsedUpError("no kernel was seen")
        return RIGHT

    with pytest.raises(ReplacedError, match="1"):
        work_through("kernels", CASES, measure, given)
    assert work_through("kernels", CASES, measure, dataclasses.replace(given, start=1)) == 1
    assert [e["status"] for e in entries(given)] == ["timed", "failed"]
    assert entries(given)[1]["reason"] == "no kernel was seen"


def test_a_backend_that_cannot_run_is_refused(
    given: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = SimpleNamespace(unsupported_reason=lambda *_: "there is no driver")
    monkeypatch.setitem(BACKENDS, "cuda", refusing)
    assert work_through("time", CASES, lambda case: RIGHT, given) == 1, "none could run"
    assert {(e["status"], e["reason"]) for e in entries(given)} == {
        ("refused", "there is no driver")
    }


def shrunk(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Results are off by the factor."""
    right = times.poisson_field
    monkeypatch.setattr(times, "poisson_field", lambda *a, **o: right(*a, **o) * factor)


def test_the_field_and_its_gradients_are_timed(given: Options) -> None:
    assert times.main("time", given) == 0
    found = entries(given)
    assert len(found) == len(times.TINY) * 4
    for entry in found:
        assert entry["status"] == "timed"
        assert entry["error"] <= entry["tolerance"] <= 1e-5
        assert len(entry["seconds"]) == 2
        assert min(entry["seconds"]) > 0
        assert entry["graph_seconds"] is None
        assert entry["graph_reason"] == "a CPU has no graphs"


@pytest.mark.parametrize("direction", times.DIRECTIONS)
def test_what_is_wrong_is_not_timed(
    given: Options, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    shrunk(monkeypatch, 1 + 1e-3)
    entry = times.time_case(Case(SHAPE, "float32", direction, "cuda"), given)
    assert entry["status"] == "wrong"
    assert "seconds" not in entry
    assert "expected at most 1e-0" in entry["reason"]


class OnGpu:
    """A device that says that it is a GPU, of a problem that is on the CPU."""

    type = "cuda"


@pytest.fixture
def graphs(given: Options, monkeypatch: pytest.MonkeyPatch) -> Options:
    monkeypatch.setattr(times, "rounds_of", lambda call, device, rounds: [float(rounds)])
    problem_of = times.problem_of
    monkeypatch.setattr(times, "problem_of", lambda *a: problem_of(*a[:2], CPU))
    return dataclasses.replace(given, device=OnGpu())  # type: ignore[arg-type]


@pytest.mark.parametrize(("factor", "status"), [(1.0, "timed"), (1.01, "wrong")])
def test_what_a_graph_replays_is_checked_before_it_is_timed(
    graphs: Options, monkeypatch: pytest.MonkeyPatch, factor: float, status: str
) -> None:
    def capture(prepare: Any, device: object) -> Any:
        call = prepare()
        results = tuple(result.new_full(result.shape, float("nan")) for result in call())

        def replay() -> None:
            for result, value in zip(results, call(), strict=True):
                result.copy_(value * factor)

        return replay, results

    monkeypatch.setattr(times, "capture", capture)
    for direction in times.DIRECTIONS:
        entry = times.time_case(Case(SHAPE, "uint8", direction, "cuda"), graphs)
        assert entry["status"] == status
        assert entry.get("graph_seconds") == ([2.0] if factor == 1 else None)
        assert ("seconds" in entry) == (factor == 1)


def test_a_graph_is_captured_on_the_stream_of_the_forward_pass(
    graphs: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for a GPU that replays on the CPU."""
    events: list[str] = []

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    class Stream:
        def __init__(self, device: object = None) -> None:
            pass

        def wait_stream(self, other: object) -> None:
            events.append("wait")

    def entered(name: str, signature: Any) -> Any:
        @contextlib.contextmanager
        def enter(*arguments: Any, **options: Any) -> Iterator[None]:
            inspect.signature(signature).bind(*arguments, **options)
            events.append(name)
            yield

        return enter

    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, entered(name, getattr(torch.cuda, name)))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)

    def prepare() -> Any:
        events.append("prepare")
        return lambda: events.append("call") or (torch.zeros(3),)

    replay, (result,) = times.capture(prepare, CPU)
    replay()
    assert events == ["wait", "stream", "prepare", "call", "wait", "graph", "call", "replay"]
    assert result.isnan().all(), "what nothing writes is no result"


def test_a_call_that_cannot_be_captured_is_a_failure(
    graphs: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(*_: object) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(times, "capture", capture)
    entry = times.time_case(Case(SHAPE, "float32", "forward", "cuda"), graphs)
    assert entry["status"] == "failed"
    assert entry["reason"].startswith("it cannot be captured: operation not permitted")


def test_what_a_call_launches_is_listed(given: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(SHAPE, "float32", "forward", "cuda")
    entry = times.list_kernels(case, given)
    field = next(k for k in entry["kernels"] if k["name"] == "pfgm::field_forward")
    assert field["launches"] == 1
    assert field["seconds"] > 0
    seconds = [kernel["seconds"] for kernel in entry["kernels"]]
    assert seconds == sorted(seconds, reverse=True)
    assert "aten::empty" in {kernel["name"] for kernel in entry["kernels"]}


def test_of_a_gpu_its_own_kernels_are_listed(
    graphs: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, kind in (("sum_kernel", "CUDA"), ("cudaLaunchKernel", "CPU"), ("Memset", "CUDA")):
        event = FunctionEventAvg()
        event.key, event.device_type = name, getattr(DeviceType, kind)
        event.count, event.self_device_time_total = 6, 3 * len(name)
        found.append(event)
    profiler = SimpleNamespace(key_averages=lambda: found)
    monkeypatch.setattr(times, "profile", lambda activities: contextlib.nullcontext(profiler))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    case, given = (
        Case(SHAPE, "float32", "forward", "cuda"),
        dataclasses.replace(graphs, dry_run=False),
    )
    assert times.list_kernels(case, given)["kernels"] == [
        {"name": "sum_kernel", "launches": 2, "seconds": pytest.approx(1e-5)},
        {"name": "Memset", "launches": 2, "seconds": pytest.approx(6e-6)},
    ]
    found.clear()
    with pytest.raises(UsedUpError, match="saw no kernel"):
        times.list_kernels(case, given)


def test_a_call_is_made_once_for_a_profiler(
    graphs: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled before that."""
    events = []
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, functools.partial(events.append, name))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    right = times.poisson_field

    def field(*arguments: Any, **options: Any) -> Any:
        events.append("call")
        return right(*arguments, **options)

    monkeypatch.setattr(times, "poisson_field", field)
    assert times.main("once", graphs) == 0
    assert events == ["call", "start", "call", "stop"]
    assert entries(graphs) == []


def test_small_shapes_are_right_and_the_same_each_time(given: Options) -> None:
    assert small.main(given) == 0
    found = entries(given)
    assert [e["status"] for e in found] == ["right"] * len(small.SHAPES)
    assert all(e["error"] <= e["tolerance"] and e["runs"] == 2 for e in found)


@pytest.mark.parametrize(
    ("off", "words"),
    [
        (lambda v, number: v * (1 + 1e-5), "displacement: "),
        # A race: the last bit of one element, in one run.
        (lambda v, number: v * (1 + (number == 1) * 2**-22 * (v == v.max())), "two runs differ"),
    ],
)
def test_small_shapes_show_what_is_wrong(
    given: Options, monkeypatch: pytest.MonkeyPatch, off: Any, words: str
) -> None:
    right, calls = small.poisson_displacement, []

    def wrong(*arguments: Any, **options: Any) -> Any:
        v, log_mass = right(*arguments, **options)
        calls.append(v)
        return off(v, len(calls) - 1), log_mass

    monkeypatch.setattr(small, "poisson_displacement", wrong)
    assert small.main(given) == 1
    assert entries(given)[0]["status"] == "wrong"
    assert words in entries(given)[0]["reason"]
