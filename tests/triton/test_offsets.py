# SPDX-License-Identifier: Apache-2.0
"""Do the Triton kernels keep to what 32 bits hold, whatever the sizes of a call?"""

from __future__ import annotations

import aot
import offsets
import pytest
from test_aot import KERNELS

pytest.importorskip("triton", "3.6")


def test_no_integer_overflows_however_large_a_call_is(tmp_path):
    found = aot.in_processes(offsets.overflows, offsets.LARGEST, str(tmp_path))
    assert set().union(*(kernels for kernels, _ in found)) == KERNELS
    assert set().union(*(overflows for _, overflows in found)) == set()
