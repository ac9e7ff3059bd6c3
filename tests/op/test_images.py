# SPDX-License-Identifier: Apache-2.0
"""Does the accuracy contract hold on images, 8-bit and float32, at the noise levels of training?

Below m = 190 the softmax is one-hot; from 200 to 260 lies the hard transition.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cache

import pytest
import torch
from cases import seeded
from images import DUPLICATES, decode, eq_11_queries, real_images, synthetic_images
from oracle import (
    FLOAT64,
    Truth,
    assert_displacement,
    assert_field,
    assert_gradient_of_x,
    assert_gradients,
    assert_log_mass,
    differentiate,
    float32_contract,
    solve,
)
from torch import Tensor

from pfgm_kernels import ReferenceSet, posterior_mean
from pfgm_kernels.flow import perturb_at
from pfgm_kernels.training.data import load

LEVELS = (180, 190, 200, 225, 250, 260, 291)
SOURCES = ("synthetic", "cifar10")
GAMMA = 5.0


@cache
def images(source: str, count: int) -> Tensor:
    found = synthetic_images() if source == "synthetic" else real_images(count)
    if found is None:
        pytest.skip("PFGM_DATA, the folder that holds CIFAR-10, is not set")
    return found


@cache
def problem(source: str, count: int, m: float) -> tuple[Tensor, Tensor, Tensor, Truth]:
    """Queries x, t at the level m, the images, and the truth."""
    stored = images(source, count)
    x0 = decode(stored)
    x, t = eq_11_queries(x0[5:10], m, seed=m)
    truth = solve(x, t, x0)
    if m >= 225:
        assert truth.effective_sample_size.median() > 2
    return x, t, stored, truth


@pytest.mark.parametrize("m", LEVELS)
@pytest.mark.parametrize("source", SOURCES)
def test_values(backend, source, m):
    x, t, stored, truth = problem(source, 2500, m)
    tolerance = float32_contract(backend.name)
    for x0 in (ReferenceSet.from_images(stored), decode(stored)):
        v, log_mass = backend.displacement(x, t, x0)
        assert_displacement(v, truth, tolerance)
        assert_log_mass(log_mass, truth)
    scale = math.sqrt(x[0].numel())
    field = backend.field(x, t, ReferenceSet.from_images(stored), gamma=GAMMA, scale=scale)
    assert_field(field, truth, tolerance, GAMMA, scale)


EDM_LEVELS = (0.002, 0.3, 3.0, 8.0, 80.0)


def mean_errors(stored: Tensor, D: float, mean: Callable[..., Tensor]) -> Tensor:
    """Of `mean(x, t, references, D=D)` at σ = 0.002 … 80, relative to the mean's norm (5,)."""
    x0 = decode(stored)
    t = torch.tensor(EDM_LEVELS) * (1 if math.isinf(D) else math.sqrt(D))
    x = perturb_at(x0[5:10], t, D=D, generator=seeded())
    truth = solve(x, t, x0, D)
    assert truth.effective_sample_size[-1] > 100
    expected = x.double().flatten(1) + truth.v
    found = mean(x, t, ReferenceSet.from_images(stored), D=D)
    return (found.double().flatten(1) - expected).norm(dim=1) / expected.norm(dim=1)


@pytest.mark.parametrize("D", [1, 128, 2048, math.inf])
@pytest.mark.parametrize("source", SOURCES)
def test_posterior_mean(backend, source, D):
    """Far from the data all images share the weight: their mean is of 1/4 the norm of its terms."""
    tolerance = max(1e-6, float32_contract(backend.name, named=False))
    assert mean_errors(images(source, 1100), D, backend.mean).max() < tolerance


@pytest.mark.exhaustive
@pytest.mark.parametrize("D", [128, math.inf])
def test_posterior_mean_of_all_of_cifar10(D):
    if not os.environ.get("PFGM_DATA"):
        pytest.skip("PFGM_DATA, the folder that holds CIFAR-10, is not set")
    assert mean_errors(load("cifar10").train, D, posterior_mean).max() < 1e-6


@pytest.mark.parametrize("m", [200, 225, 250, 291])
@pytest.mark.parametrize("source", SOURCES)
def test_gradients(backend, source, m):
    x, t, stored, truth = problem(source, 1100, m)
    x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
    x0 = decode(stored).requires_grad_()
    g_v = torch.randn(x.shape, generator=seeded())
    g_m = torch.randn(len(x), dtype=torch.float64, generator=seeded())
    expected = differentiate(truth, x, x0, g_v, g_m)
    outputs = backend.displacement(x, t, ReferenceSet.from_images(stored))
    dx, dt = torch.autograd.grad(outputs, [x, t], [g_v, g_m])
    assert_gradients(expected, dx, dt)
    assert_gradient_of_x(expected, dx)
    outputs = backend.displacement(x, t, x0)
    assert_gradients(expected, *torch.autograd.grad(outputs, [x, t, x0], [g_v, g_m]))


@pytest.mark.parametrize("D", [1, 128, math.inf])
def test_near_duplicates(backend, D):
    """Amid three images that differ by 1/127.5 in one value and in thirty-nine."""
    stored = synthetic_images()
    x0 = decode(stored)
    t = torch.tensor([1e-3, 1e-2, 0.1, 0.5, 2.0])
    t = t / math.sqrt(3072) if math.isinf(D) else t
    middle = x0[list(DUPLICATES[:2])].mean(0)
    x = middle + 1e-4 * torch.randn(5, *middle.shape, generator=seeded())
    truth = solve(x, t, x0, D)
    assert truth.effective_sample_size.max() > 2
    for references in (ReferenceSet.from_images(stored), x0):
        v, log_mass = backend.displacement(x, t, references, D=D)
        assert_displacement(v, truth, float32_contract(backend.name))
        assert_log_mass(log_mass, truth)


def test_on_data_points(backend):
    stored = synthetic_images()
    x0 = decode(stored)
    t = torch.logspace(-5, 3, 6)
    x = x0[[3, *DUPLICATES, 7, 1099]].requires_grad_()
    truth = solve(x, t, x0)
    v, log_mass = backend.displacement(x, t, ReferenceSet.from_images(stored))
    assert_displacement(v.detach(), truth, float32_contract(backend.name))
    assert_log_mass(log_mass.detach(), truth)
    g_v, g_m = torch.ones_like(v), torch.ones_like(log_mass)
    expected = differentiate(truth, x, x0, g_v, g_m)
    assert_gradients(expected, *torch.autograd.grad([v, log_mass], [x], [g_v, g_m]))


@pytest.mark.parametrize("m", [200, 240])
def test_64_by_64_pixels(backend, m):
    stored = synthetic_images(150, size=64)
    x0 = decode(stored)
    x, t = eq_11_queries(x0[:4], m, seed=m)
    truth = solve(x, t, x0)
    assert truth.effective_sample_size.max() > 2 or m < 225
    v, log_mass = backend.displacement(x, t, ReferenceSet.from_images(stored))
    assert_displacement(v, truth, float32_contract(backend.name))
    assert_log_mass(log_mass, truth)


def test_float64_queries(backend):
    x, t, stored, truth = problem("synthetic", 1100, 225)
    v, log_mass = backend.displacement(x.double(), t, ReferenceSet.from_images(stored))
    assert v.dtype == torch.float64
    assert_displacement(v, truth, FLOAT64)
    assert_log_mass(log_mass, truth)
