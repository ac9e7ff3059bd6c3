# SPDX-License-Identifier: Apache-2.0
"""Images for tests: a synthetic set that is always there, and Eq. (11) queries at a noise level."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

DUPLICATES = (0, 500, 900)  # the near-duplicate triple of the synthetic set of 1,100


@cache
def synthetic_images(count: int = 1100, size: int = 32) -> Tensor:
    """(count, 3, size, size) uint8 with the 1/f spectrum and the contrast of photographs.

    Images DUPLICATES[1:] are image DUPLICATES[0] with one value, and with 39, changed by 1.
    """
    generator = torch.Generator().manual_seed(32)
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size))
    noise = torch.randn(count, 3, size, size, generator=generator)
    # Colour channels share most of their content.
    noise = 0.9 * noise.mean(1, keepdim=True) * 3**0.5 + 0.44 * noise
    spectrum = torch.fft.rfft2(noise) / frequency.clamp(min=1 / size)
    images = torch.fft.irfft2(spectrum, s=(size, size))
    contrast = 20 + 60 * torch.rand(count, 1, 1, 1, generator=generator)
    brightness = 120 + 40 * torch.randn(count, 1, 1, 1, generator=generator)
    images = images / images.std(dim=(1, 2, 3), keepdim=True) * contrast + brightness
    images = images.round().clamp(0, 255).to(torch.uint8)
    original, one, many = (index * count // 1100 for index in DUPLICATES)
    images[[one, many]] = images[original].clone()
    images[one, 0, 16, 16] ^= 1
    images[many, :, 10, :13] ^= 1
    return images


def real_images(count: int) -> Tensor | None:
    """The first images of CIFAR-10, (count, 3, 32, 32) uint8; None without PFGM_DATA."""
    if not os.environ.get("PFGM_DATA"):
        return None
    from pfgm_kernels.training.data.idx_cifar import read_cifar_batch

    batch = next(Path(os.environ["PFGM_DATA"]).glob("cifar*/data_batch_1*"))
    return read_cifar_batch(batch)[0][:count]


def decode(images: Tensor) -> Tensor:
    """The float32 values in [-1, 1] that 8-bit pixels stand for."""
    return (2 * images.double() / 255 - 1).float()


def eq_11_queries(x0: Tensor, m: float, seed: int) -> tuple[Tensor, Tensor]:
    """x0 (B, *event) perturbed at the noise level m, with the published σ = 0.01 and τ = 0.03."""
    generator = torch.Generator().manual_seed(seed)
    growth = 0.01 * 1.03**m
    noise = torch.randn(x0.shape, generator=generator)
    radius = torch.randn(x0.shape, generator=generator).flatten(1).norm(dim=1)
    direction = noise / noise.flatten(1).norm(dim=1).view(-1, *[1] * (x0.dim() - 1))
    x = x0 + growth * radius.view(-1, *[1] * (x0.dim() - 1)) * direction
    return x, growth * torch.randn(len(x0), generator=generator).abs()
