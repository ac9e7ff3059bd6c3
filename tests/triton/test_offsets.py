# SPDX-License-Identifier: Apache-2.0
"""Do the Triton kernels keep to what 32 bits hold, whatever the sizes of a call?"""

from __future__ import annotations

import aot
import offsets
import pytest
from test_aot import KERNELS

pytest.importorskip("triton", "3.6")


@pytest.mark.exhaustive
def test_no_integer_overflows_however_large_a_call_is(tmp_path):
    found = aot.in_processes(offsets.overflows, offsets.LARGEST, str(tmp_path))
    assert set().union(*(kernels for kernels, _ in found)) == KERNELS
    assert set().union(*(overflows for _, overflows in found)) == set()


TTIR = """
module {
  tt.func public @kernel(%x_ptr: !tt.ptr<f32> {tt.divisibility = 16 : i32}, %N: i32, %tiles: i32) {
    %c2 = arith.constant 2 : i32
    %c0 = arith.constant 0 : i32
    %c1 = arith.constant 1 : i32
    %b = tt.get_program_id x : i32
    %first = arith.muli %b, %c2 : i32
    %wide = arith.extsi %N : i32 to i64
    %plane = arith.muli %wide, %wide : i64
    %count = scf.for %i = %c0 to %tiles step %c1 iter_args(%sum = %c0) -> (i32)  : i32 {
      %more = arith.addi %sum, %c2 : i32
      scf.yield %more : i32
    }
    %end = scf.while (%start = %c0) : (i32) -> i32 {
      %on = arith.cmpi slt, %start, %count : i32
      scf.condition(%on) %start : i32
    } do {
    ^bb0(%start: i32):
      %next = arith.addi %start, %c2 : i32
      scf.yield %next : i32
    }
    tt.return
  }
}
"""


@pytest.mark.parametrize(
    ("integers", "programs", "overflows"),
    [
        ({"N": 10**9, "tiles": 10**9}, 10**9, set()),
        ({"N": 10**9, "tiles": 10**9}, 2 * 10**9, {"%first"}),
        ({"N": 10**9, "tiles": 1_073_741_824}, 10**9, {"%more", "%next"}),
    ],
)
def test_what_overflows_is_named(integers, programs, overflows):
    """As what a program is, as what a loop adds up, and as what one without an end counts to."""
    found = offsets.Evaluation("a kernel", integers, (programs,)).run(TTIR)
    assert {sentence.split()[2] for sentence in found} == overflows, found
