# SPDX-License-Identifier: Apache-2.0
"""The JSON of a run on a GPU: a list of objects, each added as soon as it is known.

    what        "machine": a call begins; the device, versions and measured ceilings
                "stage"    one stage of the call, with `call`, `stage`, `reason`, `seconds`, `log`
                           and, of tests, `failed`: the names of those to run again
                "small"    every kernel on a shape that fits no tile
                "time"     the field of one shape; "kernels": what it launches
                "race"     a provider of the benchmark (see measure.Result)
                "ncu"      one kernel in Nsight Compute, `metrics`: {name: "value unit"}
    status      one of GOOD, BAD, or "skipped" or "refused" for a reason
    shape       {B, N, d, source}; stored: "float32" or "uint8" references
    direction   "forward", "backward" (alone) or "both"; of a race "forward" or "gradient"
    backend     "triton", "cuda"; of a race `provider`
    error       worst row against float64 direct differences, relative, divided by its condition
                number (gradients: by the sum of the sizes of their terms); not above `tolerance`
    seconds     of a call, by the GPU's clock, for each round; graph_seconds: of the replays of a
                CUDA graph, null where there is none, for the `graph_reason`
    kernels     [{name, launches, seconds}] of one call, the longest first
    reason      why the status is what it is

Times stand there only where the result was right. An error that is no number is "inf" or "nan". An
entry counts until a later one of the same what, shape, stored, direction and backend.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

Entry = dict[str, Any]

GOOD = ("passed", "right", "timed", "listed")
BAD = ("failed", "late", "interrupted", "wrong", "hung")
KEY = ("what", "call", "stage", "provider", "backend", "shape", "stored", "direction", "kernel")


class Results:
    """The file at `path`, of which several processes add to the end. A reader always finds it
    whole. Raises ValueError where it holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Entry]:
        """Of a file that is not there: nothing."""
        try:
            entries = json.loads(self.path.read_text())
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise ValueError(f"{self.path} is no JSON of gpu.sh: {error}") from error
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{self.path} is no JSON of gpu.sh: expected a list of objects")
        return entries

    def append(self, *entries: Entry) -> None:
        with self._alone():
            self._write([*self.read(), *map(_plain, entries)])

    def start(self, entries: list[Entry]) -> None:
        """With these, in place of what was there."""
        with self._alone():
            self._write(entries)

    def latest(self, *what: str) -> list[Entry]:
        """Of the entries that say the same thing of the same case the last ones, in their order."""
        return latest(self.read(), *what)

    def _write(self, entries: list[Entry]) -> None:
        lines = ",\n".join(json.dumps(entry, allow_nan=False) for entry in entries)
        work = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        work.write_text(f"[\n{lines}\n]\n")
        work.replace(self.path)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        # The folder is what is locked: a lock of its own would be one more file in it.
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def latest(entries: list[Entry], *what: str) -> list[Entry]:
    found: dict[str, Entry] = {}
    for entry in entries:
        if entry["what"] in what:
            found.pop(key(entry), None)
            found[key(entry)] = entry
    return list(found.values())


def key(entry: Entry) -> str:
    """What the entry is about."""
    return json.dumps([entry.get(name) for name in KEY], sort_keys=True)


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def table(entries: list[Entry]) -> str:
    """Lines to read: what is right, how long it takes, and the heaviest kernels."""
    launches = {key({**e, "what": "time"}): e for e in latest(entries, "kernels")}
    lines = []
    for entry in latest(entries, "small", "time"):
        words = f"{entry['status']:<8}{name_of(entry)}"
        if "error" in entry:
            words += f"  error {float(entry['error']):.1e}"
        if entry["what"] == "time" and entry["status"] == "timed":
            replay = entry["graph_seconds"]
            words += f"  {_milliseconds(entry['seconds'])}"
            words += f", graph {_milliseconds(replay)}" if replay else ""
            kernels = launches.get(key(entry), {}).get("kernels", [])
            if kernels:
                words += f", {sum(k['launches'] for k in kernels):.0f} launches, most "
                words += f"{kernels[0]['name'][:40]} {1e3 * kernels[0]['seconds']:.3g} ms"
        elif entry["status"] not in GOOD:
            words += f"  {entry.get('reason', '')[:100]}"
        lines.append(words)
    return "\n".join(lines)


def name_of(entry: Entry) -> str:
    """`triton 512x50000-d3072-synthetic float32 forward`."""
    shape = entry["shape"]
    size = f"{shape['B']}x{shape['N']}-d{shape['d']}-{shape['source']}"
    return f"{entry['backend']} {size} {entry['stored']} {entry['direction']}"


def _milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * median(seconds):.3g} ms"
