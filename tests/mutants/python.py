# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the Python layers: those that python.txt lists, each with the tests of its layer."""

from __future__ import annotations

import shlex
from pathlib import Path

from mutants.runner import Found, Mutant, read, run_pytest

TITLE = "The Python layers"
ABOUT = "Found by the first test that fails. The mistakes stand in `tests/mutants/python.txt`."
COLUMNS = ("found by",)


def mutants() -> list[Mutant]:
    return read(Path(__file__).with_suffix(".txt"))


class Worker:
    def __init__(self, tree: Path) -> None:
        self.tree = tree

    def __call__(self, mutant: Mutant | None) -> Found:
        wanted = [mutant] if mutant else mutants()
        arguments = dict.fromkeys(part for m in wanted for part in shlex.split(m.tests))
        return {"found by": run_pytest(self.tree, list(arguments))}
