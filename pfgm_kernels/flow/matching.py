# SPDX-License-Identifier: Apache-2.0
"""Electrostatic field matching: the field between two charged plates (Kolesov et al. 2025)."""

from __future__ import annotations

from torch import Tensor

from pfgm_kernels._checks import positive
from pfgm_kernels.field import poisson_field
from pfgm_kernels.references import ReferenceSet


def two_plate_field(
    x: Tensor,
    t: Tensor | float,
    p: Tensor | ReferenceSet,
    q: Tensor | ReferenceSet,
    *,
    L: float,
    gamma: float = 0.0,
    scale: float = 1.0,
    D: float = 1,
    backend: str | None = None,
) -> Tensor:
    """The target of electrostatic field matching at the queries (x, t), 0 < t < L.

    Positive charges p lie on the plate at height 0, negative ones q on the plate at height L. Each
    plate's field is normalised by itself, and the lines lead from p to q:

        field = poisson_field(x, t − L, q) − poisson_field(x, t, p)

    The published target has scale = √(d + 1) and its configurations' gamma. (Its code has the
    t-component first.) dx/dt = F_x/F_t follows the lines either way, so this is a `field_fn` for
    `sample` and `encode`: from T = L − t_min, at q, to t_min, at p, and back.

    References at any height t0 are those of `poisson_field` at t − t0, as q is here at L.

    Args:
        x: (B, *event) float16, bfloat16, float32 or float64.
        t: number, 0-dim or (B,), in the units of x.
        p, q: (N, *event), (M, *event) tensors or ReferenceSets; N and M may differ.
        L: > 0, the distance of the plates.
        gamma, scale, D, backend: those of `poisson_field`, for both plates.

    Returns:
        (B, d + 1), the t-component last, in the dtype of `poisson_field`. Differentiable in x, t
        and tensors p and q, once.

    Raises:
        TypeError, ValueError, RuntimeError: as `poisson_field`, which names p and q x0.
    """
    L = positive("L", L)
    from_p = poisson_field(x, t, p, D=D, gamma=gamma, scale=scale, backend=backend)
    return poisson_field(x, t - L, q, D=D, gamma=gamma, scale=scale, backend=backend) - from_p
