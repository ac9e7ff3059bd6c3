# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.gpu [--dry-run] [first | second [JSON]]`: what gpu.sh does."""

from __future__ import annotations

import argparse
import os
import site as python_site
import sys
from pathlib import Path

from benchmarks.gpu.results import Entry, Results, table
from benchmarks.gpu.runner import Runner, say
from benchmarks.gpu.stages import SECONDS, Site, first, second

ROOT = Path(__file__).parents[2]
CALLS = ("first", "second")
NEVER = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE", "CUDA_LAUNCH_BLOCKING")
"""Some containers set these, and float32 products would no longer be float32, or times no times."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu.sh", allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, on tiny shapes")
    parser.add_argument("call", nargs="?", choices=CALLS, help="one of the two; else both")
    parser.add_argument("json", nargs="?", type=Path, help="what the first call left")
    given = parser.parse_args()
    if given.json is not None and not given.json.exists():
        parser.error(f"{given.json} is not there")
    name = "gpu-dry-run" if given.dry_run else "gpu"
    out = ROOT / (os.environ.get("OUT") or f"out/{name}")
    site = Site(out.resolve(), ROOT / "build" / name, given.dry_run)
    before = given.json or site.logs / "gpu.json"
    site.out.mkdir(parents=True, exist_ok=True)
    site.work.mkdir(parents=True, exist_ok=True)
    prepare_environment(site)
    passed, seconds = True, SECONDS * site.patience
    for call in [given.call] if given.call else CALLS:
        known: list[Entry] = []
        if call == "second":
            try:
                known = Results(before).read()
            except ValueError as error:
                parser.error(str(error))
            if not known:
                say(f"There are no results of a first call in {before}.")
        waves = first(site) if call == "first" else second(site, known)
        say(f"{call} call, {seconds} s at most: results in {site.results.path}")
        passed &= Runner(call, site.results, site.logs, seconds).run(waves)
    say(f"\n{table(site.results.read())}\n")
    for entry in site.results.latest("stage"):
        say(f"{entry['call']:<7}{entry['stage']:<11}{entry['status']}  {entry['reason']}")
    return int(not passed)


def prepare_environment(site: Site) -> None:
    for name in NEVER:
        os.environ.pop(name, None)
    os.environ.update(site.environment)
    if not os.access(Path.home(), os.W_OK):
        os.environ["PYTHONUSERBASE"] = python_site.getuserbase()
        os.environ["HOME"] = str(site.work)


if __name__ == "__main__":
    sys.exit(main())
