# SPDX-License-Identifier: Apache-2.0
"""One deliberate mistake at a time in a copy of the project: what finds it?

A set of mistakes is a module with

    TITLE         the head of its table
    ABOUT         what the table shows, a sentence or two
    COLUMNS       what may find a mistake, the last columns of the table
    mutants()     → all Mutants of the set, changes that are no mistakes among them
    Worker(tree)  → called with a Mutant that was put into the tree, returns by column what its
                    tests find there: "" for nothing, None for not asked
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Queue
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "build", "out", "__pycache__", "*.egg-info")
SECONDS = 300  # of the processor, for the tests of one mistake; six times as long by the clock
# Imported once, for all mistakes. Not triton, whose interpreter the environment switches, and which
# torch._dynamo imports.
PRELOADED = [
    "torch",
    "torch.utils.tensorboard",
    "pytest",
    "hypothesis",
    "rich.progress",
    "typer.testing",
    "sklearn.datasets",
    "sklearn.linear_model",
    "sklearn.model_selection",
    "scipy.linalg",
    "scipy.integrate",
    "scipy.stats",
    "matplotlib.figure",
    "mpl_toolkits.mplot3d.art3d",
    "PIL.Image",
    "safetensors.torch",
]

Found = Mapping[str, str | None]


@dataclass(frozen=True)
class Mutant:
    """A change of the text `old`, which the file has once (or in the line given), to `new`."""

    what: str
    file: str
    """Relative to the project's root."""
    old: str
    new: str
    tests: str = ""
    """Arguments of pytest, for the sets that find by it."""
    harmless: str = ""
    """Why it is no mistake: it is listed in the table, and not run."""
    line: int = 0

    @property
    def place(self) -> str:
        """File and line, without the folder that all files of the set have in common."""
        text = (ROOT / self.file).read_text()
        return f"{self.file.partition('/')[2]}:{text.count(chr(10), 0, self._start(text)) + 1}"

    @property
    def change(self) -> str:
        before, after = (" ".join(text.split()) for text in (self.old, self.new))
        return f"`{before}` → `{after}`".replace("|", "\\|") if after else f"without `{before}`"

    def apply(self, tree: Path) -> None:
        text = (tree / self.file).read_text()
        start = self._start(text)
        self._write(tree, text[:start] + self.new + text[start + len(self.old) :])

    def undo(self, tree: Path) -> None:
        self._write(tree, (ROOT / self.file).read_text())

    def _start(self, text: str) -> int:
        if self.line:
            return text.index(self.old, sum(map(len, text.splitlines(True)[: self.line - 1])))
        if text.count(self.old) != 1:
            raise SystemExit(f"{self.file} has {text.count(self.old)} times, not once:\n{self.old}")
        return text.index(self.old)

    def _write(self, tree: Path, text: str) -> None:
        path = tree / self.file
        path.write_text(text)
        for stale in path.parent.glob(f"__pycache__/{path.stem}.*"):
            stale.unlink()


def read(path: Path) -> list[Mutant]:
    """Mutants from a text file. A line `== FILE ARGUMENTS OF PYTEST` begins those of a source, a
    line of words a mutant, whose next lines begin with

        -  what is replaced, several for several lines
        +  by what; none for nothing
        ?  arguments of pytest, in place of those of the source
        ~  why it is no mistake

    # begins a comment.
    """
    found: list[Mutant] = []
    file = tests = ""
    for line in path.read_text().splitlines():
        kind, text = line[:1], line[2:]
        if line.startswith("=="):
            file, _, tests = line.removeprefix("==").strip().partition(" ")
        elif kind in ("-", "+", "?", "~"):
            part = {"-": "old", "+": "new", "?": "tests", "~": "harmless"}[kind]
            before = getattr(found[-1], part) if kind != "?" else ""
            found[-1] = replace(found[-1], **{part: f"{before}\n{text}" if before else text})
        elif line and kind != "#":
            found.append(Mutant(line, file, "", "", tests))
    return found


class _First:
    """A plugin of pytest that notes the first failure, without its parameters."""

    found = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed and not self.found:
            self.found = report.nodeid.removeprefix("tests/").partition("[")[0]


