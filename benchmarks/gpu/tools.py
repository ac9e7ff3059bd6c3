# SPDX-License-Identifier: Apache-2.0
"""Stages that run other programs: `python -m benchmarks.gpu.tools NAME [ARGUMENT ...]`.

    build ARCH FOLDER         the extension for one chip, put in its place when it is complete
    intrinsics ARCH FOLDER    device_check.cu: what the instructions that the kernels use do here
    check                     the self-check of all families of kernels
    memcheck|racecheck LOGS   compute-sanitizer over the small shapes, CUDA kernels alone
    ncu JSON LOGS             Nsight Compute on the heaviest kernels in the JSON

With `--dry-run` the first builds what is emulated, the second does not run what it compiles, and
the third may refuse. One whose tool is missing or may not run says so in its last line and exits
with SKIPPED.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import PIPE, STDOUT

from benchmarks.gpu.results import Entry, Results, name_of
from benchmarks.gpu.runner import SKIPPED

ROOT = Path(__file__).parents[2]
REFUSAL = "report --check expects a GPU"
KERNEL_SECONDS, HEAVIEST = 40, 4
OURS = ("process didn't terminate", "The application returned", "Target application")
"""How tools begin to say that it is the program they look at which failed."""


def find(tool: str) -> str:
    """Its path. Ends the stage where it is not there."""
    home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin")
    found = shutil.which(tool) or shutil.which(tool, path=str(home))
    return found or skip(f"{tool} is not installed")


def dry_run() -> bool:
    return "--dry-run" in sys.argv


def skip(reason: str) -> str:
    print(reason, flush=True)
    raise SystemExit(SKIPPED)


def call(command: Sequence[str], **environment: str) -> int:
    print("$", *command, flush=True)
    return subprocess.call(command, env={**os.environ, **environment}, cwd=ROOT)


def build(arch: str, folder: str) -> int:
    """Without network, and beside what is there: a process that starts meanwhile finds the old
    extension whole, or none. In a dry run the emulated kernels.
    """
    if dry_run():
        from tests.cuda import emulated

        print(emulated.library())
        return 0
    find("nvcc")
    library, work = Path(folder, "lib"), Path(folder, "work")
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-lib", str(library), "--build-temp", str(work)]
    status = call(command, PFGM_CUDA="1", PFGM_CUDA_ARCHS=arch)
    if status == 0:
        for file in library.glob("pfgm_kernels/_C*.so"):
            part = ROOT / "pfgm_kernels" / f"{file.name}.{os.getpid()}"
            shutil.copy(file, part)
            part.replace(part.with_suffix(""))
    return status


def intrinsics(arch: str, folder: str) -> int:
    nvcc, program = find("nvcc"), str(Path(folder, "device_check"))
    source = "tests/cuda/emulation/device_check.cu"
    status = call([nvcc, "-std=c++17", f"-arch=sm_{arch}", "-o", program, source])
    if status == 0 and dry_run():
        skip("it compiles; in a dry run there is no GPU to run it on")
    return status or call([program])


def check() -> int:
    command = [sys.executable, "-m", "pfgm_kernels.cli", "report", "--check"]
    ran = subprocess.run(command, cwd=ROOT, stdout=PIPE, stderr=STDOUT, text=True)
    print(ran.stdout, flush=True)
    if dry_run() and REFUSAL in ran.stdout:
        skip(REFUSAL)
    return ran.returncode


def sanitize(tool: str, logs: str) -> int:
    """What torch and the driver try out and see fail is no error of ours; our launches are checked
    where they are made.
    """
    log, results = Path(logs, f"{tool}.txt"), Results(Path(logs, f"{tool}.json"))
    for file in (log, results.path):
        file.unlink(missing_ok=True)
    command = [find("compute-sanitizer"), "--tool", tool, "--error-exitcode", "1"]
    command += ["--report-api-errors", "no", "--target-processes", "all", "--log-file", str(log)]
    small = [sys.executable, "-m", "benchmarks.gpu.small", "--backend", "cuda", "--runs", "1"]
    small += ["--json", str(results.path), "--patience", "600"]
    # Each tensor an allocation of its own: otherwise what is read or written beyond its end is a
    # neighbour's in the same block, and nobody notices.
    status = call([*command, *small], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    said = show(log)
    if status and not any(entry["status"] in ("right", "wrong") for entry in results.read()):
        skip_if_refused("compute-sanitizer", said)
    return status


def ncu(json: str, logs: str) -> int:
    """Clocks stay as they are: the measured times are of such, too."""
    command = [find("ncu"), "--clock-control", "none", "--target-processes", "all"]
    command += ["--launch-count", "1", "--profile-from-start", "off", "--set", "detailed"]
    results, failures = Results(Path(json)), 0
    wanted = heaviest(results.latest("kernels"))
    if not wanted:
        skip("no kernel has been listed")
    from benchmarks.gpu.times import cases

    numbers = {name_of(case.entry("")): n for n, case in enumerate(cases(dry_run()))}
    for kernel, entry in wanted:
        log = Path(logs, f"ncu-{entry['backend']}-{kernel}.txt")
        chosen = ["--kernel-name", kernel, "--log-file", str(log)]
        once = [sys.executable, "-m", "benchmarks.gpu.times", "once"]
        once += ["--start", str(numbers[name_of(entry)]), *(["--dry-run"] if dry_run() else [])]
        print("$", *command, *chosen, *once, flush=True)
        log.unlink(missing_ok=True)
        try:
            status = subprocess.call([*command, *chosen, *once], cwd=ROOT, timeout=KERNEL_SECONDS)
            reason = f"exit status {status}"
        except subprocess.TimeoutExpired:
            reason = f"not done within {KERNEL_SECONDS} s"
        said = show(log)
        metrics = metrics_of(said)
        if not metrics:
            skip_if_refused("ncu", said)
            failures += 1
        outcome = {"status": "listed"} if metrics else {"status": "failed", "reason": reason}
        about = {name: value for name, value in entry.items() if name != "kernels"}
        about |= {"what": "ncu", "kernel": kernel}
        results.append({**about, **outcome, "metrics": metrics})
    return int(failures > 0)


def show(log: Path) -> str:
    """What a tool said."""
    said = log.read_text(errors="replace") if log.exists() else ""
    print(said, flush=True)
    return said


def skip_if_refused(tool: str, said: str) -> None:
    """Some virtual machines do not let tools at the device."""
    errors = re.findall(r"^=+ ?(?:ERROR==|Error:) *(.*)", said, re.MULTILINE)
    for error in errors:
        if not error.startswith(OURS):
            skip(f"{tool} cannot run here: {error}")


def heaviest(listed: Sequence[Entry], count: int = HEAVIEST) -> list[tuple[str, Entry]]:
    """Our kernels that take longest, of each backend in turn, and of each the first call listed:
    shapes come in the order of worth.
    """
    found: dict[str, dict[str, tuple[float, Entry]]] = {}
    for entry in listed:
        for kernel in entry.get("kernels", []):
            name = base_name(kernel["name"])
            if name is not None:
                of_backend = found.setdefault(entry["backend"], {})
                of_backend.setdefault(name, (kernel["seconds"], entry))
    columns = [sorted(kernels.items(), key=lambda item: -item[1][0]) for kernels in found.values()]
    rows = itertools.zip_longest(*columns)
    return [(item[0], item[1][1]) for row in rows for item in row if item is not None][:count]


def base_name(name: str) -> str | None:
    """sum_kernel of "sum_kernel" or "void pfgm::(anonymous namespace)::sum_kernel<2>(Params)"; None
    of what PyTorch and its libraries launch.
    """
    if "::" in name and "pfgm::" not in name:
        return None
    found = re.match(r"(?:.*::)?(\w+_kernel)(?:<|\(|$)", name)
    return found and found[1]


def metrics_of(text: str) -> dict[str, str]:
    """What the tables say that ncu prints, of names, units and values under lines of dashes."""
    found, columns = {}, []
    for line in text.splitlines():
        if re.fullmatch(r" +-+ -+ -+", line):
            columns = [match.span() for match in re.finditer("-+", line)]
        elif columns:
            name, unit, value = (line[start:end].strip() for start, end in columns)
            if re.fullmatch(r"[\d.,]+", value):
                found[name] = f"{value} {unit}".strip()
    return found


STAGES: dict[str, Callable[..., int]] = {
    "build": build,
    "intrinsics": intrinsics,
    "check": check,
    "memcheck": functools.partial(sanitize, "memcheck"),
    "racecheck": functools.partial(sanitize, "racecheck"),
    "ncu": ncu,
}

if __name__ == "__main__":
    sys.exit(STAGES[sys.argv[1]](*(word for word in sys.argv[2:] if word != "--dry-run")))
