# SPDX-License-Identifier: Apache-2.0
"""Are numbers that Python and C++ both have, each for itself, the same in both?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = [
    ("cpu", "PAD", "cpu/common/vectors.h", "kPad"),
    ("cpu", "TILE", "cpu/common/product.h", "kTileQueries"),
    ("cpu", "WORK_PER_THREAD", "cpu/classes.h", "kWorkPerThread"),
    ("cpu", "MAX_DIRECT_DIM", "cpu/common/kernels.h", "kMaxDirectDim"),
    ("cpu", "MAX_DIRECT_DIM", "cpu/direct/direct.h", "kMaxDim"),
    ("_sketch", "NORM", "cpu/two_pass/sketch.h", "kShortNorm"),
    ("_sketch", "BASIS_ERROR", "cpu/two_pass/sketch.h", "kBasisError"),
    ("cuda", "MAX_DIRECT_DIM", "cuda/passes.cuh", "kMaxDirectDim"),
    ("cuda", "DIM_MULTIPLE", "cuda/kernel_traits.cuh", "kWidthMultiple"),
    ("cuda", "MAX_THREE_PART_DIM", "cuda/kernel_traits.cuh", "kMaxThreePartDim"),
]


@pytest.mark.parametrize(("module", "name", "header", "constant"), NUMBERS)
def test_both_say_the_same(module, name, header, constant):
    """As their sources have it: tests change some of them."""
    python = (ROOT / f"pfgm_kernels/backends/{module}.py").read_text()
    cpp = (ROOT / "csrc" / header).read_text()
    assert value(rf"^{name} = ([^#\n]+)", python) == value(
        rf"constexpr \w+ {constant} = (.+?);", cpp
    )


def value(pattern: str, source: str) -> float:
    """Of the one definition, as in 24, 1e-11, 1 << 20 and int64_t{1} << 20."""
    (found,) = re.findall(pattern, source, re.MULTILINE)
    base, _, shift = found.replace("int64_t{1}", "1").partition("<<")
    return float(base) * 2 ** int(shift or 0)
