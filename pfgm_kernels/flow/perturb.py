# SPDX-License-Identifier: Apache-2.0
"""Training queries around the data, Eq. (11) of Xu et al. 2022."""

from __future__ import annotations

import torch
from torch import Tensor

from pfgm_kernels._checks import batch, positive
from pfgm_kernels.flow.prior import chi


def perturb(
    x0: Tensor,
    *,
    sigma: float = 0.01,
    tau: float = 0.03,
    M: float = 291,
    restrict_M: bool = True,
    D: float = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Training queries (x, t) around the data points x0, Eq. (11) of Xu et al. 2022.

        x = x0 + ‖ε_x‖ (1+tau)^m u,   t = ‖ε_t‖ (1+tau)^m

    with ε_x ~ N(0, sigma² I_d), ε_t ~ N(0, sigma² I_D), u a uniform direction in R^d and m a real
    number uniform in [0, M]. ‖ε_t‖ is |N(0, sigma²)| for D = 1 and sigma times a chi variable of D
    degrees of freedom for any D > 0; for D = ∞, where t means the noise level itself, it is sigma.

    Args:
        x0: (B, *event) float32 or float64, the data points.
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
        x of the shape and dtype of x0, and t (B,) in the same dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """
    x0 = batch("x0", x0)
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
    scale = level.to(x0.dtype).view(-1, *[1] * (x0.dim() - 1))
    return x0 + scale * noise, (level * norm_t).to(x0.dtype)


def check_noise(sigma: float, tau: float, M: float, D: float) -> tuple[float, float, float, float]:
    """The four as floats; raises TypeError or ValueError unless `perturb` takes them."""
    sigma, tau, M = positive("sigma", sigma), positive("tau", tau), positive("M", M)
    return sigma, tau, M, positive("D", D, finite=False)
