# SPDX-License-Identifier: Apache-2.0
"""Does a run save what the report needs, and does the report show it?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks.providers import providers
from benchmarks.report import table


def run_json(**rows: dict[str, Any]) -> dict[str, Any]:
    shape = {"B": 8, "N": 16, "d": 3072, "source": "cifar10"}
    common = {
        "shape": shape,
        "direction": "forward",
        "ours": False,
        "tolerance": 1e-2,
        "status": "timed",
        "note": "",
        "queries": 8,
        "error": 2.5e-5,
        "peak_bytes": 3 << 20,
    }
    made = [{**common, "provider": name, **row} for name, row in rows.items()]
    timed = [row for row in made if row["status"] == "timed"]
    return {
        "machine_info": {
            "device": "Some CPU",
            "threads": 2,
            "simd": "AVX2",
            "fma_peak_gflops": 200.0,
            "sgemm_gflops": {"mkl": 150.0, "onednn": 170.4},
            "versions": {"torch": "2.13.0", "python": "3.11.7"},
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "datetime": "2026-01-02T03:04:05.6+00:00",
        "benchmarks": [
            {
                "extra_info": {key: row[key] for key in row if key != "seconds"},
                "stats": {"data": row["seconds"]},
            }
            for row in timed
        ],
        "not_timed": [row for row in made if row["status"] != "timed"],
    }


def test_the_report_shows_every_row_and_the_ratio_to_the_fastest_peer() -> None:
    text = table(
        run_json(
            slow={"seconds": [0.4, 0.4, 0.4]},
            fast={"seconds": [0.3, 0.1, 0.2]},
            mine={"seconds": [0.05], "ours": True, "error": 3e-8},
            bad={"status": "wrong", "seconds": [], "error": 0.5},
            big={"status": "refused", "seconds": [], "error": None, "note": "out of memory"},
        )
    )
    lines = text.splitlines()
    cells = {
        parts[1]: parts[2:-1]
        for line in lines
        if len(parts := [*map(str.strip, line.split("|"))]) > 2
    }
    assert "### 8 × 16, d = 3072, cifar10, queries of Eq. 11: field" in lines
    assert "Fastest peer: fast." in lines
    assert "revision 0123456789ab with uncommitted changes; 2026-01-02 03:04 UTC" in text
    assert "fused multiply-add peak 200 GFLOP/s" in text
    assert "float32 matrix product by onednn 170 GFLOP/s (85% of the peak)" in text
    assert cells["slow"][:7] == ["400", "400–400", "3", "0.500", "0.0%", "2.5e-05", "3.0"]
    assert cells["fast"][:4] == ["200", "140–260", "3", "1.00"]
    assert cells["mine"][:6] == ["50.0", "–", "1", "4.00", "0.0%", "3.0e-08"]
    assert cells["bad"][0] == "–"
    assert "wrong" in cells["bad"][7]
    assert cells["big"][7] == "refused: out of memory"


@pytest.mark.parametrize(("direction", "expected"), [("forward", "25.0%"), ("gradient", "62.5%")])
def test_the_share_of_the_peak_counts_useful_operations(direction: str, expected: str) -> None:
    """4 (10) · 128 · 50,000 · 3072 operations in 1.57 s at a peak of 200 · 10⁹ a second."""
    shape = {"B": 128, "N": 50_000, "d": 3072, "source": "cifar10"}
    seconds = 4 * 128 * 50_000 * 3072 / 50e9
    run = run_json(mine={"seconds": [seconds], "shape": shape, "direction": direction})
    assert f"| {expected} " in table(run)
    run["machine_info"] |= {"fma_peak_gflops": None, "sgemm_gflops": {}}
    assert "%" not in table(run)


@pytest.mark.exhaustive
def test_a_run_saves_what_the_report_needs(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    output = tmp_path / "run.json"
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--benchmark-json={output}"]
    selection = "64x1024-d2 and forward and ReferenceSet"
    # A worker of this run would be taken for one of that run, which then measures nothing.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", *options, "-k", selection],
        cwd=root,
        env=environment,
        check=True,
        capture_output=True,
        timeout=120,
    )
    run = json.loads(output.read_text())
    names = [entry["extra_info"]["provider"] for entry in run["benchmarks"]]
    expected = [
        provider.name
        for provider in providers(torch.device("cpu"))
        if "ReferenceSet" in provider.name
    ]
    assert names == expected
    assert run["machine_info"]["versions"]["torch"] == torch.__version__
    assert run["machine_info"]["threads"] >= 1
    assert {"fma_peak_gflops", "sgemm_gflops"} <= run["machine_info"].keys()
    assert "node" not in run["machine_info"]
    assert "id" in run["commit_info"]
    for entry in run["benchmarks"]:
        assert entry["extra_info"]["error"] <= entry["extra_info"]["tolerance"]
        assert entry["stats"]["rounds"] == len(entry["stats"]["data"])
    assert all(name in table(run) for name in expected)
