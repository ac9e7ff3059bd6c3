# SPDX-License-Identifier: Apache-2.0
"""The t-component of a trained network at small t."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pfgm_kernels._checks import positive


@dataclass(frozen=True)
class Substitution:
    """The published substitution for the t-component of a trained network at small t.

    There F_t ≈ −t √d / (R + gamma) is too small for a network to get right, but R follows from
    F_x. With F = √d (v, −t) / (R + gamma), the target of `FieldLoss` with its default scale,
    n = ‖F_x‖ / √d and R² = ‖v‖² + t²:

        n = ‖v‖ / (R + gamma)   ⟺   R = (n² gamma + √(n² gamma² + (1 − n²) t²)) / (1 − n²)
        F_t := −√d t / (R + gamma)

    This is the exact inverse, so that the exact field is left as it is; Xu et al. 2022 approximate
    it by ‖v‖ ≈ n gamma / (1 − n). Where a network overshoots, R would be far too large (n just
    under 1) or not exist (n ≥ 1): R never exceeds √((‖x‖ + √d)² + t²), the distance at which
    the furthest corner of [-1, 1]^d may lie, so data is assumed to lie there.
    """

    gamma: float
    """> 0, that of the target, in the units of x."""
    below: float
    """> 0, the t below which the t-component is substituted (`Constants.t_substitution`)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", positive("gamma", self.gamma))
        object.__setattr__(self, "below", positive("below", self.below))

    def t_component(self, x: Tensor, t: Tensor, field_x: Tensor) -> Tensor:
        """F_t (B,) of queries x (B, d) at t (B,) from F_x (B, d)."""
        root_d = math.sqrt(x.shape[1])
        n = field_x.norm(dim=1) / root_d
        gap = (1 - n * n).clamp_min(torch.finfo(n.dtype).tiny)
        n_gamma = n * self.gamma
        distance = (n * n_gamma + (n_gamma.square() + gap * t * t).sqrt()) / gap
        furthest = (x.norm(dim=1) + root_d).square().add(t * t).sqrt()
        return -root_d * t / (distance.minimum(furthest) + self.gamma)
