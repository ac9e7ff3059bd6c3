# SPDX-License-Identifier: Apache-2.0
"""What is computed: the shapes, their data, and the exact answer for a few of their queries; all
of it on the device that is measured.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pfgm_kernels import ReferenceSet
from pfgm_kernels.flow import perturb
from tests.op import oracle

GAMMA = 5.0
"""Added to the norm of the field, and its factor is √d: the target that PFGM trains on."""
CHECKED_ROWS, CHECKED_ELEMENTS = 24, 1 << 30
"""Queries of each problem, evenly spread, whose exact answer is computed: as many as given, fewer
where they have more elements of differences than given.
"""


@dataclass(frozen=True)
class Shape:
    """B queries and N references in d dimensions.

    source: "normal" (queries and references standard normal, t = |N(0, 1)|), "synthetic" (images
    with a 1/f spectrum) or the name of a data set of images; queries around images follow Eq. (11).
    """

    B: int
    N: int
    d: int
    source: str

    def __str__(self) -> str:
        return f"{self.B}x{self.N}-d{self.d}-{self.source}"

    def problem(self, device: torch.device | str = "cpu") -> Problem:
        """Made on the device, in seconds: its values are of the device's own generator."""
        generator = torch.Generator(device).manual_seed(0)
        images = None
        if self.source == "normal":
            x0 = torch.randn(self.N, self.d, generator=generator, device=device)
            x = torch.randn(self.B, self.d, generator=generator, device=device)
            t = torch.randn(self.B, generator=generator, device=device).abs()
        else:
            if self.source == "synthetic":
                images = synthetic_images(self.N, self.d, generator)
            else:
                images = real_images(self.source, self.N).to(device)
            # float32 on the grid that the 8-bit set stands for: both forms are the same data.
            x0 = torch.cat([(-1 + 2 * i.double() / 255).float() for i in images.split(4096)])
            x, t = perturb(x0[: self.B], generator=generator)
        cotangent = torch.randn(self.B, self.d + 1, generator=generator, device=device)
        if (len(x0), x0.shape[1]) != (self.N, self.d):
            raise ValueError(f"{self} expects {self.N} references, got shape {tuple(x0.shape)}")
        return Problem(x, t, x0, cotangent, images)


def shapes(on_gpu: bool = False) -> list[Shape]:
    """The shapes of a run: larger ones too on a GPU, more dimensions on a CPU, whose kernels differ
    more; real images take part where PFGM_DATA names their folder.
    """
    normal = [(64, 1024, 2), (1024, 16384, 2), (1024, 16384, 16), (512, 8192, 64)]
    between = [(700, 12000, 3), (900, 9000, 12), (300, 20000, 40)]
    between += [(512, 8192, d) for d in (32, 96, 128, 256)]
    images = [(512, 8192, 784), (128, 4096, 3072)]
    real = [Shape(512, 8192, 784, "mnist"), Shape(128, 4096, 3072, "cifar10")]
    if on_gpu:
        normal += [(4096, 50000, 2), (512, 50000, 64)]
        images = [(512, 50000, 3072), *images, (4096, 50000, 3072)]
        real += [Shape(512, 16000, 3072, "cifar10")]
    else:
        normal += between
        real += [Shape(200, 10000, 784, "mnist"), Shape(128, 50000, 3072, "cifar10")]
    small = [Shape(*size, "normal") for size in normal]
    large = [Shape(*size, "synthetic") for size in images]
    # On a GPU, whose time may be short, in the order of worth.
    made = [*large, *small] if on_gpu else [*small, *large]
    return [*made, *(real if os.environ.get("PFGM_DATA") else [])]


def real_images(name: str, count: int) -> Tensor:
    """The first training images (count, d) of "mnist" or "cifar10", uint8, from the folder that
    PFGM_DATA names; of CIFAR-10 only the batches that they take are read.
    """
    from pfgm_kernels.training.data import load  # needs the extra `train`
    from pfgm_kernels.training.data.idx_cifar import CIFAR_ROWS, read_cifar_batch

    if name != "cifar10":
        return load(name).train[:count].flatten(1)
    files = sorted(Path(os.environ["PFGM_DATA"]).glob("cifar*/data_batch_*"))
    needed = files[: math.ceil(count / CIFAR_ROWS)]
    return torch.cat([read_cifar_batch(file)[0] for file in needed])[:count].flatten(1)


