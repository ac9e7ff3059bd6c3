# SPDX-License-Identifier: Apache-2.0
"""The table of a run: `python -m benchmarks.report benchmarks/results/FILE.json`, in Markdown."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.chips import chip_of
from benchmarks.roofline import floor, operations

Row = dict[str, Any]

SOURCES = {"normal": "standard normal", "synthetic": "synthetic images, queries of Eq. 11"}
TITLES = {"forward": "field", "gradient": "field and its gradients for x and t"}
OF_PEAK = (
    "4·B·N·d operations (10·B·N·d with gradients) in the time, relative to the measured peak of "
    "fused multiply-adds."
)
OF_FLOOR = (
    "the least time that this chip can take (benchmarks/roofline.md; for 8-bit references where "
    "the data are images), relative to the time."
)
COLUMNS = (
    "provider",
    "median ms",
    "p20–p80",
    "rounds",
    "speed-up",
    "of peak",
    "worst error",
    "extra MiB",
    "note",
)


def rows(run: dict[str, Any]) -> list[Row]:
    """Each provider on each problem, timed or not, with its `seconds` (rounds,)."""
    timed = [{**b["extra_info"], "seconds": b["stats"]["data"]} for b in run["benchmarks"]]
    return timed + run["not_timed"]


def table(run: dict[str, Any]) -> str:
    """The whole run as Markdown: how it was made, then one table for each problem."""
    problems: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows(run):
        problems[tuple(row["shape"].values()), row["direction"]].append(row)
    machine = run["machine_info"]
    return "\n\n".join([_header(run), *(_problem(group, machine) for group in problems.values())])


def _header(run: dict[str, Any]) -> str:
    machine, commit = run["machine_info"], run["commit_info"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    dirty = " with uncommitted changes" if commit["dirty"] else ""
    peak, products = machine["fma_peak_gflops"], machine["sgemm_gflops"]
    cpu = f"{machine['threads']} threads, {machine['simd']}"
    measured = [f"fused multiply-add peak {peak:,.0f} GFLOP/s"] if peak else []
    for name, gflops in products.items():
        share = f" ({gflops / peak:.0%} of the peak)" if peak else ""
        measured.append(f"float32 matrix product by {name} {gflops:,.0f} GFLOP/s{share}")
    gpu = f"driver {machine['driver']}" if machine.get("driver") else ""
    return (
        f"{machine['device']}, {gpu or cpu}; {versions}; "
        f"revision {commit['id'][:12]}{dirty}; {run['datetime'][:16].replace('T', ' ')} UTC\n\n"
        f"Measured in the same run: {', '.join(measured) or 'no speeds of the processor'}.\n\n"
        "Speed-up: how many times faster than the fastest peer of the same run. Worst error: of a "
        "row against float64 direct differences, relative, divided by its condition number (for "
        "gradients: relative to the sum of the sizes of its terms). Of peak: "
        + (OF_PEAK if chip_of(machine["device"]) is None else OF_FLOOR)
    )


def _problem(group: list[Row], machine: dict[str, Any]) -> str:
    peers = [row for row in group if row["status"] == "timed" and not row["ours"]]
    fastest = min(peers, key=lambda row: median(row["seconds"]), default=None)
    winner = "none was timed" if fastest is None else fastest["provider"]
    lines = [COLUMNS, *(_cells(row, fastest, machine) for row in group)]
    heading = f"### {title(group[0]['shape'])}: {TITLES[group[0]['direction']]}"
    return f"{heading}\n\nFastest peer: {winner}.\n\n{markdown(lines)}"


def title(shape: dict[str, Any]) -> str:
    """A shape in words, and its data."""
    data = SOURCES.get(shape["source"], f"{shape['source']}, queries of Eq. 11")
    return f"{shape['B']} × {shape['N']}, d = {shape['d']}, {data}"


def markdown(lines: Sequence[tuple[str, ...]]) -> str:
    """A table of which the first line is the head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]
    rule = "|".join(["", *("-" * (width + 2) for width in widths), ""])
    return "\n".join([text[0], rule, *text[1:]])


def _cells(row: Row, fastest: Row | None, machine: dict[str, Any]) -> tuple[str, ...]:
    error = "–" if row["error"] is None else f"{row['error']:.1e}"
    memory = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.1f}"
    if row["status"] != "timed":
        note = f"{row['status']}, not timed: expected at most {row['tolerance']:.0e}"
        note = note if row["status"] == "wrong" else f"{row['status']}: {row['note']}"
        return (row["provider"], "–", "–", "–", "–", "–", error, memory, note)
    milliseconds = 1e3 * np.asarray(row["seconds"])
    middle = float(np.median(milliseconds))
    low, high = np.quantile(milliseconds, [0.2, 0.8])
    ratio = "–" if fastest is None else figures(1e3 * median(fastest["seconds"]) / middle)
    return (
        row["provider"],
        figures(middle),
        f"{figures(low)}–{figures(high)}" if len(milliseconds) > 2 else "–",
        str(len(milliseconds)),
        ratio,
        _share(row, middle / 1e3, machine),
        error,
        memory,
        row["note"],
    )


def _share(row: Row, seconds: float, machine: dict[str, Any]) -> str:
    """How much of what the hardware can do: of the floor of a GPU that roofline.py knows, else of
    the measured peak.
    """
    shape, gradient = row["shape"], row["direction"] == "gradient"
    size = (shape["B"], shape["N"], shape["d"])
    chip, peak = chip_of(machine["device"]), machine["fma_peak_gflops"]
    if chip is not None:
        references = "float32" if shape["source"] == "normal" else "uint8"
        return f"{floor(chip, *size, references, gradient).seconds / seconds:.1%}"
    return "–" if peak is None else f"{operations(*size, gradient) / seconds / 1e9 / peak:.1%}"


def figures(value: float) -> str:
    """Three significant figures, without an exponent."""
    return f"{value:,.{max(0, 2 - int(np.floor(np.log10(value))))}f}"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
