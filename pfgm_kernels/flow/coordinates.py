# SPDX-License-Identifier: Apache-2.0
"""Queries of flow matching and of variance-preserving diffusion in the coordinates of the field.

Both draw x = a x0 + b ε with ε ~ N(0, I). Then x / a is a draw from N(x0, t² I) with t = b / a, the
kernel of D = ∞: `posterior_mean(*query_of_…(x, …), x0, D=math.inf)` is their posterior mean.
"""

from __future__ import annotations

from torch import Tensor

from pfgm_kernels._checks import positive
from pfgm_kernels.flow._queries import columns, each_height, points


def query_of_flow_matching(x: Tensor, s: Tensor | float) -> tuple[Tensor, Tensor]:
    """The query (x / (1 − s), t = s / (1 − s)) of x = (1 − s) x0 + s ε, s from data to noise.

    This is the path of flow matching and of rectified flows; where they count from noise to data,
    s is 1 minus their time.

    Args:
        x: (B, *event) floating point of 16 to 64 bits.
        s: number, 0-dim or (B,), between 0 and 1 and neither.

    Returns:
        x of the shape given and t (B,), both float32, or float64 where x is.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """
    x = points(x, "x")
    s = _fraction("s", s, x)
    return _query(x, 1 - s, s)


def query_of_vp(x: Tensor, alpha: Tensor | float) -> tuple[Tensor, Tensor]:
    """The query (x / α, t = √(1 − α²) / α) of x = α x0 + √(1 − α²) ε.

    This is variance-preserving diffusion; the ᾱ of DDPM is α².

    Args:
        x: (B, *event) floating point of 16 to 64 bits.
        alpha: number, 0-dim or (B,), between 0 and 1 and neither.

    Returns and raises as `query_of_flow_matching`.
    """
    x = points(x, "x")
    alpha = _fraction("alpha", alpha, x)
    return _query(x, alpha, ((1 - alpha) * (1 + alpha)).sqrt())


def _fraction(name: str, value: Tensor | float, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor) and positive(name, value) >= 1:
        raise ValueError(f"{name} expects a number between 0 and 1, got {value}")
    return each_height(name, value, len(x), x.device)


def _query(x: Tensor, signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    return (x / columns(signal, x)).to(x.dtype), (noise / signal).to(x.dtype)
