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


@pytest.mark.exhaustive
@pytest.mark.parametrize("chip", aot.CHIPS)
def test_each_kernel_compiles_and_keeps_to_the_limits_of_the_chip(tmp_path, chip):
    here = aot.compile_all(aot.REPRESENTATIVES, str(tmp_path), [chip], once=True)
    sources = Path(backend.__file__).parent.glob("*.py")
    kernels = {
        f"{source.stem}.{name}"
        for source in sources
        for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(encoding="utf-8"), re.M)
    }
    problems = [problem for c in here for problem in c.problems]
    assert not problems, "\n".join(problems)
    assert {c.kernel for c in here} == kernels
    assert {"products.compare_kernel", "products.sum_kernel"} <= {c.kernel for c in here if c.dots}


GOOD = aot.Compiled(
    "a_kernel", "a use", "sm_120", 168, 32, 101_376, 3, {"mma.sync.aligned.m16n8k16.bf16": 8}, 0
)


def test_what_keeps_to_the_limits_is_no_problem():
    assert GOOD.problems == []


def test_what_does_not_compile_is_named():
    (problem,) = aot.Failed("a_kernel", "a use", "sm_80", "no such name").problems
    assert problem == "a_kernel (a use) does not compile for sm_80: no such name"


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
    ],
)
def test_a_limit_that_is_exceeded_is_named(change, words):
    (problem,) = replace(GOOD, **change).problems
    assert problem.startswith("a_kernel (a use) on sm_120")
    assert words in problem
