# SPDX-License-Identifier: Apache-2.0
"""What a run tells while it goes on: TensorBoard's curves, and ``stats.jsonl``, a line a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pfgm_kernels.files import naming, write_bytes

STATS = "stats.jsonl"
Report = Callable[[dict[str, float], int], None]


@contextmanager
def reports(folder: Path, step: int) -> Iterator[Report]:
    """Yields a function (values by name, step) that adds to both. What a killed run reported of
    steps after ``step`` is dropped.
    """
    from torch.utils.tensorboard import SummaryWriter

    curves, stats = folder / "tensorboard", folder / STATS
    _forget(stats, step)
    with naming(curves):
        writer = SummaryWriter(curves, purge_step=step + 1)

    def report(values: dict[str, float], step: int) -> None:
        with naming(curves):
            for name, value in values.items():
                writer.add_scalar(name, value, step)
        with naming(stats), open(stats, "a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")

    try:
        yield report
    finally:
        with naming(curves):
            writer.close()


def read_stats(path: Path) -> list[dict[str, float]]:
    """The lines of ``stats.jsonl``; the last one may have been cut off when the run was killed."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _forget(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_stats(path) if line["step"] <= step]
    write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
