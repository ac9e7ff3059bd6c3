# SPDX-License-Identifier: Apache-2.0
"""Do the threads have equal shares of the work, whatever the number of queries? Counted, not timed.

Run by itself it prints the table: the work of the busiest thread over the mean.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "cpp" / "shares.cpp"
MOST = 1.05
STAGES = {
    *("direct-3", "direct-12", "fused-40", "exact-40", "references-40"),
    *(f"{stage}-{d}" for stage in ("products", "weights", "sums") for d in (784, 3072)),
}


def count() -> list[tuple[str, int, int, int, float]]:
    """stage, queries, threads that may be used, tasks, imbalance."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "shares")
        flags = ["-std=c++17", "-O1", "-fopenmp", "-Wno-psabi"]
        subprocess.run(["g++", *flags, "-o", program, SOURCE], check=True)
        lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in lines.splitlines()]
    return [(s, int(b), int(t), int(n), float(i)) for s, b, t, _, n, i in rows]


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_no_thread_has_more_than_its_share():
    rows = count()
    assert {row[0] for row in rows} == STAGES
    assert {row[2] for row in rows} == {1, 2, 4, 8, 16, 64}
    assert [row for row in rows if row[-1] > MOST] == []


def main() -> None:
    table: dict[str, dict[int, float]] = defaultdict(dict)
    for stage, _, threads, _, imbalance in count():
        table[stage][threads] = max(imbalance, table[stage].get(threads, 0))
    for stage, worst in table.items():
        print("|", stage, "|", " | ".join(f"{worst[t]:.3f}" for t in sorted(worst)), "|")


if __name__ == "__main__":
    sys.exit(main())