def synthetic_images(count: int, d: int, generator: torch.Generator) -> Tensor:
    """8-bit images (count, d) of 1 or 3 square channels whose amplitudes fall as 1/f, like
    photographs: most of the variance is in smooth structures that the channels share.
    """
    channels, device = 3 if d % 3 == 0 else 1, generator.device
    size = math.isqrt(d // channels)
    if channels * size * size != d:
        raise ValueError(f"synthetic images expect d = size² or 3·size², got {d}")
    frequency = torch.hypot(
        torch.fft.fftfreq(size, device=device)[:, None],
        torch.fft.rfftfreq(size, device=device)[None],
    ).clamp_min(1 / size)
    grey = torch.randn(count, 1, size, size, generator=generator, device=device)
    colour = torch.randn(count, channels, size, size, generator=generator, device=device)
    smooth = torch.fft.irfft2(torch.fft.rfft2(grey + 0.3 * colour) / frequency, s=(size, size))
    pixels = 127.5 + 60 * smooth / smooth.std()
    return pixels.round().clamp(0, 255).to(torch.uint8).flatten(1)


@dataclass(frozen=True)
class Problem:
    """Queries x (B, d), t (B,), references x0 (N, d), all float32, and a cotangent (B, d + 1) of
    the field for the backward pass; `images` (N, d) are x0 in 8 bits where x0 is images.
    """

    x: Tensor
    t: Tensor
    x0: Tensor
    cotangent: Tensor
    images: Tensor | None = None

    @property
    def scale(self) -> float:
        return math.sqrt(self.x0.shape[1])

    def reference_set(self) -> ReferenceSet:
        if self.images is None:
            return ReferenceSet(self.x0)
        return ReferenceSet.from_images(self.images)

    def normalise(self, v: Tensor, t: Tensor) -> Tensor:
        """scale · (v, −t) / (‖(v, −t)‖ + GAMMA) for displacements v (B, d) and t (B,)."""
        field = torch.cat([v, -t[:, None]], 1)
        return field * (self.scale / (field.norm(dim=1, keepdim=True) + GAMMA))

    @cached_property
    def exact(self) -> Exact:
        count = min(CHECKED_ROWS, len(self.x), max(1, CHECKED_ELEMENTS // self.x0.numel()))
        rows = torch.linspace(0, len(self.x) - 1, count).long().to(self.x.device)
        x, t, x0 = (part.double() for part in (self.x[rows], self.t[rows], self.x0))
        truth = oracle.solve(x, t, x0)
        leaves = (truth.v.clone().requires_grad_(), truth.t.clone().requires_grad_())
        cotangent = self.cotangent[rows].double()
        g_v, g_t = torch.autograd.grad(self.normalise(*leaves), leaves, cotangent)
        # The c_j of `oracle.differentiate` by matrix products, for which float64 is ample: direct
        # differences of all of CIFAR-10 take most of a minute.
        pull = (g_v @ x0.T - (g_v * (x + truth.v)).sum(1, keepdim=True)) * truth.weights
        c = (x0.shape[1] + 1) / 2 * pull / (truth.distances.square() + t.square()[:, None])
        total, sizes = c.sum(1), c.abs()
        return Exact(
            rows,
            truth.field(GAMMA, self.scale),
            truth.term_norm / truth.norm,
            2 * (c @ x0 - total[:, None] * x) - g_v,
            g_t - 2 * t * total,
            g_v.norm(dim=1) + 2 * (sizes * truth.distances).sum(1),
            g_t.abs() + 2 * t.abs() * sizes.sum(1),
        )


@dataclass(frozen=True)
class Exact:
    """In float64 for some rows: the field and its condition number κ, the gradients
    of ⟨cotangent, field⟩ for x and t, and the sums of the sizes of their terms, which are −g_v and
    −2 c_j (x − x0_j), and −2 t c_j and what t gets from the normalisation.
    """

    rows: Tensor
    field: Tensor
    kappa: Tensor
    dx: Tensor
    dt: Tensor
    dx_terms: Tensor
    dt_terms: Tensor

    def forward_error(self, field: Tensor) -> float:
        """Worst row of ‖field − exact‖ / (κ ‖exact‖), for a field of the checked queries."""
        off = (field.double() - self.field).norm(dim=1)
        return _worst(off / (self.kappa * self.field.norm(dim=1)))

    def gradient_error(self, dx: Tensor, dt: Tensor) -> float:
        """Worst row of either gradient's error, relative to the sum of the sizes of its terms."""
        off_x = (dx.double() - self.dx).norm(dim=1) / self.dx_terms
        off_t = (dt.double() - self.dt).abs() / self.dt_terms
        return max(_worst(off_x), _worst(off_t))


def _worst(errors: Tensor) -> float:
    return float(errors.nan_to_num(nan=math.inf).max())
