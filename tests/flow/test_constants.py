# SPDX-License-Identifier: Apache-2.0
"""Are the presets the published constants, each of them, and is the rule the published one?"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict

import pytest
import torch

from pfgm_kernels import ReferenceSet
from pfgm_kernels.backends import BACKENDS
from pfgm_kernels.flow import PRESETS, constants, perturb

# Of the configurations published with Xu et al. 2022; steps are those of the fixed grids there.
COMMON = {"sigma": 0.01, "tau": 0.03, "restrict_M": True, "gamma": 5, "t_min": 1e-3, "steps": 100}
COLUMNS = ("M", "T", "t_substitution", "max_radius")
PUBLISHED = {
    "cifar10": (291, 40, 5, 3_000),
    "celeba64": (291, 60, 1, 6_000),
    "lsun_bedroom256": (356, 100, 0.1, 30_000),
}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def of_norm(norm: float, d: int) -> torch.Tensor:
    return torch.full((4, d), norm / math.sqrt(d), dtype=torch.float64)


def test_there_are_no_others():
    assert PRESETS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_constants(name):
    assert asdict(PRESETS[name]) == COMMON | dict(zip(COLUMNS, PUBLISHED[name], strict=True))


def test_the_rule_as_published():
    """A mean norm of 30 in 3,072 dimensions gives M = 287, T = 38.57, radii up to 2,679."""
    rule = constants(of_norm(30, 3072))
    assert rule.M == 287
    assert pytest.approx(38.57, abs=0.005) == rule.T
    assert rule.max_radius == pytest.approx(2679, abs=0.5)
    assert rule.gamma == rule.t_substitution == pytest.approx(5)
    assert asdict(rule) | {"gamma": 5} == asdict(rule) | COMMON


@pytest.mark.parametrize(("sigma", "tau"), [(0.01, 0.03), (0.05, 0.1)])
@pytest.mark.parametrize("D", [1, 2, 2.5, 128, math.inf])
def test_t_is_the_mean_of_the_widest_queries(D, sigma, tau):
    x0 = torch.randn(30, 2, 3, generator=seeded())
    rule = constants(x0, D=D, sigma=sigma, tau=tau)
    norm = x0.double().flatten(1).norm(dim=1).mean().item()
    exponent = 0.75 * math.log(norm**2 / (2 * math.sqrt(6) * sigma**2)) / math.log(1 + tau)
    assert math.floor(exponent) + 1 == rule.M
    assert rule.gamma == pytest.approx(norm / 6)
    # tau so small that all m give the largest level.
    widest = sigma * (1 + tau) ** rule.M
    x, t = perturb(
        torch.zeros(40_000, 6, dtype=torch.float64),
        sigma=widest,
        tau=1e-12,
        M=1,
        D=D,
        restrict_M=False,
        generator=torch.Generator().manual_seed(1),
    )
    assert pytest.approx(t.mean().item(), abs=5 * t.std().item() / 200 + 1e-9) == rule.T
    assert rule.max_radius == pytest.approx(x.square().sum(1).mean().sqrt().item(), rel=0.02)


def test_all_the_references_count_however_they_are_stored(monkeypatch):
    images = torch.randint(0, 256, (50, 3, 4), dtype=torch.uint8, generator=seeded())
    expected = (2 * images.double() / 255 - 1).flatten(1).norm(dim=1).mean().item() / 6
    references = ReferenceSet.from_images(images)
    assert constants(references).gamma == pytest.approx(expected, rel=1e-6)
    module = sys.modules["pfgm_kernels.flow.constants"]
    monkeypatch.setattr(module, "DECODED", 100)  # eight at a time
    assert constants(references).gamma == pytest.approx(expected, rel=1e-6)
    assert constants(references) == constants(ReferenceSet(references.table[images.long()]))


def test_nothing_is_prepared_of_a_tensor(monkeypatch):
    x0 = torch.randn(50, 40, generator=seeded())
    known = constants(ReferenceSet(x0))
    monkeypatch.setattr(BACKENDS["cpu"], "prepare", None)
    assert constants(x0) == known


def test_units_do_not_matter():
    """Data of seven times the size, with seven times the noise, has seven times the lengths."""
    x0 = torch.randn(30, 6, dtype=torch.float64, generator=seeded())
    one, seven = constants(x0, sigma=0.02), constants(7 * x0, sigma=0.14)
    assert one.M == seven.M
    for name in ("gamma", "T", "max_radius", "t_substitution"):
        assert getattr(seven, name) == pytest.approx(7 * getattr(one, name))


@pytest.mark.parametrize("norm", [0.0, 0.1, 1.0])
def test_noise_as_wide_as_the_data_grows_no_further(norm):
    rule = constants(of_norm(norm, 4), sigma=0.5, tau=0.03)
    assert (rule.M, rule.gamma) == (1, pytest.approx(norm / 6))


def test_noise_is_what_perturb_takes():
    rule = constants(of_norm(3, 4))
    assert rule.noise == {"sigma": 0.01, "tau": 0.03, "M": rule.M, "restrict_M": True}
    x0 = torch.zeros(5, 2)
    found = perturb(x0, generator=torch.Generator().manual_seed(1), **rule.noise)
    expected = perturb(x0, generator=torch.Generator().manual_seed(1), M=rule.M)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("x0", "options", "error", "message"),
    [
        (of_norm(1, 4), {"sigma": 0}, ValueError, "sigma expects a finite number > 0, got 0"),
        (of_norm(1, 4), {"tau": -1}, ValueError, "tau expects a finite number > 0, got -1"),
        (of_norm(1, 4), {"D": 0}, ValueError, "D expects a number > 0, got 0"),
        ([1.0], {}, TypeError, "x0 expects a tensor or a ReferenceSet, got list"),
    ],
)
def test_bad_input_is_named(x0, options, error, message):
    with pytest.raises(error, match=message):
        constants(x0, **options)
