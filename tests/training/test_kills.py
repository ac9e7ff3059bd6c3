# SPDX-License-Identifier: Apache-2.0
"""Does a run that is killed again and again come to the end of one that never was?

The moments are drawn by a seed: one of the calls that a process makes, counted, or one in the
middle of writing a file.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lives import (
    LIVES,
    LOST,
    START,
    AtCall,
    AtFunction,
    Breaks,
    Death,
    InWrite,
    calls_of,
    ends,
    newest,
    results,
    said,
    start,
)

from pfgm_kernels.training import checkpoint

INT, TERM, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGKILL
MOMENTS = (
    ("open", False),
    ("write", False),
    ("fsync", False),
    ("replace", False),
    ("replace", True),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of a run that was never killed, by its number of ranks."""
    parent = tmp_path_factory.mktemp("whole")

    def of(count: int) -> Path:
        folder = parent / str(count)
        if not folder.exists():
            assert ends(start(folder, [LIVES] * count)) == [0] * count, said(folder, 0)
        return folder

    return of


@pytest.mark.parametrize(
    ("count", "kills"),
    [
        pytest.param(1, 1, id="alone"),
        pytest.param(2, 2, id="ranks", marks=pytest.mark.exhaustive),
        pytest.param(1, 35, id="alone often", marks=pytest.mark.exhaustive),
        pytest.param(2, 15, id="ranks often", marks=pytest.mark.exhaustive),
    ],
)
def test_killed_at_random_moments(
    whole: Callable[[int], Path], tmp_path: Path, count: int, kills: int
) -> None:
    """One of the ranks at a time; the others end with a sentence. Every run that comes to its end
    between the kills, and the last one, has the bits of the one that was never killed.
    """
    draw = random.Random(count)
    calls = [calls_of(whole(count), rank) for rank in range(count)]
    killed, finished = 0, False
    folders = (tmp_path / f"run{number}" for number in range(999))
    folder = next(folders)
    while killed < kills or not finished:
        victim, deaths = draw.randrange(count), [LIVES] * count
        if killed < kills:
            deaths[victim] = moment(draw, calls[victim], first=victim == 0)
        codes = ends(start(folder, deaths))
        if died := codes[victim] == -KILL:
            killed += 1
        for rank in {*range(count)} - {victim}:
            told = said(folder, rank).splitlines()
            assert codes[rank] == 0 or (died and codes[rank] == 2 and told[-1].startswith(LOST))
            assert not any("Traceback" in line for line in told)
        finished = not died
        if finished:
            assert codes == [0] * count, said(folder, victim)
            assert results(folder) == results(whole(count))
            folder = next(folders)


def moment(draw: random.Random, calls: int, first: bool) -> Death:
    """Any call of a run, or, of the rank that writes, one in the middle of writing a file."""
    if first and draw.random() < 0.3:
        name = draw.choice(["/step_", "/step_", "/model.", "/config."])
        return InWrite(*draw.choice(MOMENTS), name, draw.randint(1, 3) if name == "/step_" else 1)
    return AtCall(draw.randint(1, calls))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["/step_", "/model.", "/config."])
def test_killed_while_a_file_is_written(
    whole: Callable[[int], Path], tmp_path: Path, name: str
) -> None:
    """A checkpoint, the model or the settings, before, amid and after each of its calls."""
    folder = tmp_path / "run"
    moments = [InWrite(*each, name) for each in MOMENTS]
    if name == "/step_":
        moments += [InWrite("unlink", after, name) for after in (False, True)]
    for death in moments:
        assert ends(start(folder, [death])) == [-KILL], (death, said(folder, 0))
    assert ends(start(folder, [LIVES])) == [0], said(folder, 0)
    assert results(folder) == results(whole(1))


