# SPDX-License-Identifier: Apache-2.0
"""What a run tells while it goes on: TensorBoard's curves, and ``stats.jsonl``, a line a report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from pfgm_kernels.files import naming, write_bytes

CURVES, STATS = "tensorboard", "stats.jsonl"


class Reports:
    """Both, of one run."""

    def __init__(self, curves: Any, folder: Path) -> None:
        self._curves, self._folder = curves, folder

    def numbers(self, values: dict[str, float], step: int) -> None:
        with naming(self._folder / CURVES):
            for name, value in values.items():
                self._curves.add_scalar(name, value, step)
        stats = self._folder / STATS
        with naming(stats), open(stats, "a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")

    def pictures(self, images: Tensor | None, step: int) -> None:
        """A grid of images (n, channels, h, w) in [0, 1], if there are any."""
        if images is None:
            return
        with naming(self._folder / CURVES):
            self._curves.add_images("samples", images.cpu(), step)


@contextmanager
def reports(folder: Path, step: int) -> Iterator[Reports]:
    """Yields what adds to the reports of the run in ``folder``. What a killed run reported of steps
    after ``step`` is dropped.
    """
    from torch.utils.tensorboard import SummaryWriter

    curves = folder / CURVES
    _forget(folder / STATS, step)
    with naming(curves):
        writer = SummaryWriter(curves, purge_step=step + 1)
    try:
        yield Reports(writer, folder)
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
