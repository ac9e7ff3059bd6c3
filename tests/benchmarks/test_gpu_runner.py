# SPDX-License-Identifier: Apache-2.0
"""Do the stages of a call on a GPU leave their results, whatever becomes of one of them?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import runner
from benchmarks.gpu.results import Results, latest, table
from benchmarks.gpu.runner import Runner, Stage

ROOT = Path(__file__).parents[2]
STUBBORN = """
    import signal, subprocess, sys, time
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if "child" not in sys.argv:
        print(subprocess.Popen([sys.executable, *sys.orig_argv[1:], "child"]).pid, flush=True)
    while True:
        time.sleep(1)
"""
"""A process with a child, neither of which ends when it is asked to. It prints the child's number.
"""


def python(name: str, code: str, seconds: float = 60, **more: Any) -> Stage:
    return Stage(name, seconds, [sys.executable, "-c", textwrap.dedent(code)], **more)


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE", 0.5)


@pytest.fixture
def call(tmp_path: Path) -> Runner:
    (tmp_path / "out").mkdir()
    (tmp_path / "logs").mkdir()
    return Runner("first", Results(tmp_path / "out" / "gpu.json"), tmp_path / "logs", 100)


def states(call: Runner) -> dict[str, tuple[str, str]]:
    """Status and reason by stage, from what was left."""
    entries = json.loads(call.results.path.read_text())
    return {e["stage"]: (e["status"], e["reason"]) for e in entries if e["what"] == "stage"}


def archived(call: Runner) -> dict[str, str]:
    assert sorted(os.listdir(call.archive.parent)) == ["gpu.json", "gpu.tar.gz"]
    with tarfile.open(call.archive) as archive:
        return {
            member.name.removeprefix("gpu/"): content.read().decode()
            for member in archive
            if (content := archive.extractfile(member)) is not None
        }


def gone(number: int) -> bool:
    """Whether there is no such process, or only what is left for its parent to look at."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


@pytest.mark.exhaustive
def test_a_stage_that_fails_in_any_way_leaves_the_others(call: Runner) -> None:
    waves = [
        [python("good", "print('fine')"), python("failing", "raise SystemExit(3)")],
        [Stage("missing", 60, ["/nowhere/no-such-tool"])],
        [python("killed", "import os; os.kill(os.getpid(), 9)")],
        [python("hanging", STUBBORN, seconds=2.5)],
        [python("skipped", "print('a'); print('no such tool'); raise SystemExit(77)")],
        [python("last", "import os; print(os.environ['WORD'])", environment={"WORD": "so"})],
    ]
    assert not call.run(waves)
    assert states(call) == {
        "good": ("passed", ""),
        "failing": ("failed", "exit status 3"),
        "missing": ("failed", "/nowhere/no-such-tool: No such file or directory"),
        "killed": ("failed", "ended by signal 9"),
        "hanging": ("late", "not done within 2 s"),
        "skipped": ("skipped", "no such tool"),
        "last": ("passed", ""),
    }
    logs = archived(call)
    assert logs["first-good.log"] == "fine\n"
    assert logs["first-last.log"] == "so\n"
    assert json.loads(logs["gpu.json"]) == json.loads(call.results.path.read_text())
    assert "table.txt" in logs
    child = int(logs["first-hanging.log"])
    assert gone(child), "a stage's children end with it"


def test_nothing_failed_where_stages_pass_or_cannot_run(call: Runner) -> None:
    assert call.run([[python("a", ""), python("b", "raise SystemExit(77)")]])


def test_what_a_stage_leaves_running_ends_with_it(call: Runner) -> None:
    code = """
        import subprocess, sys
        command = [sys.executable, "-c", "import signal; signal.pause()"]
        print(subprocess.Popen(command).pid)
    """
    assert call.run([[python("parent", code)]])
    assert gone(int(archived(call)["first-parent.log"]))


@pytest.mark.exhaustive
def test_one_that_is_late_may_still_write_what_it_has(call: Runner) -> None:
    code = """
        import signal
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("interrupted, and done", flush=True)
    """
    finish = {"failed": ["a test"]}
    assert not call.run([[python("tests", code, seconds=2.5, finish=lambda: finish)]])
    (entry,) = call.results.read()
    assert (entry["status"], entry["failed"]) == ("late", ["a test"])
    assert archived(call)["first-tests.log"] == "interrupted, and done\n"


def test_stages_of_one_wave_run_at_the_same_time(call: Runner, tmp_path: Path) -> None:
    """Each waits for the other."""
    code = """
        import pathlib, sys, time
        here, other = {0!r}, {1!r}
        pathlib.Path(here).touch()
        while not pathlib.Path(other).exists():
            time.sleep(0.01)
    """
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    pair = [(one, two), (two, one)]
    assert call.run([[python(Path(p[0]).name, code.format(*p), 30) for p in pair]])


def test_what_the_call_has_no_time_for_is_told(call: Runner) -> None:
    call.end = time.monotonic() + 0.5
    assert not call.run([[python("late", "")]])
    assert states(call) == {"late": ("late", "no time left")}


@pytest.mark.exhaustive
def test_no_stage_may_take_longer_than_the_call(call: Runner) -> None:
    call.end = time.monotonic() + 1.5
    assert not call.run([[python("long", STUBBORN, seconds=1000)]])
    assert states(call)["long"][0] == "late"