def run_pytest(
    tree: Path, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> str:
    """The first test in the tree that fails, or how pytest ends without; "" where all pass."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_run_pytest, args=(tree, list(arguments), dict(environment or {}), sender)
    )
    process.start()
    sender.close()
    process.join(6 * SECONDS)
    if process.exitcode is None:
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return "does not end"
    if process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        return "does not end" if name == "SIGXCPU" else name
    return receiver.recv()


def _run_pytest(
    tree: Path, arguments: list[str], environment: dict[str, str], sender: Connection
) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    os.chdir(tree)
    os.environ.update(environment)
    sys.path.remove(str(Path(__file__).parents[1]))
    log = os.open(tree / "pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    first = _First()
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments], plugins=[first])
    sender.send(first.found or (code and f"pytest: {pytest.ExitCode(code).name}") or "")
    sys.stdout.flush()
    os._exit(0)


class Log:
    """What was found before, in a file of a line of JSON a mutant, so that hours are not lost. That
    nothing finds a mutant is not kept: the tests that are to find it will be others.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self.found = {tuple(key): found for key, found in map(json.loads, lines)}

    def get(self, mutant: Mutant) -> Found | None:
        return self.found.get(self._key(mutant))

    def add(self, mutant: Mutant, found: Found) -> None:
        if self.path and any(found.values()):
            with self.path.open("a") as file:
                file.write(json.dumps([self._key(mutant), dict(found)]) + "\n")

    def _key(self, mutant: Mutant) -> tuple[str, str, str]:
        return mutant.file, mutant.what, mutant.change


def run(suite: ModuleType, mutants: Sequence[Mutant], jobs: int, log: Log) -> dict[Mutant, Found]:
    """What finds each of the mutants; `jobs` at a time, each in a copy of the project of its own.

    First their tests, each once, have to find nothing in the project as it is.
    """
    left = [mutant for mutant in mutants if log.get(mutant) is None]
    with tempfile.TemporaryDirectory(prefix="mutants.") as folder, ThreadPoolExecutor(jobs) as pool:
        free: Queue[tuple[Path, Callable[[Mutant], Found]]] = Queue()
        for job in range(jobs):
            tree = Path(folder) / str(job)
            shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
            free.put((tree, suite.Worker(tree)))

        def unchanged(mutant: Mutant) -> None:
            tree, worker = free.get()
            found = worker(mutant)
            free.put((tree, worker))
            if any(found.values()):
                raise SystemExit(f"{suite.TITLE}: {_words(found)} without a mistake")

        def examine(mutant: Mutant) -> Found:
            tree, worker = free.get()
            mutant.apply(tree)
            found = worker(mutant)
            mutant.undo(tree)
            free.put((tree, worker))
            log.add(mutant, found)
            print(f"{mutant.place} {mutant.what}: {_words(found)}", flush=True)
            return found

        list(pool.map(unchanged, {mutant.tests: mutant for mutant in left}.values()))
        now = dict(zip(left, pool.map(examine, left), strict=True))
    return {mutant: log.get(mutant) or now[mutant] for mutant in mutants}


def _words(found: Found) -> str:
    return "; ".join(value for value in found.values() if value) or "NOT FOUND"


def table(suite: ModuleType, results: Mapping[Mutant, Found], harmless: Sequence[Mutant]) -> str:
    """A section of the page, in Markdown."""
    caught = sum(any(found.values()) for found in results.values())
    columns = ["mistake", "place", "change", *suite.COLUMNS]
    lines = [f"## {suite.TITLE}", "", suite.ABOUT, ""]
    lines += [f"{caught} of {len(results)} mistakes are found.", ""]
    lines += _rows(columns, (_row(m, results[m], suite.COLUMNS) for m in results))
    if harmless:
        lines += ["", "Changes that are no mistakes:", ""]
        lines += _rows(["change", "place", "text", "why"], (_row(m, {}, ()) for m in harmless))
    return "\n".join([*lines, ""])


def _row(mutant: Mutant, found: Found, columns: Sequence[str]) -> list[str]:
    values = [found[column] for column in columns]
    cells = ["not run" if value is None else value or "–" for value in values]
    last = [mutant.harmless] if mutant.harmless else cells
    return [mutant.what, mutant.place, mutant.change, *last]


def _rows(columns: Sequence[str], rows: Iterator[list[str]]) -> list[str]:
    head = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    return head + [f"| {' | '.join(row)} |" for row in rows]


def write(page: Path, sections: Mapping[str, str]) -> None:
    """Puts the sections, by their titles, in place of those that the page has."""
    head, *old = page.read_text().split("\n## ")
    kept = {section.partition("\n")[0]: f"## {section}" for section in old}
    content = kept | dict(sections)
    page.write_text(
        "\n".join([head.rstrip() + "\n", *(s.rstrip() + "\n" for s in content.values())])
    )