@pytest.mark.parametrize(
    ("death", "code", "step"),
    [
        pytest.param(AtFunction("advance", 1, (TERM,)), 130, 1, id="first step"),
        pytest.param(AtFunction("advance", 4, (INT, INT)), 130, 3, id="twice"),
        pytest.param(AtFunction("advance", 4, (INT, TERM)), -TERM, 3, id="another"),
        pytest.param(AtFunction("write_bytes", 3, (TERM,)), 130, 3, id="saving"),
        pytest.param(AtFunction("samples", 1, (INT,)), 130, 2, id="picture"),
    ],
)
def test_signals(
    whole: Callable[[int], Path], tmp_path: Path, death: Death, code: int, step: int
) -> None:
    """The first one ends the step, saves and says so; a second one of any kind ends at once."""
    folder = tmp_path / "run"
    assert ends(start(folder, [death])) == [code], said(folder, 0)
    assert newest(folder) == step
    assert (f"Stopped after step {step} of 12" in said(folder, 0)) == (len(death.numbers) == 1)
    assert "Traceback" not in said(folder, 0)
    assert ends(start(folder, [LIVES])) == [0], said(folder, 0)
    assert results(folder) == results(whole(1))


@pytest.mark.parametrize(
    ("rank", "error", "code", "told"),
    [
        (0, ValueError("bad data"), 2, "pfgm: bad data"),
        (1, ValueError("bad data"), 2, "pfgm: bad data"),
        (1, RuntimeError("a fault of ours"), 1, "a fault of ours"),
    ],
)
def test_an_error_of_one_rank_ends_all(
    tmp_path: Path, rank: int, error: Exception, code: int, told: str
) -> None:
    folder, deaths, codes = tmp_path / "run", [LIVES, LIVES], [2, 2]
    deaths[rank], codes[rank] = Breaks(error), code
    assert ends(start(folder, deaths)) == codes
    assert told in said(folder, rank)
    assert LOST not in said(folder, rank)
    assert said(folder, 1 - rank).startswith(LOST)
    assert said(folder, 1 - rank).count("\n") == 1


@pytest.mark.exhaustive
def test_a_silent_rank_ends_all(whole: Callable[[int], Path], tmp_path: Path) -> None:
    """Within the timeout; a run goes on from there, too."""
    folder = tmp_path / "run"
    first, second = start(folder, [LIVES, AtFunction("advance", 6, (signal.SIGSTOP,))], wait=5)
    first.join(120)
    second.kill()
    assert ends([first, second]) == [2, -KILL]
    assert said(folder, 0).startswith(LOST)
    assert "was silent for 5 s;" in said(folder, 0)
    assert newest(folder) == 5
    assert ends(start(folder, [LIVES, LIVES])) == [0, 0], said(folder, 0)
    assert results(folder) == results(whole(2))


def test_a_run_goes_on_with_as_many_parts(whole: Callable[[int], Path], tmp_path: Path) -> None:
    """Two ranks are two parts of one process, to rounding; another number is another run."""
    folder = tmp_path / "run"
    assert ends(start(folder, [AtFunction("advance", 6, (TERM,)), LIVES])) == [130, 130]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for settings in ([], ["accumulation=4"]):
        assert ends(start(folder, [LIVES], *settings)) == [2]
        assert "is of batches in 2 parts: expected as many ranks times" in said(folder, 0)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert ends(start(folder, [LIVES], "accumulation=2")) == [0], said(folder, 0)
    together, alone = (
        checkpoint.read(each / "model.safetensors")[0] for each in (whole(2), folder)
    )
    for name, value in together.items():
        torch.testing.assert_close(alone[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("number", "told"), [(KILL, "exitcode  : -9"), (TERM, "exitcode  : 130")])
def test_a_rank_under_torchrun(tmp_path: Path, number: signal.Signals, told: str) -> None:
    """Its agent ends the others of one that is dead; one that is told to stop has all save."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "pfgm_kernels.cli", "train", "--out", str(folder), *START.split()]
    with subprocess.Popen(
        [*command, "--steps=100000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as agent:
        try:
            os.kill(second_rank(agent, folder), number)
            errors = agent.communicate(timeout=120)[1]
        finally:
            agent.kill()
    assert agent.returncode == 1
    assert told in errors
    assert errors.count("Traceback (most recent call last)") == 1, errors  # the agent's
    steps = newest(folder) + 2
    for each in (folder, tmp_path / "whole"):
        assert ends(start(each, [LIVES, LIVES], "--steps", str(steps))) == [0, 0], said(each, 0)
    assert results(folder) == results(tmp_path / "whole")


def second_rank(agent: subprocess.Popen[str], folder: Path) -> int:
    """The process of the second rank of a run that has saved."""
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "step_00000004.safetensors").exists():
        assert agent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    of = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    return next(int(pid) for pid, values in of.items() if b"RANK=1" in values)
