# SPDX-License-Identifier: Apache-2.0
"""Do calls on a GPU launch as few kernels as they should? None is needed to count them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import launches

pytest.importorskip("triton", "3.6")


@pytest.mark.parametrize("problem", launches.GOALS, ids=str)
def test_a_call_launches_as_few_as_it_should(problem):
    forward, backward = launches.count(problem, launches.default_backend(problem.dim))
    assert 0 < forward.launches <= launches.GOALS[problem][0], forward
    assert 0 < backward.launches <= launches.GOALS[problem][1], backward
    assert forward.launches == sum(forward.kernels.values()) + sum(forward.calls.values())


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_8_bit_references_launch_no_more(backend):
    """What they are decoded with is no call of its own."""
    floats, codes = (
        [
            found.launches
            for found in launches.count(launches.Problem(64, 1000, 64, stored), backend)
        ]
        for stored in ("float32", "uint8")
    )
    assert codes == floats


def test_torchs_calls_are_counted_but_views_and_empty_tensors():
    x = torch.ones(3, 4)
    with launches.Calls() as calls:
        x.t().reshape(2, 6)[0].copy_(torch.empty(6) + 1)
        x.view(-1)[2:].expand(3, -1).unsqueeze(0)
        torch.sub(x, 1, out=torch.empty(3, 4))
    assert +calls.calls == {"clone": 1, "copy_": 1, "add": 1, "sub": 1}
    assert calls.allocations >= 4  # the transposed, the two empty ones and the sum


@pytest.mark.exhaustive
def test_the_table_as_json():
    code = (
        "from benchmarks import launches\n"
        "launches.GOALS, launches.OTHERS = {}, [launches.Problem(64, 100, 64)]\n"
        "launches.main()"
    )
    command = [sys.executable, "-c", code, "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert [f["direction"] for f in found] == ["forward", "backward"]
    keys = "batch count dim stored prepared direction backend launches kernels calls allocations"
    assert set(found[0]) == {*keys.split(), "host_us", "goal"}
    assert found[0]["backend"] == "triton"
