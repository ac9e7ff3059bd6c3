# SPDX-License-Identifier: Apache-2.0
"""Beside the published formulas, as their papers and code have them, in float64: the same numbers?

Ours are computed in float32 (the op holds its contract there), theirs term by term.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from images import decode, synthetic_images
from scipy import stats
from torch import Tensor

from pfgm_kernels import ReferenceSet, poisson_field, posterior_mean
from pfgm_kernels.flow import (
    PRESETS,
    FieldLoss,
    PosteriorMeanLoss,
    Preconditioned,
    heights,
    perturb,
    perturb_at,
)

COUNT, BATCH = 400, 6
EDM_LEVELS = [0.002, 0.05, 1.0, 5.0, 20.0, 80.0]


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def stored() -> Tensor:
    return synthetic_images()[:COUNT]


def vectors(x: Tensor, z: Tensor, x0: Tensor) -> Tensor:
    """(x − x0, z) of one query (d,) and all sources: (N, d + 1) float64."""
    difference = x.double().flatten() - x0.double().flatten(1)
    return torch.cat([difference, z.double().expand(len(x0), 1)], 1)


def pfgm_target(x: Tensor, z: Tensor, x0: Tensor, gamma: float = 5.0) -> Tensor:
    """PFGM's training target (d + 1,) with all that its code adds against division by 0."""
    away = vectors(x, z, x0)
    distance = away.norm(dim=1)
    weights = (distance.min() / (distance + 1e-7)) ** away.shape[1]
    weights = weights / (weights.sum() + 1e-7)
    field = -(weights[:, None] * away).sum(0)
    return math.sqrt(away.shape[1] - 1) * field / (field.norm() + gamma)


def pfgmpp_mean(x: Tensor, sigma: float, x0: Tensor, D: float) -> Tensor:
    """PFGM++'s stable target: the mean of x0 with weights (‖x − x0‖² + r²)^(−(N+D)/2), r = σ√D."""
    away = vectors(x, torch.tensor(sigma * math.sqrt(D), dtype=torch.float64), x0)
    distance = away.norm(dim=1)
    exponent = away.shape[1] - 1 + D
    weights = (distance.min() / (distance + 1e-7)) ** exponent
    weights = weights / (weights.sum() + 1e-7)
    return (weights[:, None] * x0.double().flatten(1)).sum(0)


def stf_mean(x: Tensor, sigma: float, x0: Tensor) -> Tensor:
    """The stable target field of diffusion: softmax of −‖x − x0‖² / (2σ²)."""
    squared = (x.double().flatten() - x0.double().flatten(1)).square().sum(1)
    return (-squared / (2 * sigma**2)).softmax(0) @ x0.double().flatten(1)


def worst(found: Tensor, expected: Tensor) -> float:
    """The largest relative error of the rows."""
    error = (found.double().flatten(1) - expected).norm(dim=1) / expected.norm(dim=1)
    return error.max().item()


@pytest.mark.parametrize("m", [0, 100, 190, 225, 260, 291])
def test_pfgm(stored, m):
    """gamma = 5, scale = √d, D = 1: at every level of Eq. (11), one-hot and not."""
    x0 = decode(stored)
    x, z = perturb(x0[:BATCH], sigma=0.01 * 1.03**m, tau=1e-9, M=1, generator=seeded(m))
    found = poisson_field(x, z, ReferenceSet.from_images(stored), gamma=5.0, scale=3072**0.5)
    expected = torch.stack([pfgm_target(x[b], z[b], x0) for b in range(BATCH)])
    assert worst(found, expected) < 1e-6


@pytest.mark.parametrize("sigma", EDM_LEVELS)
@pytest.mark.parametrize("D", [1, 64, 128, 2048, 1e6])
def test_pfgmpp(stored, D, sigma):
    """t = σ √D."""
    x0, t = decode(stored), sigma * math.sqrt(D)
    x = perturb_at(x0[:BATCH], t, D=D, generator=seeded())
    found = posterior_mean(x, t, ReferenceSet.from_images(stored), D=D)
    expected = torch.stack([pfgmpp_mean(x[b], sigma, x0, D) for b in range(BATCH)])
    assert worst(found, expected) < 1e-6


