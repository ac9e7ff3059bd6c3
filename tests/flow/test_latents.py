# SPDX-License-Identifier: Apache-2.0
"""Do latents of real images lie on arcs, and come back?"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from pfgm_kernels import poisson_field
from pfgm_kernels.flow import encode, interpolate, rescale, sample


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


@pytest.mark.parametrize("event", [(1,), (2,), (3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_arc(event, dtype):
    a = random(*event, dtype=dtype)
    b = 40 * (a + 0.9 * a.flip(0) if event != (1,) else a)
    path = interpolate(a, b, 7)
    assert (path.shape, path.dtype) == ((7, *event), dtype)
    assert torch.equal(path[0], a)
    assert torch.equal(path[-1], b)
    flat = path.flatten(1).double().numpy()
    radii = np.linalg.norm(flat, axis=1)
    np.testing.assert_allclose(radii, np.geomspace(radii[0], radii[-1], 7), rtol=1e-6)
    # Even angles in one plane.
    units = flat / radii[:, None]
    if event != (1,):
        steps = np.arccos(np.clip((units[1:] * units[:-1]).sum(1), -1, 1))
        assert steps[0] > 0.05
        np.testing.assert_allclose(steps, steps[0], rtol=1e-3)
        assert steps.sum() == pytest.approx(np.arccos(units[0] @ units[-1]), rel=1e-3)


def test_a_quarter_of_a_circle():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 4.0])
    expected = torch.tensor([2 * math.sqrt(0.5), 2 * math.sqrt(0.5)])
    torch.testing.assert_close(interpolate(a, b, 3)[1], expected)


def test_one_direction_is_a_ray():
    a = random(3)
    for b in (a, 4 * a):
        torch.testing.assert_close(
            interpolate(a, b, 3)[1], (a.norm() * b.norm()).sqrt() * a / a.norm()
        )


def test_the_radius_times_a_factor():
    latent = random(3, 2, 2, dtype=torch.float32)
    torch.testing.assert_close(rescale(latent, 0.5), latent / 2)
    factors = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    scaled = rescale(latent, factors)
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, latent * factors.float()[:, None, None])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: interpolate(random(3), random(3), 1), ValueError, "n expects an integer ≥ 2"),
        (lambda: interpolate([1.0], random(3), 2), TypeError, "a expects a tensor, got list"),
        (
            lambda: interpolate(random(3), random(4), 2),
            ValueError,
            r"b expects the shape.*got \(4,",
        ),
        (lambda: interpolate(random(3), random(3).float(), 2), ValueError, "got .*float32"),
        (
            lambda: interpolate(random(3), torch.zeros(3), 2),
            ValueError,
            "b expects a finite latent",
        ),
        (lambda: interpolate(random(3), -random(3), 2), ValueError, "got opposite ones"),
        (lambda: interpolate(random(3), random(3) * math.nan, 2), ValueError, "norm nan"),
        (lambda: rescale(random(2, 3), 0), ValueError, "factor expects a finite number > 0, got 0"),
        (lambda: rescale(random(2, 3), torch.ones(3)), ValueError, r"\(B,\) = \(2,\), got \(3,\)"),
        (lambda: rescale(random(2, 3), torch.tensor([1.0, -1.0])), ValueError, "numbers > 0"),
        (lambda: rescale(random(2, 3).half(), 1), TypeError, "latent expects a float32 or float64"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_between_two_digits():
    """Images come back from their latents, and between them lie images of the data."""
    x0 = torch.tensor(load_digits().data[:300], dtype=torch.float64) / 8 - 1

    def field(x: Tensor, t: Tensor) -> Tensor:
        return poisson_field(x, t, x0)

    options = {"T": 40.0, "t_min": 0.1, "rtol": 1e-6}
    images = x0[:2] + 0.02 * random(2, 64)
    latents = encode(field, images, **options).x
    back = sample(field, latents, final_step=False, **options).x
    assert (back - images).abs().max() < 1e-3
    path = interpolate(latents[0], latents[1], 6)
    between = sample(field, path, **options).x
    torch.testing.assert_close(between[[0, -1]], x0[:2], rtol=0, atol=1e-3)
    assert (between[:, None] - x0).norm(dim=2).amin(1).max() < 0.5
    cold = sample(field, rescale(latents, 0.2), **options).x
    assert (cold[:, None] - x0).norm(dim=2).amin(1).max() < 0.5
