# SPDX-License-Identifier: Apache-2.0
"""Between and beyond the latents of encoded images (`encode` says how well these come back)."""

from __future__ import annotations

import torch
from torch import Tensor

from pfgm_kernels._checks import integer, positive, tensor

KIND = "a float32 or float64 tensor"


def interpolate(a: Tensor, b: Tensor, n: int) -> Tensor:
    """n latents from a to b: their direction on the arc between, their radius geometrically.

        direction ∝ sin((1 − s) ω) a/‖a‖ + sin(s ω) b/‖b‖,   radius = ‖a‖^(1−s) ‖b‖^s

    with ω the angle of a and b, and s even from 0 to 1. Latents of data are spread over orders of
    magnitude of the radius, and on a straight line between two would pass near the origin.

    a, b: (*event) float32 or float64, finite, not 0 nor of opposite directions; two latents, as
        `encode` returns them (`encode(...).x[0]`).
    n: ≥ 2, how many, a and b among them.

    Returns (n, *event), for `sample`. Raises TypeError or ValueError for an argument of the wrong
    type, shape or range.
    """
    n = integer("n", n, 2)
    r_a, r_b = _norm("a", a), _norm("b", b)
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            f"b expects the shape, dtype and device of a, {tuple(a.shape)}, {a.dtype}, {a.device}, "
            f"got {tuple(b.shape)}, {b.dtype}, {b.device}"
        )
    u, v = a.double().flatten() / r_a, b.double().flatten() / r_b
    angle = 2 * torch.atan2((u - v).norm(), (u + v).norm())
    if angle > torch.pi - 1e-6:
        raise ValueError("a and b expect directions with one arc between them, got opposite ones")
    s = torch.linspace(0, 1, n, dtype=torch.float64, device=a.device)[:, None]
    arc = (angle * (1 - s)).sin() * u + (angle * s).sin() * v if angle > 0 else u.expand(n, -1)
    path = r_a ** (1 - s) * r_b**s * arc / arc.norm(dim=1, keepdim=True)
    path[0], path[-1] = a.flatten(), b.flatten()
    return path.to(a.dtype).view(n, *a.shape)


def rescale(latent: Tensor, factor: float | Tensor) -> Tensor:
    """Latents with their radius multiplied by `factor`, a temperature: below 1, toward samples as
    those of the prior's centre, above 1 as those of its tail.

    latent: (B, *event) float32 or float64.
    factor: > 0, a number or (B,) of one each.

    Returns (B, *event) of latent's dtype. Raises TypeError or ValueError for an argument of the
    wrong type, shape or range.
    """
    latent = tensor("latent", latent, (torch.float32, torch.float64), KIND)
    if not isinstance(factor, Tensor) or factor.dim() == 0:
        return latent * positive("factor", factor)
    if latent.dim() < 1 or factor.shape != latent.shape[:1]:
        raise ValueError(
            f"factor expects a number or shape (B,) = {tuple(latent.shape[:1])}, "
            f"got {tuple(factor.shape)}"
        )
    if not (torch.isfinite(factor) & (factor > 0)).all():
        raise ValueError("factor expects finite numbers > 0, got others")
    return latent * factor.to(latent).view(-1, *[1] * (latent.dim() - 1))


def _norm(name: str, value: Tensor) -> Tensor:
    value = tensor(name, value, (torch.float32, torch.float64), KIND)
    norm = value.double().norm()
    if value.dim() == 0 or not 0 < norm < torch.inf:
        raise ValueError(
            f"{name} expects a finite latent other than 0, (*event), got shape "
            f"{tuple(value.shape)} of norm {norm:g}"
        )
    return norm
