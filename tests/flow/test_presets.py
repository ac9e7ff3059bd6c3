# SPDX-License-Identifier: Apache-2.0
"""Are the presets the published constants, each of them?"""

from __future__ import annotations

from dataclasses import asdict

import pytest

from pfgm_kernels.flow import PRESETS

# Of the configurations published with Xu et al. 2022; steps are those of the fixed grids there.
COMMON = {"sigma": 0.01, "tau": 0.03, "restrict_M": True, "gamma": 5, "t_min": 1e-3, "steps": 100}
COLUMNS = ("M", "t_max", "t_substitution", "max_radius")
PUBLISHED = {
    "cifar10": (291, 40, 5, 3_000),
    "celeba64": (291, 60, 1, 6_000),
    "lsun_bedroom256": (356, 100, 0.1, 30_000),
}


def test_there_are_no_others():
    assert PRESETS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_constants(name):
    assert asdict(PRESETS[name]) == COMMON | dict(zip(COLUMNS, PUBLISHED[name], strict=True))
