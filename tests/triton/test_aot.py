# SPDX-License-Identifier: Apache-2.0
"""Do the Triton kernels compile for each chip, without spilling and onto its tensor cores?"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import aot
import pytest

from pfgm_kernels.backends import triton as backend

pytest.importorskip("triton", "3.6")

KERNELS = {
    f"{source.stem}.{name}"
    for source in Path(backend.__file__).parent.glob("*.py")
    for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(encoding="utf-8"), re.M)
}


def by_version(*chips: str) -> pytest.MarkDecorator:
    """All chips with the Triton that is installed; with the oldest one chip for each kind of
    product, of which sm_120 has the least memory. `make aot` tries all with both.
    """
    absent = pytest.mark.skipif(
        not aot.OLDEST.exists(), reason=f"{aot.OLDEST} is not there: make aot tries it"
    )
    installed = [pytest.param(chip, None, id=f"{chip}-installed") for chip in chips]
    oldest = [
        pytest.param(chip, aot.OLDEST, id=f"{chip}-oldest", marks=absent)
        for chip in chips
        if chip in ("sm_90", "sm_120")
    ]
    return pytest.mark.parametrize(("chip", "folder"), installed + oldest)


def problems(found: list[aot.Compiled | aot.Failed]) -> str:
    return "\n".join(problem for c in found for problem in c.problems)


@pytest.mark.exhaustive
@by_version(*aot.CHIPS)
def test_each_kernel_compiles_and_keeps_to_the_limits_of_the_chip(tmp_path, chip, folder):
    here = aot.compile_all(aot.REPRESENTATIVES, str(tmp_path), [chip], folder, once=True)
    assert not problems(here)
    assert {c.kernel for c in here} == KERNELS
    assert {"products.compare_kernel", "products.sum_kernel"} <= {c.kernel for c in here if c.dots}


@pytest.mark.exhaustive
@by_version("sm_90")
def test_each_kernel_compiles_for_one_query_and_one_reference(tmp_path, chip, folder):
    here = aot.compile_all(aot.ONES, str(tmp_path), [chip], folder, once=True)
    assert not problems(here)
    assert {c.kernel for c in here} == KERNELS


GOOD = aot.Compiled(
    kernel="a_kernel",
    use="a use",
    chip="sm_120",
    triton="3.6.0",
    warps=8,
    registers=168,
    spill=32,
    shared=101_376,
    dots=3,
    instructions={"mma.sync.aligned.m16n8k16.bf16": 8},
    narrow=0,
    carried=0,
)


def test_what_keeps_to_the_limits_is_no_problem():
    assert GOOD.problems == []
    wgmma = {"wgmma.mma_async.m64n128k16.bf16": 8}
    assert replace(GOOD, chip="sm_90", triton="3.9.0", instructions=wgmma).problems == []


def test_what_does_not_compile_is_named():
    (problem,) = aot.Failed("a_kernel", "a use", "sm_80", "3.6.0", "no such name").problems
    assert problem == "a_kernel (a use) does not compile for sm_80 by Triton 3.6.0: no such name"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spill": 40}, "spills 40 bytes a thread, the limit is 32"),
        ({"shared": 102_400}, "takes 102400 bytes of shared memory of 101376"),
        ({"instructions": {}}, "no tensor core instruction"),
        (
            {"instructions": {"mma.sync.aligned.m16n8k8.tf32": 8}},
            "has mma.sync.aligned.m16n8k8.tf32",
        ),
        ({"dots": 0}, "expected none"),
        ({"narrow": 64}, "has 64 loads of a single bfloat16"),
        ({"carried": 1}, "has 1 sums of products that do not begin at zero"),
        (
            {"chip": "sm_90", "instructions": {"wgmma.mma_async.m64n128k16.bf16": 8}},
            "has 8 warps, the limit is 4",
        ),
    ],
)
def test_a_limit_that_is_exceeded_is_named(change, words):
    (problem,) = replace(GOOD, **change).problems
    assert problem.startswith("a_kernel (a use) on sm_")
    assert words in problem


CARRIED = """
    %sum:2 = scf.for %i = %c0 to %width step %c64 iter_args(%sum_1 = %zero, %at = %c0) -> (f, i) {
      %total = tt.dot %a, %b, %zero, inputPrecision = ieee : t * t -> t
      %total_2 = tt.dot %a, %b, %total, inputPrecision = ieee : t * t -> t
"""


def test_sums_of_products_that_go_through_a_loop_are_seen():
    assert aot.carried_products(CARRIED, "sm_90") == 0
    assert aot.carried_products(CARRIED.replace("%b, %zero", "%b, %sum_1"), "sm_90") == 1
