# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the Python layers."""

from __future__ import annotations

from pathlib import Path

from mutants.runner import Found, Mutant, run_pytest

TITLE = "The Python layers"
ABOUT = "Found by the first test that fails. See the head of `tests/mutants/python.py`."
COLUMNS = ("found by",)

TESTS = {"pfgm_kernels/flow/": "tests/flow"}


def mutants() -> list[Mutant]:
    return [
        Mutant(
            "sign of the noise",
            "pfgm_kernels/flow/perturb.py",
            "x0 + scale * noise",
            "x0 + 2 * scale * noise",
        ),
        Mutant(
            "hangs",
            "pfgm_kernels/flow/perturb.py",
            "    count, device = x0.shape[0], x0.device\n",
            "    count, device = x0.shape[0], x0.device\n    while True: pass\n",
        ),
        Mutant(
            "none",
            "pfgm_kernels/flow/perturb.py",
            "    count, device = x0.shape[0], x0.device\n",
            "    count, device = x0.shape[0], x0.device\n    pass\n",
        ),
    ]


class Worker:
    def __init__(self, tree: Path) -> None:
        self.tree = tree

    def __call__(self, mutant: Mutant | None) -> Found:
        return {"found by": run_pytest(self.tree, ["tests/flow/test_perturb.py"])}
