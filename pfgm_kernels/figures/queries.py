# SPDX-License-Identifier: Apache-2.0
"""Training queries of one exponent m after the other, for what changes with the noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pfgm_kernels import ReferenceSet, poisson_displacement
from pfgm_kernels.flow import constants

TITLES = {"digits": "digits", "mnist": "MNIST", "cifar10": "CIFAR-10"}


class Queries:
    """Queries around images, Eq. (11): at each m with the same ε, for smooth curves.

        x = x0 + ‖ε_x‖ (1+τ)^m u,   t = |ε_t| (1+τ)^m

    x0: (B, *event), of the references, of which the constants are: sigma, tau and the range [0, M].
    """

    def __init__(self, x0: Tensor, references: ReferenceSet, generator: torch.Generator) -> None:
        self.x0, self.references = x0, references
        self.constants = constants(references)
        self.noise_x = torch.randn(x0.shape, generator=generator)
        self.noise_t = torch.randn(len(x0), generator=generator).abs()

    def level(self, m: float) -> float:
        return self.constants.sigma * (1 + self.constants.tau) ** m

    def at(self, m: float) -> tuple[Tensor, Tensor]:
        """x (B, *event) and t (B,)."""
        level = self.level(m)
        return self.x0 + level * self.noise_x, level * self.noise_t

    def exponents(self, count: int) -> Tensor:
        """(count,) values of m, evenly up to M from where nearly all hear their own image alone."""
        low, high = 0.0, float(self.constants.M)
        for _ in range(6):
            m = (low + high) / 2
            number = effective_number(*self.at(m), self.references).quantile(0.9)
            low, high = (m, high) if number < 1.001 else (low, m)
        return torch.linspace(low, self.constants.M, count)


def effective_number(x: Tensor, t: Tensor, references: ReferenceSet) -> Tensor:
    """1 / Σ_j w_j² (B,) of the weights for D = 1, by the op alone.

    With M_k = Σ_j s_j^(−k/2) the sum of squares is M_2k / M_k², and 2k = d + (d + 2).
    """
    d = math.prod(references.event_shape)
    once, twice = (poisson_displacement(x, t, references, D=D)[1] for D in (1, d + 2))
    return (2 * once - twice).exp()
