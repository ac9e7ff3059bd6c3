# SPDX-License-Identifier: Apache-2.0
"""Are files whole, of the umask's mode and named when they fail, and has a folder one writer?"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from commands import pfgm

from pfgm_kernels import figures, files
from pfgm_kernels.files import LOCK, locked, write_bytes
from pfgm_kernels.training import checkpoint, data
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.trainer import train

TINY = {"width": 8, "depth": 1, "batch_size": 16, "steps": 2}
HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(600)
"""


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "temporary")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as context:
            context.setattr(files.os, step, fail)
            with pytest.raises(OSError, match="No space left") as caught:
                write_bytes(path, b"new")
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == [path.name]
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    write_bytes(tmp_path / ("x" * 255), b"content")


@pytest.fixture(params=[0o022, 0o002, 0o077, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_of_a_run_have_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    """New files and those that are replaced, checkpoints, models, pictures and all."""
    moons = data.load("two_moons")
    config = TrainConfig.for_data(moons, **TINY)
    train(config, moons, tmp_path / "run")
    figures.draw_samples(torch.zeros(4, 2), tmp_path / "picture.png")
    for _ in range(2):
        write_bytes(tmp_path / "again", b"content")
    found = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    names = {path.name for path in found}
    assert {"config.yaml", "model.safetensors", "step_00000002.safetensors"} <= names
    for path, mode in found.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path


def write_model(folder: Path) -> None:
    checkpoint.write(folder / "model.safetensors", {"weight": torch.zeros(9999)}, {})


def write_picture(folder: Path) -> None:
    figures.draw_samples(torch.randn(500, 2), folder / "picture.png")


def write_run(folder: Path) -> None:
    moons = data.load("two_moons")
    train(TrainConfig.for_data(moons, **TINY | {"width": 64}), moons, folder)


@pytest.mark.parametrize(
    ("write", "most", "name"),
    [
        (write_model, 5000, "model.safetensors"),
        (write_picture, 1000, "picture.png"),
        (write_run, 100, "config.yaml"),
        (write_run, 5000, "checkpoints/step_00000002.safetensors"),
    ],
)
def test_no_room_names_the_file(tmp_path: Path, write, most: int, name: str) -> None:
    """As a full disk does, a limit on the size of files fails a write without naming it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}/{name}'"):
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.rglob("*.partial"))


def test_curves_name_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    moons = data.load("two_moons")
    for method in ("__init__", "add_scalar", "close"):
        folder = tmp_path / method
        with monkeypatch.context() as context:
            context.setattr(SummaryWriter, method, fail)
            with pytest.raises(OSError, match=f"No space left on device: '{folder}/tensorboard'"):
                train(TrainConfig.for_data(moons, **TINY), moons, folder)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that holds the lock of tmp_path."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_training_is_refused(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """Started together with the first, resumed beside it, or as a demo; until the first is dead."""
    moons = data.load("two_moons")
    start = ("train", "--data", "two_moons", "--out", tmp_path, "--steps", 2)
    before = sorted(tmp_path.iterdir())
    refused = [pfgm(*start), pfgm("demo", "--out", tmp_path)]
    with pytest.raises(ValueError, match="is in use"):
        train(TrainConfig.for_data(moons, **TINY), moons, tmp_path, replace=True)
    assert sorted(tmp_path.iterdir()) == before
    TrainConfig.for_data(moons, steps=2).write(tmp_path)
    refused += [pfgm("train", "--out", tmp_path, "--resume")]
    for result in refused:
        assert result.exit_code == 2
        assert result.stderr.startswith(f"pfgm: {tmp_path} is in use: ")
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "checkpoints").exists()
    holder.kill()
    holder.wait()
    result = pfgm("train", "--out", tmp_path, "--resume")
    assert result.exit_code == 0, result.output


def test_trainings_started_together(tmp_path: Path) -> None:
    """One of them trains, the others are refused, and the folder holds the run of the one."""
    moons, barrier = data.load("two_moons"), threading.Barrier(4)

    def start(seed: int) -> str:
        barrier.wait()
        try:
            train(TrainConfig.for_data(moons, seed=seed, **TINY), moons, tmp_path)
        except ValueError as error:
            return str(error)
        return "finished"

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(start, range(4)))
    assert results.count("finished") == 1
    assert TrainConfig.read(tmp_path).seed == results.index("finished")
    for result in results:
        assert any(words in result for words in ("finished", "in use", "already holds a run"))


def test_the_lock_goes_with_the_block(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / "new"), pytest.raises(ValueError, match="in use"):
            locked(tmp_path / "new").__enter__()
        with pytest.raises(KeyError), locked(tmp_path / "new"):
            raise KeyError


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=f"{tmp_path} knows no locks"), locked(tmp_path):
        pass
