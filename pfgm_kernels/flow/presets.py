# SPDX-License-Identifier: Apache-2.0
"""The constants published with PFGM, by data set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Constants of one data set, as published (Xu et al. 2022 and its code, images in [-1, 1])."""

    sigma: float
    """Standard deviation of (ε_x, ε_t) in Eq. (11), in the units of x."""
    tau: float
    """Eq. (11) multiplies the noise by (1 + tau)^m."""
    M: int
    """Upper end of the exponent m in Eq. (11)."""
    restrict_M: bool  # noqa: N815  (the article's M)
    """Whether queries close to the data's plane take m from [0, 0.7 M] only, see `perturb`."""
    gamma: float
    """Added to the norm in the target of Eq. (12), in the units of x."""
    t_max: float
    """T, where the ODE (Eq. 4) starts and the prior (Eq. 5) lives."""
    t_min: float
    """Where the ODE stops."""
    t_substitution: float
    """Below this t the t-component is computed from the others, see `Substitution.below`."""
    max_radius: float
    """The prior's radii are clipped to this."""
    steps: int
    """Steps of the fixed-grid solvers."""


PRESETS: dict[str, Preset] = {
    "cifar10": Preset(
        sigma=0.01,
        tau=0.03,
        M=291,
        restrict_M=True,
        gamma=5.0,
        t_max=40.0,
        t_min=1e-3,
        t_substitution=5.0,
        max_radius=3000.0,
        steps=100,
    ),
    "celeba64": Preset(
        sigma=0.01,
        tau=0.03,
        M=291,
        restrict_M=True,
        gamma=5.0,
        t_max=60.0,
        t_min=1e-3,
        t_substitution=1.0,
        max_radius=6000.0,
        steps=100,
    ),
    "lsun_bedroom256": Preset(
        sigma=0.01,
        tau=0.03,
        M=356,
        restrict_M=True,
        gamma=5.0,
        t_max=100.0,
        t_min=1e-3,
        t_substitution=0.1,
        max_radius=30000.0,
        steps=100,
    ),
}
