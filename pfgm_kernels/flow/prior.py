# SPDX-License-Identifier: Apache-2.0
"""The prior on the plane t = T, Eqs. (5)–(7) of Xu et al. 2022: p(x) ∝ (‖x‖² + T²)^(−(d+D)/2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pfgm_kernels._checks import FLOATING, batch, holds, integer, positive, shape_of_event
from pfgm_kernels.density import log_normalizer
from pfgm_kernels.flow._queries import each_height
from pfgm_kernels.flow._seeds import generators


def chi(
    count: int, D: float, generator: torch.Generator | None, device: torch.device | str | None
) -> Tensor:
    """(count,) float64 norms of standard normal vectors in R^D, D > 0 real; ones for D = ∞.

    The ones are the convention that t is r = σ√D for a finite D and σ itself for D = ∞, which
    makes T / chi the scale of the Gaussian that mixes to the prior, and σ · chi the t of Eq. (11).
    """
    if not holds(math.inf > D):
        return torch.ones(count, dtype=torch.float64, device=device)
    shape = torch.zeros(count, dtype=torch.float64, device=device) + D / 2
    return (2 * torch._standard_gamma(shape, generator=generator)).sqrt()


def sample_prior(
    count: int,
    event_shape: int | Sequence[int],
    *,
    T: Tensor | float,
    D: float = 1,
    max_radius: float | None = None,
    generator: torch.Generator | None = None,
    seeds: Iterable[int] | Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws from the prior on the plane t = T, Eqs. (5)–(7): p(x) ∝ (‖x‖² + T²)^(−(d+D)/2).

    x = T z / g with z standard normal in R^d and g the norm of a standard normal vector in R^D,
    which has exactly this density: the radius follows r^(d−1) (r² + T²)^(−(d+D)/2) and the
    direction is uniform. The tail falls as r^(−D−1), so for D = 1 the radius has no mean.
    Computed in float64: no draw is infinite in float32 unless D is well below 1.

    Args:
        count: number of draws.
        event_shape: shape of one draw, d values in all; a number is an event of one axis.
        T: > 0, number, 0-dim or (count,): the distance of the plane from the data's, of each draw
            its own if need be, in the units of x.
        D: > 0, dimensions added to the data's d; for `math.inf` the prior is N(0, T² I).
        max_radius: radii above it are clipped to it (as Xu et al. 2022 do); None clips nothing.
        generator: source of randomness, on `device`.
        seeds: `count` integers from 0 to 2³² − 1, instead of a generator: the i-th draw is then
            made on the CPU from the i-th seed, the same whatever the others and the device are.
        dtype: of the result, floating point of 16 to 64 bits.
        device: of the result; None for that of `generator` or T, or else torch's default device.

    Returns:
        (count, *event_shape).

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """
    count, D = integer("count", count), positive("D", D, finite=False)
    event_shape = shape_of_event(event_shape)
    if dtype not in FLOATING:
        raise TypeError(f"dtype expects a floating-point type of 16 to 64 bits, got {dtype}")
    own_T = isinstance(T, Tensor) and T.dim() > 0
    if device is None and (generator is not None or own_T):
        device = (generator or T).device  # type: ignore[union-attr]
    d = math.prod(event_shape)
    if seeds is None:
        z, radius, g = _normals(count, d, D, generator, device)
    else:
        if generator is not None:
            raise ValueError("sample_prior expects a generator or seeds, got both")
        sources = generators(seeds)
        if len(sources) != count:
            raise ValueError(f"seeds expects one for each of {count} draws, got {len(sources)}")
        device = torch.get_default_device() if device is None else device
        each = [_normals(1, d, D, source, "cpu") for source in sources]
        z, radius, g = (torch.cat(parts).to(device) for parts in zip(*each, strict=True))
    # A number is checked, also where a tensor holds it.
    factor = each_height("T", T if own_T else positive("T", T), count, z.device) / g
    if max_radius is not None:
        factor = factor.minimum(positive("max_radius", max_radius) / radius)
    return (z * factor[:, None]).to(dtype).view(count, *event_shape)


def _normals(
    count: int,
    d: int,
    D: float,
    generator: torch.Generator | None,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal vectors (count, d) float64, their norms, and those of others in R^D."""
    z = torch.empty(count, d, dtype=torch.float64, device=device).normal_(generator=generator)
    return z, z.norm(dim=1), chi(count, D, generator, device)


def log_prior(x: Tensor, *, T: float, D: float = 1) -> Tensor:
    """Logarithm of the prior's density on the plane t = T, normalised over R^d, Eqs. (5)–(7).

        p(x) = Γ((d+D)/2) / (Γ(D/2) π^(d/2)) · T^D · (‖x‖² + T²)^(−(d+D)/2)

    For D = 1 this is 2T / S_{d+1}(1) · (‖x‖² + T²)^(−(d+1)/2), S_{d+1}(1) = 2π^((d+1)/2) /
    Γ((d+1)/2) being the area of the unit sphere in d + 1 dimensions: half of the field lines of a
    charge at the origin cross the plane. (The likelihood code of Xu et al. 2022 uses the sphere in
    d dimensions.)

    Args:
        x: (B, *event) float32 or float64.
        T: > 0, in the units of x.
        D: > 0; `math.inf` gives the density of N(0, T² I). D = 0 has no normalised density.

    Returns:
        (B,) float64, in nats.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """
    x, T, D = batch("x", x), positive("T", T), positive("D", D, finite=False)
    scaled = x.flatten(1).double() / T
    d = scaled.shape[1]
    squared = scaled.square().sum(1)
    # As a tensor: torch.compile would trace every number of math's functions anew.
    log_volume = d * (torch.zeros((), dtype=torch.float64, device=x.device) + T).log()
    constant = log_normalizer(d, D, x.device) - log_volume
    if not holds(math.inf > D):
        return constant - squared / 2
    return constant - (d + D) / 2 * squared.log1p()
