# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the CUDA kernels, made by rules: a barrier is taken away, one group of copies fewer
waited for, the bound of a loop or a guard shifted by one, an index into a fragment permuted.

The kernels are built as tests/cuda/emulated.py builds them and run `checks`, up to the first build
that finds the mistake: plainly in three schedules, with the search for races, under
AddressSanitizer; for bounds the other way round. Changes that are no mistakes stand in HARMLESS.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from mutants.runner import ROOT, Found, Mutant

HELPERS = [str(ROOT / folder) for folder in (".", "tests", "tests/op", "tests/cuda")]
sys.path += HELPERS
import emulated  # noqa: E402
from test_intrinsics import CHECKS  # noqa: E402

TITLE = "The CUDA kernels"
ABOUT = "Emulated on the CPU in three builds. See the head of `tests/mutants/cuda.py`."
COLUMNS = emulated.KINDS

KERNELS = ROOT / "csrc" / "cuda"
SECONDS = 150  # of the processor, for the checks of one build
PLAIN_SCHEDULES = [("greedy", 1, True), ("reverse", 0, True), ("forward", 0, False)]

BOUND = r"(?:\w+\.)*(?:count|batch|dim|end|size|sample|width|rows|steps|tiles|groups|splits|last)"
FRAGMENTS = {
    r"(\bi) / 2\b": r"\1 % 2",
    r"(\bi) % 2\b": r"\1 / 2",
    r"(lane(?:\(\))?) / 4\b": r"\1 % 8",
    r"(lane(?:\(\))?) % 4\b": r"\1 / 8",
    r"(\bk) / 8\b": r"(1 - \1 / 8)",
    r"\b8 \* i\b": "8 * (i ^ 1)",
    r"second \+ half": "second + 1 - half",
    r"\ba \+ 2\]": "a]",
    r"(\bk) % 2\b": r"(1 - \1 % 2)",
    r"lane % 16\b": "lane / 2",
    r"lane / 16\b": "lane % 2",
    r"16 \* half": "16 - 16 * half",
    r"registers\[i\] << 16": "registers[i] & 0xffff0000",
}

# Files and lines whose change nothing could tell, by the reason.
HARMLESS = {
    "one turn more, with nothing left to do": [
        "direct_sum.cuh: for (int offset = 0; offset <= place.size; offset += kTile) {",
        "direct_sum.cuh: for (int run = 0; run <= rows; run += kRun * a.shares) {",
        "exact.cuh: while (count < kRows && next <= task.end) {",
        "exact.cuh: for (int start = warp() * per_warp; start <= count;"
        " start += kWarps * per_warp) {",
        "exact.cuh: while (next <= task.end) {",
        "weigh.cu: for (int64_t start = 0; start <= a.groups; start += kThreads) {",
    ],
    "one turn more, with references of the next part or with the last one again": [
        "direct_forward.cu: for (int offset = 0; offset <= place.size; offset += kTile) {",
    ],
    "more threads than columns where d is a power of two, which are idle": [
        "exact.cuh: while (width <= dim && width < kExactThreads) width *= 2;",
        "exact_backward.cu: while (width <= p.dim && width < 32) width *= 2;",
        "rows.cu: while (a.lanes <= p.dim && a.lanes < kWarp) a.lanes *= 2;",
    ],
    "a number that nothing reads": [
        "exact.cuh: if (i <= count && lane() % lanes == 0) {",
    ],
    "lane d has the last sum, of which it is known already whether it is finite": [
        "direct.cuh: if (lane <= a.p.dim) {",
    ],
    "one hash more, which nothing wrote: of eight it takes, one could be counted too many": [
        "direct_forward.cu: for (int i = 0; mine <= sample && i < mine; ++i)"
        " equal |= hashes[i] == hashes[mine];",
    ],
    "the last sum is written there afterwards": [
        "direct_sum.cuh: const bool last = c == kDim, mine = place.share == 0 && b < p.batch"
        " && (last || c <= p.dim);",
    ],
}


def mutants() -> list[Mutant]:
    found = list(_mutants())
    if sum(bool(m.harmless) for m in found) != sum(map(len, HARMLESS.values())):
        raise SystemExit("HARMLESS lists what is no change, or several changes at once")
    return found


