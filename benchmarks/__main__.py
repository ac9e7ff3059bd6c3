# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks [--out FOLDER] [pytest options]`: runs the suite, saves the JSON in the
folder and prints its table.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.report import table

HERE = Path(__file__).parent


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="the JSON's folder")
    own, arguments = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run.json"
        options = ["-q", "-o", "addopts=", "--benchmark-quiet", f"--benchmark-json={output}"]
        code = pytest.main([str(HERE), *options, *arguments])
        content = output.read_text() if output.exists() else ""
    if not content:
        return int(code)
    run = json.loads(content)
    machine, commit = run["machine_info"], run["commit_info"]
    dirty = "-dirty" if commit["dirty"] else ""
    threads = "" if "driver" in machine else f"-{machine['threads']}-threads"
    name = f"{machine['device']}{threads}-{commit['id'][:12]}{dirty}"
    path = own.out / (re.sub(r"[^a-z0-9]+", "-", name.lower()) + ".json")
    path.write_text(json.dumps(run, indent=1) + "\n")
    print(f"\n{table(run)}\n\nSaved as {path}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
