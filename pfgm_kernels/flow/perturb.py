# SPDX-License-Identifier: Apache-2.0
"""Training queries around the data: Eq. (11) of Xu et al. 2022, and a kernel at given heights."""

from __future__ import annotations

import torch
from torch import Tensor

from pfgm_kernels._checks import FLOATING, finite, integer, positive
from pfgm_kernels.flow._queries import columns, each_height, points, sigma_to_t
from pfgm_kernels.flow.constants import PUBLISHED
from pfgm_kernels.flow.prior import chi


def perturb(
    x0: Tensor,
    *,
    sigma: float = PUBLISHED.sigma,
    tau: float = PUBLISHED.tau,
    M: float = PUBLISHED.M,
    restrict_M: bool = PUBLISHED.restrict_M,
    D: float = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Training queries (x, t) around the data points x0, Eq. (11) of Xu et al. 2022.

        x = x0 + ‖ε_x‖ (1+tau)^m u,   t = ‖ε_t‖ (1+tau)^m

    with ε_x ~ N(0, sigma² I_d), ε_t ~ N(0, sigma² I_D), u a uniform direction in R^d and m a real
    number uniform in [0, M]. ‖ε_t‖ is |N(0, sigma²)| for D = 1 and sigma times a chi variable of D
    degrees of freedom for any D > 0; for D = ∞, where t means the noise level itself, it is sigma.
    The defaults are those published for CIFAR-10; `constants` has them for any data.

    Args:
        x0: (B, *event) floating point of 16 to 64 bits, the data points.
        sigma: > 0, the smallest noise level, in the units of x0.
        tau: > 0, growth of the noise level with m.
        M: > 0, upper end of m: the largest noise level is sigma (1+tau)^M.
        restrict_M: where ‖ε_t‖ < sigma/2, m is drawn from [0, ⌊0.7 M⌋] instead: far from the data
            (large m) hardly any field line runs that close to the plane t = 0. The bound is the
            published 0.005 at the published sigma = 0.01; it holds for 38 % of the queries for
            D = 1, and for fewer the larger D is (1e-5 for D = 8, none for D = ∞).
        D: > 0, dimensions added to the data's; 1 is PFGM.
        generator: source of randomness, on the device of x0.

    Returns:
        x of the shape and dtype of x0 (float32 for 16 bits), and t (B,) in the same dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """
    x0 = points(x0)
    sigma, tau, M, D = check_noise(sigma, tau, M, D)
    count, device = x0.shape[0], x0.device
    norm_t = chi(count, D, generator, device)
    m = M * torch.empty_like(norm_t).uniform_(generator=generator)
    if restrict_M:
        m = torch.where(norm_t < 0.5, m * ((torch.zeros_like(m) + 0.7 * M).floor() / M), m)
    level = sigma * (torch.zeros_like(m) + (1 + tau)) ** m
    # The norm and the direction of a Gaussian vector are independent, so ‖ε_x‖ u is itself
    # N(0, σ² I): one normal draw stands for both.
    noise = torch.empty(x0.shape, dtype=x0.dtype, device=device).normal_(generator=generator)
    scale = columns(level.to(x0.dtype), x0)
    return x0 + scale * noise, (level * norm_t).to(x0.dtype)


def perturb_at(
    x0: Tensor, t: Tensor | float, *, D: float = 1, generator: torch.Generator | None = None
) -> Tensor:
    """A draw around each data point from the kernel at its height t:

        p_t(x | x0) ∝ (‖x − x0‖² + t²)^(−(d+D)/2),   for D = ∞ N(x0, t² I)

    The posterior of x0 given x is then that of `posterior_mean` and `poisson_field` at (x, t, D).
    x = x0 + t z / g with z standard normal in R^d and g the norm of a standard normal vector in
    R^D has exactly this density. Nothing is clipped: the tail falls as r^(−D−1), so for D = 1 a
    few draws lie very far out.

    Differentiable in x0 and t.

    Args:
        x0: (B, *event) floating point of 16 to 64 bits, the data points.
        t: > 0, number, 0-dim or (B,): the distance of each from the data's plane, in the units of
            x0, as `heights` draws it. For D > 1 it is the augmented radius r = σ√D, for D = ∞ the
            noise level σ itself.
        D: > 0, dimensions added to the data's; 1 is PFGM.
        generator: source of randomness, on the device of x0.

    Returns:
        x of the shape and dtype of x0 (float32 for 16 bits).

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """
    x0, D = points(x0), positive("D", D, finite=False)
    count, device = x0.shape[0], x0.device
    scale = each_height("t", t, count, device) / chi(count, D, generator, device)
    noise = torch.empty(x0.shape, dtype=x0.dtype, device=device).normal_(generator=generator)
    return x0 + columns(scale.to(x0.dtype), x0) * noise


def heights(
    count: int,
    *,
    D: float,
    mean: float = -1.2,
    std: float = 1.2,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Heights t to train at: t = σ √D with log σ ~ N(mean, std²), for D = ∞ t = σ.

    The noise levels are those of EDM (Karras et al. 2022), whose data has a standard deviation of
    0.5; √D is the alignment of PFGM++ (Xu et al. 2023), by which one σ means one level whatever D.

    Args:
        count: number of draws.
        D: > 0, dimensions added to the data's.
        mean, std: of log σ, std > 0.
        generator: source of randomness, on `device`.
        dtype: of the result, floating point of 16 to 64 bits.
        device: of the result; None for that of `generator`, or else torch's default device.

    Returns:
        (count,).

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """
    count, D = integer("count", count), positive("D", D, finite=False)
    mean, std = finite("mean", mean), positive("std", std)
    if dtype not in FLOATING:
        raise TypeError(f"dtype expects a floating-point type of 16 to 64 bits, got {dtype}")
    if device is None and generator is not None:
        device = generator.device
    normal = torch.empty(count, dtype=torch.float64, device=device).normal_(generator=generator)
    return sigma_to_t((mean + std * normal).exp(), D).to(dtype)


def check_noise(sigma: float, tau: float, M: float, D: float) -> tuple[float, float, float, float]:
    """The four as floats; raises TypeError or ValueError unless `perturb` takes them."""
    sigma, tau, M = positive("sigma", sigma), positive("tau", tau), positive("M", M)
    return sigma, tau, M, positive("D", D, finite=False)
