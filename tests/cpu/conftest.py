# SPDX-License-Identifier: Apache-2.0
"""What the tests of the CPU kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

try:
    from pfgm_kernels import _C
except ImportError:
    _C = None


@pytest.fixture(scope="module", params=["portable", "avx2", "avx512", "avx512vnni"])
def instruction_set(request: pytest.FixtureRequest, poison: None) -> Iterator[str]:
    """Each one that this processor has, in use until the module's tests are done."""
    original = _C.build_info()["instruction set"]
    try:
        _C.use_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    assert _C.build_info()["instruction set"] == request.param
    yield request.param
    _C.use_instruction_set(original)
