# SPDX-License-Identifier: Apache-2.0
"""Processes that start at once, also as ranks; a run's lives in them, and ways in which they end.

They are forked from one that has imported all and computed nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from pfgm_kernels import files
from pfgm_kernels.cli import app
from pfgm_kernels.training import ranks
from pfgm_kernels.training.reports import read_stats
from pfgm_kernels.training.state import Training

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "pytest",
        "pfgm_kernels.cli",
        "pfgm_kernels.training.trainer",
        "sklearn.datasets",
        "torch._dynamo",
        "torch.utils.tensorboard",
    ]
)
START = "--data two_moons --steps 12 --checkpoint-every 1 width=8 depth=1 batch_size=32 warmup=4"
LOST = "pfgm: another rank is lost: "


@dataclass(frozen=True)
class AtCall:
    """Sends the process ``number`` when it makes or leaves its ``count``-th call."""

    count: int
    number: signal.Signals = signal.SIGKILL

    def __call__(self) -> Callable[[], int]:
        calls = 0

        def follow(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == self.count:
                os.kill(os.getpid(), self.number)

        sys.setprofile(follow)
        return lambda: calls


@dataclass(frozen=True)
class InWrite:
    """Kills the process before or after a ``call`` that puts a file named ``name``… in its place,
    ``count`` times through; in the middle of ``write``, with half of the bytes on the disk.
    """

    call: str
    after: bool
    name: str
    count: int = 1

    def __call__(self) -> Callable[[], int]:
        calls = 0

        def follow(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal calls
            if event != ("c_return" if self.after else "c_call"):
                return
            if argument.__name__ != self.call or self.name not in self.written(frame):
                return
            calls += 1
            if calls < self.count:
                return
            if self.call == "write":
                content = frame.f_locals["content"]
                argument(content[: len(content) // 2])
                argument.__self__.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(follow)
        return lambda: calls

    def written(self, frame: FrameType) -> str:
        """The name of the file that ``frame`` writes, or of what it removes."""
        if self.call == "unlink":
            return str(frame.f_locals.get("self", ""))
        writes = frame.f_globals["__name__"] == files.__name__
        return str(frame.f_locals.get("path", "")) if writes else ""


@dataclass(frozen=True)
class AtFunction:
    """Sends the process ``numbers``, one after the other, when it calls ``name`` of the package the
    ``count``-th time.
    """

    name: str
    count: int
    numbers: tuple[signal.Signals, ...]

    def __call__(self) -> Callable[[], int]:
        calls = 0

        def follow(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal calls
            if event != "call" or frame.f_code.co_name != self.name:
                return
            if not frame.f_globals.get("__name__", "").startswith("pfgm_kernels."):
                return
            calls += 1
            if calls == self.count:
                for number in self.numbers:
                    signal.raise_signal(number)

        sys.setprofile(follow)
        return lambda: calls


@dataclass(frozen=True)
class Breaks:
    """The process has an error of its own."""

    error: Exception

    def __call__(self) -> Callable[[], int]:
        raise self.error


Death = Callable[[], Callable[[], int]]
LIVES: Death = AtCall(0)


def environments(world: int) -> list[dict[str, str]]:
    """What torchrun would tell each rank."""
    shared = {"OMP_NUM_THREADS": "1"}
    if world > 1:
        shared |= {"WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "tests"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def _free_port() -> int:
    """Below those that Linux hands to connections, one of which may take it before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as server, suppress(OSError):
            server.bind(("", port))
            return port


def fork(folder: Path, target: Callable[..., None], given: Sequence[tuple]) -> list[BaseProcess]:
    """Starts as many ranks as are ``given`` arguments; what each says lies beside ``folder``."""
    processes = []
    for rank, (of, arguments) in enumerate(zip(environments(len(given)), given, strict=True)):
        out = folder.with_name(f"{folder.name}.{rank}")
        processes.append(FORKS.Process(target=_begin, args=(out, of, target, *arguments)))
        processes[-1].start()
    return processes


def _begin(out: Path, rank: dict[str, str], target: Callable[..., None], *arguments: Any) -> None:
    os.environ |= rank
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    with open(out, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    target(*arguments)


def live(arguments: list[str], death: Death, calls: Path, wait: float) -> None:
    """`pfgm train`, until ``death``, which begins once all ranks are there, or its end. Writes how
    many ``calls`` it made.
    """
    ranks.TIMEOUT = timedelta(seconds=wait)
    build, counts = Training.__init__, []

    def begin(*arguments: Any) -> None:
        counts.append(death())
        build(*arguments)

    Training.__init__ = begin
    try:
        app(arguments)
    finally:
        sys.setprofile(None)
        calls.write_text(str(sum(count() for count in counts)))


def start(
    folder: Path, deaths: Sequence[Death], *settings: str, wait: float = 60
) -> list[BaseProcess]:
    """Starts a run, or goes on with it, with as many ranks as there are deaths."""
    arguments = ["train", "--out", str(folder)]
    arguments += ["--resume"] if (folder / "config.yaml").exists() else START.split()
    arguments += settings
    given = [(arguments, death, _calls(folder, i), wait) for i, death in enumerate(deaths)]
    return fork(folder, live, given)


def ends(processes: list[BaseProcess]) -> list[int | None]:
    """Waits for all; their exit codes, negative those of signals."""
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def calls_of(folder: Path, rank: int) -> int:
    """How many calls a process made in its life."""
    return int(_calls(folder, rank).read_text())


def _calls(folder: Path, rank: int) -> Path:
    return folder.with_name(f"{folder.name}.{rank}.calls")


def said(folder: Path, rank: int) -> str:
    return folder.with_name(f"{folder.name}.{rank}").read_text()


def newest(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return int(max((folder / "checkpoints").iterdir()).stem.removeprefix("step_"))


def results(folder: Path) -> dict[str, bytes]:
    """The checkpoints and the model of a finished run, as they lie on the disk."""
    assert not list(folder.rglob("*.partial"))
    steps = [line["step"] for line in read_stats(folder / "stats.jsonl")]
    assert steps == sorted(set(steps))
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}
