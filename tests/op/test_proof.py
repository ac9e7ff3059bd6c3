# SPDX-License-Identifier: Apache-2.0
"""Do the kernels of each backend pass the self-check?"""

from __future__ import annotations

import pytest
from torch import Tensor

from pfgm_kernels import proof
from pfgm_kernels.backends import BACKENDS
from pfgm_kernels.problems import Family

# Of kernels that are interpreted or emulated `make check` takes four values of a test: a test each
# for the bands makes that all families, but those whose forward step another one has, too.
each_family = pytest.mark.parametrize(
    ("codes", "backward"), [(False, True), (True, True), (False, False), (True, False)]
)


@each_family
def test_few_columns(backend, codes, backward):
    check(backend, Family(0, codes, backward))


@pytest.mark.exhaustive
@each_family
def test_some_columns(backend, codes, backward):
    check(backend, Family(1, codes, backward))


@pytest.mark.exhaustive
@each_family
def test_many_columns(backend, codes, backward):
    check(backend, Family(2, codes, backward))


def check(backend, family: Family) -> None:
    if backend.interpreted and not family.backward:
        pytest.skip("what runs with gradients has the same values checked")
    module, slices = BACKENDS[backend.name], []
    cut = module.operands_of

    def operands_of(operands: list[Tensor], references: slice) -> list[Tensor]:
        slices.append(references)
        return cut(operands, references)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "operands_of", operands_of)
        if backend.interpreted:  # in each run the same
            patch.setattr(proof, "RUNS", 1)
        verdict = proof.check(backend.name, family, backend.device)
    assert verdict.passed, verdict.figures
    assert verdict.figures.startswith("errors up to ")
    if family.band > 0 and backend.name != "eager":
        assert any(references.start > 0 for references in slices)  # of what was prepared