def test_a_process_that_cannot_be_killed_is_left_behind(
    call: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that waits for a broken device."""
    monkeypatch.setattr(runner.Running, "signal", lambda self, number: None)
    stages = [python("stuck", "import time; time.sleep(6)", 0.1), python("other", "")]
    assert not call.run([[stage] for stage in stages])
    assert states(call) == {"stuck": ("late", "it cannot be killed"), "other": ("passed", "")}


@pytest.mark.parametrize("number", runner.STOPPING)
def test_a_call_that_is_ended_leaves_what_it_has(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "out").mkdir()
    code = f"""
        import sys
        from pathlib import Path
        from benchmarks.gpu.results import Results
        from benchmarks.gpu.runner import Runner, Stage
        stubborn = [sys.executable, "-c", {textwrap.dedent(STUBBORN)!r}]
        waves = [
            [Stage("done", 60, [sys.executable, "-c", ""])],
            [Stage("running", 60, stubborn)],
            [Stage("never", 60, stubborn)],
        ]
        folder = Path({str(tmp_path)!r})
        (folder / "logs").mkdir()
        Runner("first", Results(folder / "out" / "gpu.json"), folder / "logs", 60).run(waves)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    log = tmp_path / "logs" / "first-running.log"
    while not (log.exists() and log.read_text().endswith("\n")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait() == 128 + number
    results = Results(tmp_path / "out" / "gpu.json")
    call = Runner("first", results, tmp_path / "logs", 60)
    assert states(call) == {
        "done": ("passed", ""),
        "running": ("interrupted", "the call was ended"),
    }
    assert gone(int(archived(call)["first-running.log"]))


def test_the_archive_is_there_before_the_call_ends(call: Runner) -> None:
    """Even one that is killed outright leaves what came before."""
    found = []

    def waves() -> Any:
        yield [python("one", "print('first')")]
        found.append(archived(call))
        yield [python("two", "")]

    assert call.run(waves())
    assert found[0]["first-one.log"] == "first\n"


def test_a_call_that_breaks_leaves_what_it_has(call: Runner) -> None:
    def waves() -> Any:
        yield [python("one", "")]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call.run(waves())
    assert "first-one.log" in archived(call)
    assert states(call)["one"] == ("passed", "")


def test_of_an_endless_log_the_end_is_kept(call: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LONGEST_LOG", 10)
    assert call.run([[python("loud", "print(10_000 * 'a' + 'the end')")]])
    assert archived(call)["first-loud.log"] == "aathe end\n"


def test_nobody_has_to_read_what_is_printed(
    call: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    assert call.run([[python("one", "")]])
    assert states(call)["one"] == ("passed", "")


def append(arguments: tuple[Results, int]) -> None:
    results, number = arguments
    for part in range(20):
        results.append({"what": "time", "number": number, "part": part})


def test_many_add_to_the_json_and_a_reader_finds_it_whole(tmp_path: Path) -> None:
    results = Results(tmp_path / "gpu.json")
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(append, (results, number)) for number in range(4)]
        while not all(job.done() for job in jobs):
            counts = [e["part"] for e in results.read() if e["number"] == 0]
            assert counts == [*range(len(counts))]
    for job in jobs:
        job.result()
    entries = json.loads(results.path.read_text())
    assert sorted((e["number"], e["part"]) for e in entries) == [
        (number, part) for number in range(4) for part in range(20)
    ]
    assert os.listdir(tmp_path) == ["gpu.json"]


def test_what_is_no_number_is_valid_json(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise ValueError(name)

    results = Results(tmp_path / "gpu.json")
    errors = {
        "error": float("inf"),
        "seconds": [float("nan"), 1.0],
        "deep": {"a": (-float("inf"),)},
    }
    results.append({"what": "time", **errors})
    (entry,) = json.loads(results.path.read_text(), parse_constant=refuse)
    assert entry["error"] == "inf"
    assert entry["seconds"] == ["nan", 1.0]
    assert entry["deep"] == {"a": ["-inf"]}


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"what":'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "gpu.json").write_text(text)
    with pytest.raises(ValueError, match=r"gpu\.json is no JSON of gpu\.sh"):
        Results(tmp_path / "gpu.json").read()


def entry(what: str, status: str, backend: str = "cuda", **more: Any) -> dict[str, Any]:
    shape = {"B": 512, "N": 50_000, "d": 3072, "source": "synthetic"}
    about = {"shape": shape, "stored": "uint8", "direction": "forward", "backend": backend}
    return {"what": what, "status": status, **about, **more}


def lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    return table(list(entries)).splitlines()


def test_a_later_result_counts_and_the_table_tells_it() -> None:
    wrong = entry("time", "wrong", error="inf", reason="the result is off")
    right = entry("time", "timed", error=2e-8, seconds=[3e-3, 1e-3, 2e-3], graph_seconds=[1e-3])
    kernels = [
        {"name": "compare_kernel", "launches": 2.0, "seconds": 1.5e-3},
        {"name": "other", "launches": 1.0, "seconds": 1e-4},
    ]
    assert latest([wrong, right], "time") == [right]
    name = "cuda 512x50000-d3072-synthetic uint8 forward"
    assert lines([wrong]) == [f"wrong   {name}  error inf  the result is off"]
    assert lines([wrong, right, entry("kernels", "listed", kernels=kernels)]) == [
        f"timed   {name}  error 2.0e-08  2 ms, graph 1 ms, 3 launches, most compare_kernel 1.5 ms"
    ]
    refused = entry("small", "refused", "triton", reason="no driver")
    assert lines([refused])[0].endswith("forward  no driver")
