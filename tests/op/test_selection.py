# SPDX-License-Identifier: Apache-2.0
"""Do the parts of the tests hold what they say: on each backend, every test, value and case?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import selection
from cases import CASES


def of_tests(items: set[pytest.Item]) -> dict[str, set[tuple[str, str]]]:
    """The values of the parameters of each test."""
    found: dict[str, set[tuple[str, str]]] = {}
    for item in items:
        found.setdefault(item.nodeid.partition("[")[0], set()).update(selection.values(item))
    return found


def test_the_thin_part(backend, request):
    collected = request.config.stash[selection.COLLECTED]
    here = [item for item in collected if selection.place(item) == backend.name]
    if not {*CASES} <= {selection.named_case(item) for item in here}:
        pytest.skip("not all tests of the op are there to choose from")
    slow = set(here) if backend.interpreted else set()
    interpreted = slow if backend.name == "triton" else set()
    parts = {
        part: selection.choose(here, part, slow - interpreted, interpreted)
        for part in (*selection.PARTS, None)
    }
    thin = parts["thin"]
    assert {*CASES} <= {selection.named_case(i) for i in thin if "float64" not in i.nodeid}
    assert 3 * len(thin) < 2 * len(here)
    everything = of_tests({item for item in here if not item.get_closest_marker("exhaustive")})
    if not slow:
        assert of_tests(thin) == everything
    around = {name for name in everything if name.startswith(selection.AROUND)}
    assert around
    assert everything.keys() - of_tests(thin).keys() <= around
    assert not parts["rest"] & thin
    assert parts["rest"] | thin == parts[None] >= parts["spread"]


@pytest.mark.exhaustive
def test_a_kernel_that_no_test_runs_is_a_failure():
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    options = ["-q", "-n", "2", "--every-kernel", "-k", "triton and a_single_source"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/op/test_accuracy.py"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert run.returncode == pytest.ExitCode.TESTS_FAILED
    assert " failed" not in run.stdout
    missing = run.stdout.partition("kernels that no test has run:\n")[2]
    assert "  products.compare_kernel\n" in missing
