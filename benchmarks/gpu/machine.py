# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.gpu.machine --json FILE`: what runs here, and what it can do at best.

Ends with one sentence where there is no GPU, unless it is told that this is a dry run.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

try:
    import torch
except ImportError as error:
    sys.exit(f"gpu.sh needs torch, which {sys.executable} does not have ({error}): PYTHON names it")

from benchmarks.gpu.results import Entry, Results
from benchmarks.machine import gpu
from benchmarks.measure import timed

ROOT = Path(__file__).parents[2]
WANTED = [
    *("triton", "numpy", "ninja", "pybind11", "setuptools", "typer", "pytest", "hypothesis"),
    *("pytest-benchmark", "pytest-xdist", "pytest-timeout", "pykeops"),
]
ROUNDS = 10


def main(json: Path, dry_run: bool) -> int:
    if not dry_run and not torch.cuda.is_available():
        print(f"gpu.sh needs an NVIDIA GPU; torch {torch.__version__} finds none here")
        return 1
    device = torch.device("cpu" if dry_run else "cuda")
    entry = describe(device)
    Results(json).append({"what": "machine", "status": "listed", "dry_run": dry_run, **entry})
    print(*(f"{name}: {value}" for name, value in entry.items()), sep="\n")
    return 0


def describe(device: torch.device) -> Entry:
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        **(gpu(device) if on_gpu else {}),
        "revision": revision(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{name: version(name) for name in WANTED},
        },
        **ceilings(device),
    }


def revision() -> str:
    """Of the tree; one that came without its history is told by PFGM_REVISION."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("PFGM_REVISION") or "unversioned"
    return found.stdout.strip()


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def ceilings(device: torch.device) -> dict[str, Any]:
    """Bytes a second that a large copy reads and writes, and operations a second of a large product
    of random bfloat16 matrices: medians.
    """
    on_gpu = device.type == "cuda"
    count, size = 1 << 20, 64
    if on_gpu:
        count, size = min(1 << 32, torch.cuda.mem_get_info(device)[0] // 8), 8192
    source = torch.ones(count // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    calls = {
        "copy_bytes_per_second": (lambda: (target.copy_(source),), 2 * count),
        "bfloat16_operations_per_second": (lambda: (a @ b,), 2 * size**3),
    }
    for call, _ in calls.values():
        call()
    return {
        name: work / sorted(timed(call, device, 3) for _ in range(ROUNDS))[ROUNDS // 2]
        for name, (call, work) in calls.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    sys.exit(main(given.json, given.dry_run))
