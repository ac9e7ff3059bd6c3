# SPDX-License-Identifier: Apache-2.0
"""Noise between the steps of a sampler: the stochastic sampler of EDM."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pfgm_kernels._checks import non_negative, number, positive
from pfgm_kernels.flow._queries import root_of
from pfgm_kernels.flow._seeds import generators


@dataclass(frozen=True)
class Churn:
    """The stochastic sampler of Karras et al. 2022 (EDM), Algorithm 2, as published: in σ.

    Before each step, and the final one to t = 0 is among the steps, from a σ in [S_min, S_max]

        γ = min(S_churn / steps, √2 − 1),   σ̂ = (1 + γ) σ,   x̂ = x + √(σ̂² − σ²) S_noise ε

    with ε standard normal, and the step starts from x̂ at σ̂. σ = t / √D, and t itself for D = ∞.
    Gaussian noise takes the kernel of D = ∞ from σ to σ̂ exactly, that of a finite D nearly.
    """

    S_churn: float
    """≥ 0, the amount of noise of all steps together."""
    S_min: float = 0.0
    """≥ 0, the σ below which there is none."""
    S_max: float = math.inf
    """≥ S_min, the σ above which there is none."""
    S_noise: float = 1.0
    """≥ 0, the standard deviation of ε."""
    D: float = 1
    """> 0, of the field; `math.inf` where t is σ."""

    def __post_init__(self) -> None:
        for name in ("S_churn", "S_min", "S_noise"):
            object.__setattr__(self, name, non_negative(name, getattr(self, name)))
        object.__setattr__(self, "D", positive("D", self.D, finite=False))
        object.__setattr__(self, "S_max", number("S_max", self.S_max))
        if self.S_max < self.S_min:
            raise ValueError(f"S_max expects a number ≥ S_min = {self.S_min}, got {self.S_max}")

    def raised(self, t: float, steps: int) -> tuple[float, float]:
        """t̂, from which the step of `steps` at t starts, and the noise's standard deviation."""
        root_D = root_of(self.D)
        if not self.S_min <= t / root_D <= self.S_max:
            return t, 0.0
        t_hat = t + min(self.S_churn / steps, math.sqrt(2) - 1) * t
        return t_hat, math.sqrt(t_hat**2 - t**2) / root_D * self.S_noise


class Noise:
    """Standard normal numbers of the shape of x (B, *event), drawn in float64.

    generator: of all samples. seeds: one a sample, which then has numbers of its own, drawn on the
    CPU. Neither: torch's default generator.
    """

    def __init__(
        self, x: Tensor, generator: torch.Generator | None, seeds: Iterable[int] | None
    ) -> None:
        if generator is not None and seeds is not None:
            raise ValueError("expected a generator or seeds, got both")
        self.generator = generator
        self.each = None if seeds is None else generators(seeds, stream=1)  # 0: the prior's
        if self.each is not None and len(self.each) != len(x):
            raise ValueError(f"seeds expects one a sample, {len(x)}, got {len(self.each)}")

    def like(self, x: Tensor) -> Tensor:
        if self.each is None:
            device = x.device if self.generator is None else self.generator.device
            noise = torch.empty(x.shape, dtype=torch.float64, device=device)
            return noise.normal_(generator=self.generator).to(x)
        event = torch.empty(x.shape[1:], dtype=torch.float64, device="cpu")
        return torch.stack([event.clone().normal_(generator=g) for g in self.each]).to(x)
