# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks [pytest options]`: runs the suite, saves the JSON, prints the table."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.report import table

HERE = Path(__file__).parent


def main(arguments: list[str]) -> int:
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
    name = f"{machine['device']}-{machine['threads']}-threads-{commit['id'][:12]}{dirty}"
    path = HERE / "results" / (re.sub(r"[^a-z0-9]+", "-", name.lower()) + ".json")
    path.write_text(json.dumps(run, indent=1) + "\n")
    print(f"\n{table(run)}\n\nSaved as {path}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