def _mutants() -> Iterator[Mutant]:
    for path in sorted(KERNELS.glob("*.cu*")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.partition("//")[0].strip()
            for kind, changed in _changes(code, path.name):
                change = f"{path.name}: {changed}"
                reason = next((why for why, texts in HARMLESS.items() if change in texts), "")
                file = str(path.relative_to(ROOT))
                yield Mutant(kind, file, code, changed, harmless=reason, line=number)


def _changes(code: str, file: str) -> Iterator[tuple[str, str]]:
    if file != "intrinsics.cuh":
        for match in re.finditer(r"__sync(threads|warp)\(\);", code):
            yield "barrier", _replace(code, match, ";")
        for match in re.finditer(r"copy_async_wait<(.*)>\(\)", code):
            yield "wait", _replace(code, match, f"copy_async_wait<{match[1]} + 1>()")
        for match in re.finditer(rf" < (\(?{BOUND})\b(?! \?)(?!\()", code):
            yield "bound", _replace(code, match, f" <= {match[1]}")
    if file.startswith(("intrinsics", "product")):
        for pattern, replacement in FRAGMENTS.items():
            for match in re.finditer(pattern, code):
                yield "fragment", _replace(code, match, match.expand(replacement))


def _replace(text: str, match: re.Match[str], replacement: str) -> str:
    return text[: match.start()] + replacement + text[match.end() :]


def checks(kind: str) -> list[tuple[str, Callable[[], None]]]:
    """The tests' own functions on some of their problems: those that are quick for the tile edges
    that they straddle.
    """
    import test_cuda_direct as direct
    import test_cuda_two_pass as two_pass

    exact = two_pass.test_what_products_are_not_certain_for_is_exact
    tests = [
        (direct.test_in_single_precision, direct.SINGLE_SHAPES, {2, 3, 8, 23, 25}),
        (direct.test_in_double_precision, direct.DOUBLE_SHAPES, {3, 9, 33, 129, 600_000}),
        (two_pass.test_values_and_gradients, two_pass.SHAPES, {33, 64, 65, 127, 129}),
        (exact, [("equal references",), ("few candidates",)], None),
        (direct.test_a_crowd_is_exact, [()], None),
        (direct.test_ranges_of_references, [()], None),
        (two_pass.test_operands_of_codes, [()], None),
    ]
    if kind == "plain":  # a search takes minutes for it
        tests.append((two_pass.test_more_groups_than_a_block_lists_at_a_time, [()], None))
    return [
        (f"{test.__name__} {arguments}", partial(test, *arguments))
        for test, problems, dimensions in tests
        for arguments in problems
        if dimensions is None or arguments[0] in dimensions
    ]


def examine(kind: str, path: str) -> None:
    """All checks on one build, in a process of its own: raises, or is killed."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    kernels = emulated.load(Path(path))
    if hasattr(kernels, "run_check"):
        problems = [
            (f"test_intrinsics {name}", partial(kernels.run_check, name)) for name in CHECKS
        ]
    else:
        emulated.install(kernels)
        problems = checks(kind)
    torch.use_deterministic_algorithms(True, warn_only=True)
    schedules = PLAIN_SCHEDULES if kind == "plain" else PLAIN_SCHEDULES[:1]
    for schedule in schedules:
        for name, check in problems:
            kernels.set_schedule(*schedule)
            try:
                check()
            except BaseException as error:
                text = str(error).strip().split("\n")[0]
                print(f"{schedule[0]}, {name}: {type(error).__name__} {text}", file=sys.stderr)
                raise SystemExit(1) from None


def serve(kind: str) -> None:
    """Answers each path of a build with a line: "" where nothing was found."""
    checks(kind)  # imported once
    for path in sys.stdin:
        with tempfile.TemporaryFile("w+") as log:
            child = os.fork()
            if child == 0:
                os.dup2(log.fileno(), 2)
                code = 0
                try:
                    examine(kind, path.strip())
                except SystemExit:
                    code = 1
                sys.stderr.flush()
                os._exit(code)
            _, status = os.waitpid(child, 0)
            log.seek(0)
            text = log.read()
        print(_verdict(status, text), flush=True)


def _verdict(status: int, text: str) -> str:
    if status == 0:
        return ""
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return "does not end" if name == "SIGXCPU" else name
    for line in text.splitlines():
        if "ERROR: AddressSanitizer" in line:
            return (
                "AddressSanitizer: " + line.partition("AddressSanitizer: ")[2].partition(" on ")[0]
            )
    return (text.strip().splitlines() or ["failed"])[-1][:200].replace("|", "/")


class Worker:
    """Objects of the unchanged kernels, and a server for each build."""

    def __init__(self, tree: Path) -> None:
        self.tree, self.objects = tree, tree / "build" / "mutants"
        self.servers = {kind: self._start(kind) for kind in emulated.KINDS}

    def _start(self, kind: str) -> subprocess.Popen[str]:
        environment = emulated.address_environment() if kind == "address" else dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(HELPERS)
        command = [sys.executable, "-m", "mutants.cuda", kind]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def __call__(self, mutant: Mutant) -> Found:
        found: dict[str, str | None] = dict.fromkeys(emulated.KINDS)
        file = Path(mutant.file).name
        changed, names = self._users(file), ["kernels"]
        if file == "intrinsics.cuh":
            changed.add("programs.cu")
            names.insert(0, "programs")
        kinds = list(emulated.KINDS)
        if mutant.what == "bound":
            kinds.reverse()
        for kind in kinds:
            try:
                for name in names:
                    found[kind] = self._ask(kind, self._build(name, kind, changed))
                    if found[kind]:
                        return found
            except RuntimeError:
                found[kind] = "does not compile"
                return found
        return found

    def _users(self, file: str) -> set[str]:
        """Names of the sources that a file is part of."""
        users = {file}
        while True:
            more = {
                path.name
                for path in KERNELS.glob("*.cu*")
                if any(f'#include "{user}"' in path.read_text() for user in users)
            }
            if more <= users:
                return users
            users |= more

    def _build(self, name: str, kind: str, changed: set[str]) -> Path:
        objects, flags = [], emulated.flags(name, kind)
        programs = [self.tree / path.relative_to(ROOT) for path in emulated.PROGRAMS]
        kernels = [*emulated.sources_of_kernels(self.tree), *emulated.EMULATOR]
        for source in programs if name == "programs" else kernels:
            base = self.objects / kind / f"{source.name}.o"
            base.parent.mkdir(parents=True, exist_ok=True)
            target = base.with_suffix(".changed.o") if source.name in changed else base
            if source.name in changed or not base.exists():
                own = ["-O1", "-Wno-error", *emulated.flags_of(source, kind)]
                emulated.compile_source(source, target, [*flags, *own])
            objects.append(target)
        output = self.objects / kind / f"{name}_{kind}.so"
        emulated.link(objects, output, kind)
        return output

    def _ask(self, kind: str, path: Path) -> str:
        server = self.servers[kind]
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(f"{path}\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        if not answer:
            raise SystemExit(f"the server of the kind {kind} has died")
        return answer.strip()


if __name__ == "__main__":
    serve(sys.argv[1])
