# SPDX-License-Identifier: Apache-2.0
"""Tests the tests: does one of them fail for each mistake put into the sources?

python tests/mutants [SET ...] [--jobs N] [--only WORD] [--log FILE] [--list | --table FILE]
runs the sets named, all where none is. See runner.py for what a set is.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

# With this folder itself there, torch would find cuda.py where it looks for NVIDIA's package.
sys.path[0] = str(Path(__file__).parents[1])
from mutants import runner  # noqa: E402

SETS = ("python", "cpu", "cuda")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="of the mistakes whose row has the word")
    parser.add_argument("--list", action="store_true", help="the mistakes, of which none is run")
    parser.add_argument("--table", type=Path, help="the page whose tables are written anew")
    parser.add_argument("--log", type=Path, help="where results are kept, and not looked for again")
    options = parser.parse_args()
    if unknown := set(options.sets) - set(SETS):
        parser.error(f"expected sets of {', '.join(SETS)}, got {', '.join(sorted(unknown))}")
    if options.only and options.table:
        parser.error("--table expects whole sets, got --only")
    sections, missed = {}, 0
    for name in options.sets or SETS:
        suite = importlib.import_module(f"mutants.{name}")
        everything = list(suite.mutants())
        rows = {m: f"{m.place} {m.what} {m.change}" for m in everything}  # every text is there
        harmless = [m for m in everything if m.harmless]
        wanted = [m for m in everything if not m.harmless and options.only in rows[m]]
        if options.list:
            print(*(rows[m] for m in wanted), sep="\n")
            continue
        log = runner.Log(options.log)
        results = runner.run(suite, wanted, options.jobs, log)
        sections[suite.TITLE] = runner.table(suite, results, harmless)
        missed += sum(not any(found.values()) for found in results.values())
        print(sections[suite.TITLE], flush=True)
        if options.table:
            runner.write(options.table, sections)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
