# SPDX-License-Identifier: Apache-2.0
"""Training queries of one exponent m after the other, for what changes with the noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pfgm_kernels import ReferenceSet, poisson_displacement
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.data import DataSet

TITLES = {"digits": "digits", "mnist": "MNIST", "cifar10": "CIFAR-10"}


class Queries:
    """Queries around images, Eq. (11): at each m with the same ε, for smooth curves.

        x = x0 + ‖ε_x‖ (1+τ)^m u,   t = |ε_t| (1+τ)^m

    sigma, tau and the range [0, M] of m are those that training on the data set takes.
    """

    def __init__(self, data: DataSet, rows: Tensor, generator: torch.Generator) -> None:
        config = TrainConfig.for_data(data)
        self.sigma, self.tau, self.M = config.sigma, config.tau, config.M
        self.x0 = data.decode(data.train[rows])
        self.noise_x = torch.randn(self.x0.shape, generator=generator)
        self.noise_t = torch.randn(len(rows), generator=generator).abs()

    def level(self, m: float) -> float:
        return self.sigma * (1 + self.tau) ** m

    def at(self, m: float) -> tuple[Tensor, Tensor]:
        """x (B, *event) and t (B,)."""
        level = self.level(m)
        return self.x0 + level * self.noise_x, level * self.noise_t

    def exponents(self, count: int, references: ReferenceSet) -> Tensor:
        """(count,) values of m, evenly up to M from where nearly all hear their own image alone."""
        low, high = 0.0, float(self.M)
        for _ in range(6):
            m = (low + high) / 2
            number = effective_number(*self.at(m), references).quantile(0.9)
            low, high = (m, high) if number < 1.001 else (low, m)
        return torch.linspace(low, self.M, count)


def effective_number(x: Tensor, t: Tensor, references: ReferenceSet) -> Tensor:
    """1 / Σ_j w_j² (B,) of the weights for D = 1, by the op alone.

    With M_k = Σ_j s_j^(−k/2) the sum of squares is M_2k / M_k², and 2k = d + (d + 2).
    """
    d = math.prod(references.event_shape)
    once, twice = (poisson_displacement(x, t, references, D=D)[1] for D in (1, d + 2))
    return (2 * once - twice).exp()
