# SPDX-License-Identifier: Apache-2.0
"""Are the CUDA kernels launched with as many blocks as a grid has, whatever the sizes of a call?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sizes import DIMENSIONS, call_all

from pfgm_kernels.backends import _native, cuda

REASON = cuda.unsupported_reason(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"cuda, emulated: {REASON}")


@pytest.fixture
def counted(monkeypatch) -> dict[str, int]:
    """Entry points count what they would launch, and the workspace that they need."""
    found: dict[str, int] = {}
    somewhere = 1 << 20  # an address: nothing is read

    def launch(entry: str, **arguments: Any) -> int:
        arguments = {
            name: somewhere if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
            if name != "workspace"
        }
        found[entry] = getattr(_native._C, entry)(**arguments)
        return found[entry]

    monkeypatch.setattr(_native, "launch", launch)
    return found


@pytest.mark.parametrize("d", DIMENSIONS)
def test_calls_of_any_size_are_launched_as_a_gpu_can(counted, d):
    call_all(cuda, d)
    assert {"field_forward_cuda", "field_backward_cuda", "field_begin_cuda"} <= counted.keys()


def test_more_blocks_than_a_grid_has_are_refused(counted):
    with pytest.raises(ValueError, match="more blocks than a grid has"):
        _native.launch(
            "field_finish_cuda",
            batch=2**40,
            count=1,
            dim=3072,
            half_k=1.0,
            values=torch.empty(1, 3072),
            value_type="float32",
        )
