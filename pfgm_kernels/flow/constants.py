# SPDX-License-Identifier: Apache-2.0
"""The constants of PFGM, of any data by the published rule, and those published by data set.

All defaults come from here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfgm_kernels._checks import positive
from pfgm_kernels.backends._values import decode
from pfgm_kernels.references import ReferenceSet
from pfgm_kernels.shards import Sharded

SIGMA, TAU = 0.01, 0.03
DECODED = 1 << 22  # values of references that are looked at at a time


@dataclass(frozen=True)
class Constants:
    """The constants of one data set, see `constants` and `PRESETS`."""

    sigma: float
    """Standard deviation of (ε_x, ε_t) in Eq. (11), in the units of x."""
    tau: float
    """Eq. (11) multiplies the noise by (1 + tau)^m."""
    M: int
    """Upper end of the exponent m in Eq. (11)."""
    gamma: float
    """Added to the norm in the target of Eq. (12), in the units of x."""
    T: float
    """Where the ODE (Eq. 4) starts and the prior (Eq. 5) lives."""
    max_radius: float
    """The prior's radii are clipped to this by the published code."""
    t_substitution: float
    """Below this t the t-component is computed from the others, see `Substitution.below`."""
    restrict_M: bool = True  # noqa: N815  (the article's M)
    """Whether queries close to the data's plane take m from [0, 0.7 M] only, see `perturb`."""
    t_min: float = 1e-3
    """Where the ODE stops."""
    steps: int = 100
    """Steps of the fixed-grid solvers."""

    @property
    def noise(self) -> dict[str, Any]:
        """The arguments of `perturb`, `FieldLoss` and `UnnormalizedLoss` for the noise."""
        names = ("sigma", "tau", "M", "restrict_M")
        return {name: getattr(self, name) for name in names}


def constants(
    references: Tensor | ReferenceSet, *, D: float = 1, sigma: float = SIGMA, tau: float = TAU
) -> Constants:
    """The constants for a data set, by the rule of Xu et al. 2022 from the data's norm.

    With R the mean of ‖x0‖ over the references, in d dimensions, and S = sigma (1 + tau)^M the
    largest noise level:

        M = ⌊3/4 · log(R² / (2 √d sigma²)) / log(1 + tau)⌋ + 1, and 1 at the least
        T = √(2/π) S, the mean height of queries with the largest noise; for any D the mean of a
            chi variable of D degrees of freedom instead of √(2/π), for D = ∞ T = S
        max_radius = √d S, about their distance from the data
        gamma = R / 6

    The rule is published with R = 30, and gamma with 5 for all images in [-1, 1]: R / 6 is that,
    carried over to data of another size. t_substitution is gamma, as for CIFAR-10.

    Args:
        references: ReferenceSet or (N, *event) tensor: the data.
        D: > 0, dimensions added to the data's; 1 is PFGM. Only T depends on it.
        sigma: > 0, the smallest noise level, in the units of x0.
        tau: > 0, growth of the noise level with m.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """
    sigma, tau, D = positive("sigma", sigma), positive("tau", tau), positive("D", D, finite=False)
    if not isinstance(references, ReferenceSet):
        references = ReferenceSet(references, backend="eager")  # which prepares nothing
    norm, root_d = _mean_norm(references), math.sqrt(math.prod(references.event_shape))
    ratio = max(1.0, norm**2 / (2 * root_d * sigma**2))
    M = int(0.75 * math.log(ratio) / math.log1p(tau)) + 1
    largest = sigma * (1 + tau) ** M
    gamma = norm / 6
    return Constants(
        sigma=sigma,
        tau=tau,
        M=M,
        gamma=gamma,
        T=_mean_chi(D) * largest,
        max_radius=root_d * largest,
        t_substitution=gamma,
    )


def _mean_norm(references: ReferenceSet) -> float:
    """The mean of ‖x0‖, with few of the references decoded at a time."""
    values, table = references.own, references.table
    rows = max(1, DECODED // values.shape[1])
    parts = (decode(part, table).norm(dim=1).sum() for part in values.split(rows))
    total = torch.stack([*parts]).sum()
    if isinstance(references.values, Sharded):
        total = references.values.summed(total)
    return total.item() / len(references)


def _mean_chi(D: float) -> float:
    """√2 Γ((D+1)/2) / Γ(D/2), and 1 for D = ∞ as in `chi`."""
    if math.isinf(D):
        return 1.0
    return math.sqrt(2) * math.exp(math.lgamma((D + 1) / 2) - math.lgamma(D / 2))


PRESETS: dict[str, Constants] = {
    "cifar10": Constants(
        sigma=SIGMA,
        tau=TAU,
        M=291,
        gamma=5.0,
        T=40.0,
        max_radius=3000.0,
        t_substitution=5.0,
    ),
    "celeba64": Constants(
        sigma=SIGMA,
        tau=TAU,
        M=291,
        gamma=5.0,
        T=60.0,
        max_radius=6000.0,
        t_substitution=1.0,
    ),
    "lsun_bedroom256": Constants(
        sigma=SIGMA,
        tau=TAU,
        M=356,
        gamma=5.0,
        T=100.0,
        max_radius=30000.0,
        t_substitution=0.1,
    ),
}
"""As published with Xu et al. 2022, for images in [-1, 1]: near the rule, not by it."""
PUBLISHED = PRESETS["cifar10"]
"""What functions that do not see the data have for defaults."""
