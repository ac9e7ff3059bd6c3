# SPDX-License-Identifier: Apache-2.0
"""Runs stages, each a process with a time limit, whatever becomes of the others.

No more than the standard library is imported here: what is broken elsewhere breaks a stage.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.results import BAD, Entry, Results, table

GRACE = 8.0
"""Seconds that a stage has to end by itself, interrupted, before it is killed; and half of that to
be gone when it is killed, which one that waits for a broken device may never be.
"""
LONGEST_LOG = 4 << 20
"""Bytes of a log's end that go into the archive."""
SKIPPED = 77
"""Exit status by which a stage says that it cannot run here; the last line of its log says why."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Stage:
    """A command and the seconds that it may take; finish(): more for its entry, at its end."""

    name: str
    seconds: float
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    finish: Callable[[], Entry] = dict


class Running:
    """A stage's process, at the head of a group of its own: with it ends all that it started."""

    def __init__(self, stage: Stage, log: Path, seconds: float) -> None:
        self.stage, self.log = stage, log
        self.start = time.monotonic()
        self.deadline, self.late = self.start + seconds, False
        self.seconds = seconds
        self.process, self.reason = None, ""
        with log.open("wb") as output:
            try:
                self.process = self._spawn(output)
            except OSError as error:
                self.reason = f"{stage.command[0]}: {error.strerror}"

    def _spawn(self, output: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            list(self.stage.command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self.stage.environment},
            # Not a session, which would outlive us where only we are killed.
            preexec_fn=os.setpgrp,
        )

    def ended(self) -> bool:
        """Looks, and keeps to the time limit."""
        if self.process is None:
            return True
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        if os.waitid(os.P_PID, self.process.pid, options) is not None:
            return True
        now = time.monotonic()
        if now > self.deadline + GRACE:
            self.signal(signal.SIGKILL)
            return now > self.deadline + 1.5 * GRACE
        if now > self.deadline and not self.late:
            # Interrupted, pytest still writes what it has.
            self.late = True
            self.signal(signal.SIGINT)
        return False

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def close(self) -> Entry:
        """What came of it. Nothing of the group is left."""
        seconds = round(time.monotonic() - self.start, 1)
        status = "failed"
        if self.process is not None:
            # Before its leader is waited for the group's number cannot be another's.
            self.signal(signal.SIGKILL)
            try:
                status, self.reason = self._judge(self.process.wait(GRACE / 2))
            except subprocess.TimeoutExpired:
                status, self.reason = "late", "it cannot be killed"
        return {"status": status, "reason": self.reason, "seconds": seconds} | self.stage.finish()

    def _judge(self, code: int) -> tuple[str, str]:
        if self.late:
            return "late", f"not done within {self.seconds:.0f} s"
        if code == SKIPPED:
            return "skipped", _last_lines(self.log, 1)[-1]
        if code < 0:
            return "failed", f"ended by signal {-code}"
        return ("failed", f"exit status {code}") if code else ("passed", "")


class Runner:
    """The stages of one call, in waves: those of one wave run at the same time.

    After each the logs, the results so far and a table of them are put into an archive beside the
    results, so that it is there whatever happens.
    """

    def __init__(self, call: str, results: Results, logs: Path, seconds: float) -> None:
        self.call, self.results, self.logs = call, results, logs
        self.archive = results.path.with_suffix(".tar.gz")
        self.end = time.monotonic() + seconds
        self.running: list[Running] = []
        self.entries: list[Entry] = []

    def run(self, waves: Iterable[Sequence[Stage]]) -> bool:
        """Whether no stage failed. Where the process is told to end, the stages end, the archive is
        written and the signal has its way.
        """
        previous = {number: signal.signal(number, self._stop) for number in STOPPING}
        try:
            for wave in waves:
                self._run_wave(wave)
                self.save()
        finally:
            for number in STOPPING:
                signal.signal(number, signal.SIG_IGN)
            for running in self.running:
                ending = {"status": "interrupted", "reason": "the call was ended"}
                self._report(running.stage.name, running.close() | ending)
            self.save()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return not any(entry["status"] in BAD for entry in self.entries)

    def _run_wave(self, wave: Sequence[Stage]) -> None:
        for stage in wave:
            left = self.end - time.monotonic()
            if left < 1:
                self._report(stage.name, {"status": "late", "reason": "no time left", "seconds": 0})
                continue
            log = self.logs / f"{self.call}-{stage.name}.log"
            self.running.append(Running(stage, log, min(stage.seconds, left)))
        while self.running:
            for running in [r for r in self.running if r.ended()]:
                self.running.remove(running)
                self._report(running.stage.name, running.close())
            time.sleep(0.05)

    def _report(self, name: str, outcome: Entry) -> None:
        log = f"{self.call}-{name}.log"
        entry = {"what": "stage", "call": self.call, "stage": name, **outcome, "log": log}
        self.entries.append(entry)
        self.results.append(entry)
        reason = f": {entry['reason']}" if entry["reason"] else ""
        say(f"{name:<10} {entry['seconds']:>5} s  {entry['status']}{reason}")
        if entry["status"] in ("failed", "late") and (self.logs / log).exists():
            say(*_last_lines(self.logs / log, 15))

    def save(self) -> None:
        """All logs and tables as the archive."""
        entries = self.results.read()
        self.logs.mkdir(parents=True, exist_ok=True)
        Results(self.logs / self.results.path.name).start(entries)
        (self.logs / "table.txt").write_text(f"{table(entries)}\n")
        work = self.archive.with_name(f".{self.archive.name}.{os.getpid()}")
        with tarfile.open(work, "w:gz", compresslevel=6) as archive:
            for file in sorted(self.logs.rglob("*")):
                if file.is_file():
                    content = _end(file, LONGEST_LOG)
                    info = tarfile.TarInfo(f"gpu/{file.relative_to(self.logs)}")
                    info.size, info.mtime = len(content), int(file.stat().st_mtime)
                    archive.addfile(info, io.BytesIO(content))
        work.replace(self.archive)

    @staticmethod
    def _stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)


def say(*lines: str) -> None:
    """Whether or not anybody still reads."""
    with contextlib.suppress(OSError):
        print(*lines, sep="\n  | ", flush=True)


def _end(file: Path, most: int) -> bytes:
    with file.open("rb") as content:
        content.seek(max(0, file.stat().st_size - most))
        return content.read(most)


def _last_lines(file: Path, count: int) -> list[str]:
    return ["", *_end(file, 1 << 16).decode(errors="replace").splitlines()[-count:]]
