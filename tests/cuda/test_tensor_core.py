# SPDX-License-Identifier: Apache-2.0
"""Do emulated tensor cores sum as is reported of them, and lose no more than kernels allow for?"""

from __future__ import annotations

import importlib.util
from fractions import Fraction

import numpy as np
import pytest
import tensor_core
import torch

COLUMNS = 16


def exponent(v: float) -> int:
    return int(np.frexp(np.float32(v))[1]) - 1


def cut(v: Fraction, unit: Fraction) -> Fraction:
    """Toward zero, to a multiple of the unit."""
    return int(v / unit) * unit


def by_the_book(a: np.ndarray, b: np.ndarray, c: float, terms: int, places: int) -> float:
    """c + Σ a b with fractions, and of products only such as are no zeros."""
    for first in range(0, len(a), terms):
        group = slice(first, first + terms)
        pairs = [(x, y) for x, y in zip(a[group], b[group], strict=True) if x * y != 0]
        exponents = [exponent(x) + exponent(y) for x, y in pairs] + [exponent(c)] * int(c != 0)
        unit = Fraction(2) ** (max(exponents, default=0) - places)
        total = cut(Fraction(float(c)), unit)
        total += sum(cut(Fraction(float(x)) * Fraction(float(y)), unit) for x, y in pairs)
        c = float(total)
        if c != 0:
            c = float(cut(total, Fraction(2) ** (exponent(c) - 23)))
    return c


def bfloat16(values: torch.Tensor) -> np.ndarray:
    return values.bfloat16().float().numpy()


@pytest.mark.parametrize("core", ["bare", "sm_80", "sm_90"])
def test_sums_are_those_of_the_models(core, generator):
    spread = torch.randint(-12, 3, (9, 64), generator=generator).float().exp2()
    a = bfloat16(torch.randn(9, 64, generator=generator) * spread)
    a[:, ::7] = 0
    b = bfloat16(torch.randn(64, COLUMNS, generator=generator))
    c = torch.randn(9, COLUMNS, generator=generator).numpy()
    found = tensor_core.multiply(a, b, c, tensor_core.CORES[core])
    for i in range(len(a)):
        expected = [by_the_book(a[i], b[:, j], c[i, j], *tensor_core.CORES[core]) for j in range(8)]
        assert found[i, :8].tolist() == expected


@pytest.mark.parametrize("core", tensor_core.CORES)
def test_what_is_not_finite_stays_so(core):
    a, b = np.ones((4, 16), np.float32), np.ones((16, COLUMNS), np.float32)
    a[0, 3], a[1, 3], a[2, :2] = np.nan, np.inf, (np.inf, -np.inf)
    c = np.zeros((4, COLUMNS), np.float32)
    found = tensor_core.multiply(a, b, c, tensor_core.CORES[core])
    assert np.isnan(found[[0, 2]]).all()
    assert (found[1] == np.inf).all()
    assert (found[3] == 16).all()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("core", ["bare", "sm_80", "sm_90"])
def test_what_is_lost(core, generator):
    """At most CUT of Σ|a b| for each column, which peaks come near; on average CUT of a·b where
    columns are alike.
    """
    from pfgm_kernels.backends.triton.products import CUT, PROMOTED

    def lost(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = torch.from_numpy(bfloat16(a)), torch.from_numpy(bfloat16(b))
        zeros = np.zeros((len(a), b.shape[1]), np.float32)
        found = tensor_core.multiply(a.numpy(), b.numpy(), zeros, tensor_core.CORES[core])
        exact = a.double() @ b.double()
        return exact - torch.from_numpy(found).double(), exact

    peaks = 0.02 * torch.rand(40, PROMOTED.value, generator=generator)
    peaks[:, 0] = 1
    difference, total = lost(peaks, peaks[:COLUMNS].T.contiguous())
    assert (difference >= 0).all()
    most = (difference / total).max() / (PROMOTED.value * CUT.value)
    assert most <= 1
    assert most > 0.05

    alike = 1 + torch.randn(400, PROMOTED.value, generator=generator)
    others = 1 + torch.randn(PROMOTED.value, COLUMNS, generator=generator)
    difference, total = lost(alike, others)
    assert (difference * total.sign()).mean() <= CUT.value * total.abs().mean()