@pytest.mark.parametrize("sigma", EDM_LEVELS)
def test_stf(stored, sigma):
    """D = ∞, t = σ."""
    x0 = decode(stored)
    x = perturb_at(x0[:BATCH], sigma, D=math.inf, generator=seeded())
    found = posterior_mean(x, sigma, ReferenceSet.from_images(stored), D=math.inf)
    expected = torch.stack([stf_mean(x[b], sigma, x0) for b in range(BATCH)])
    assert worst(found, expected) < 1e-6


@pytest.mark.parametrize(("N", "D"), [(12, 1), (192, 8), (192, 128), (3, 2048)])
def test_draws_of_pfgmpp(N, D):
    """Its kernel as it is drawn there, R = r √(s / (1 − s)) with s ~ Beta(N/2, D/2), unclipped."""
    count, rng = 10_000, np.random.default_rng(5)
    sigma = np.exp(-1.2 + 1.2 * rng.standard_normal(count))
    s = rng.beta(N / 2, D / 2, count)
    radius = sigma * math.sqrt(D) * np.sqrt(s / (1 - s))
    t = heights(count, D=D, generator=seeded(), dtype=torch.float64)
    x = perturb_at(torch.zeros(count, N, dtype=torch.float64), t, D=D, generator=seeded(4))
    assert stats.ks_2samp(x.norm(dim=1).numpy(), radius).pvalue > 0.001
    ratio = x.norm(dim=1) / t
    assert stats.ks_2samp(ratio.numpy(), np.sqrt(s / (1 - s))).pvalue > 0.001


def edm_denoiser(network, x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """Karras et al. 2022, Eq. (7) and Table 1, for x (B, d)."""
    sigma = sigma.double().view(-1, 1)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / torch.sqrt(sigma_data**2 + sigma**2)
    c_in = 1 / torch.sqrt(sigma**2 + sigma_data**2)
    c_noise = torch.log(sigma) / 4
    return c_skip * x.double() + c_out * network(c_in * x.double(), c_noise.flatten())


@pytest.mark.parametrize("D", [1, 128, 2048, math.inf])
def test_edm_preconditioning_weights_and_loss(D):
    """PFGM++'s training step (D = ∞: EDM's) on the clean x0, its sum over components over d."""
    x0 = torch.randn(64, 12, generator=seeded())
    weight = torch.randn(12, 12, dtype=torch.float64, generator=seeded(5))

    def network(x: Tensor, condition: Tensor) -> Tensor:
        return torch.tanh(x @ weight.to(x.dtype)) * (1 + condition[:, None])

    seen = {}

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.update(x=x, t=t, output=Preconditioned(network, D=D)(x, t))
        return seen["output"]

    found = PosteriorMeanLoss(D=D)(denoiser, x0, seeded())
    sigma = seen["t"].double() / (1 if math.isinf(D) else math.sqrt(D))
    expected = edm_denoiser(network, seen["x"], sigma, 0.5)
    assert worst(seen["output"], expected) < 1e-6
    lam = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    per_sample = (lam[:, None] * (expected - x0) ** 2).sum(1)
    assert found.item() * 12 == pytest.approx(per_sample.mean().item(), rel=1e-6)


def test_pfgms_loss_is_half_the_sum(stored):
    """(d + 1)/2 times FieldLoss: 1,536.5 at d = 3,072."""
    x0 = decode(stored)
    preset = PRESETS["cifar10"]
    loss_fn = FieldLoss(ReferenceSet.from_images(stored), gamma=preset.gamma, **preset.noise)
    seen = {}

    def network(x: Tensor, z: Tensor) -> Tensor:
        seen.update(x=x, z=z, output=torch.cat([x.flatten(1) / (1 + x.norm()), z[:, None]], 1))
        return seen["output"]

    found = loss_fn(network, x0[:BATCH], seeded())
    targets = [pfgm_target(x, z, x0) for x, z in zip(seen["x"], seen["z"], strict=True)]
    squared = (seen["output"].double() - torch.stack(targets)) ** 2
    published = (0.5 * squared.sum(1)).mean().item()
    assert published == pytest.approx(1536.5 * found.item(), rel=1e-6)
