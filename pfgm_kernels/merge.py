# SPDX-License-Identifier: Apache-2.0
"""The one rule by which partial results over disjoint reference sets combine."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pfgm_kernels._checks import floating

Partial = tuple[Tensor, Tensor, Tensor, Tensor]
"""v (n, d), log_mass, anchor and log w of the anchor (n,) of some references."""


def merge(partials: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Combine displacements over disjoint reference sets into that over their union.

    log_mass = logsumexp_p(log_mass_p),  v = Σ_p softmax_p(log_mass_p) v_p   (in float64)

    Chunks, shards, streams and processes all use this rule. Infinite masses, which a query that
    coincides with a reference has, share the weight equally.

    Args:
        partials: pairs (v, log_mass) as `poisson_displacement` returns them: v of shape
            (B, *event), floating point; log_mass of shape (B,).

    Returns:
        v (B, *event) in the promoted dtype of the partial displacements, log_mass (B,) float64.

    Raises:
        TypeError: not pairs of dense floating-point tensors.
        ValueError: no partial, partials whose shapes or devices differ, or on the device meta.
    """
    partials = list(partials)
    if not partials:
        raise ValueError("merge expects at least one (displacement, log_mass) pair, got none")
    for pair in partials:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            got = type(pair).__name__
            raise TypeError(f"merge expects (displacement, log_mass) pairs, got {got}")
        floating("displacement", pair[0])
        floating("log_mass", pair[1])
    shape, device = partials[0][0].shape, partials[0][0].device
    for v, log_mass in partials:
        if v.dim() < 1 or v.shape != shape or log_mass.shape != shape[:1]:
            raise ValueError(
                f"merge expects displacements (B, *event) of shape {tuple(shape)} with log masses "
                f"of shape {tuple(shape[:1])}, got {tuple(v.shape)} and {tuple(log_mass.shape)}"
            )
        if v.device != device or log_mass.device != device:
            raise ValueError(
                f"merge expects all on one device, {device}, got {v.device} and {log_mass.device}"
            )
    displacements, log_masses = zip(*partials, strict=True)
    dtype = functools.reduce(torch.promote_types, (v.dtype for v in displacements))
    weights, log_mass = mass_weights(torch.stack(log_masses))
    terms = (
        weight.view(-1, *[1] * (v.dim() - 1)) * v.double()
        for v, weight in zip(displacements, weights, strict=True)
    )
    return functools.reduce(torch.add, terms).to(dtype), log_mass


def join(a: Partial, b: Partial, nearer: Tensor | None = None) -> tuple[Partial, Tensor]:
    """`merge` of two chunks of a call, each with its nearest reference besides, all float64; and
    whether that of b is the nearer one (n,).

    nearer: by how much its logit is the greater, of `relative_logit`, where the log masses
    `lose_digits`.
    """
    if nearer is None:
        more = (b[1] - a[1]).nan_to_num_(0.0, torch.inf, -torch.inf)  # infinite ones are equal
        nearer = more + b[3] - a[3]
    else:
        more = nearer + a[3] - b[3]
    share = more.sigmoid()[:, None]
    displacement = torch.lerp(a[0], b[0], share)
    log_mass = torch.where(more > 0, b[1], a[1]) - logsigmoid(more.abs())
    closer = nearer > 0
    anchor = torch.where(closer, b[2], a[2])
    log_weight = torch.where(closer, b[3] + logsigmoid(more), a[3] + logsigmoid(-more))
    return (displacement, log_mass, anchor, log_weight), closer


def lose_digits(k: float, dtype: torch.dtype) -> bool:
    """Whether differences of log masses, which are some k, lose digits that a result of this dtype
    should have.
    """
    return k > (1e4 if dtype == torch.float64 else 1e6)


def relative_logit(u_a: Tensor, u_b: Tensor, t: Tensor, k: float) -> Tensor:
    """The logits of the references x + u_b less those of x + u_a, all (n, d) float64, t (n,)."""
    gap = ((u_b - u_a) * (u_b + u_a)).sum(1)  # s_b − s_a
    if math.isinf(k):
        return -gap / (2 * t * t)
    # Relative to the nearer one's, which is the smaller and hence has the digits.
    square = torch.where(gap > 0, u_a.square().sum(1), u_b.square().sum(1)) + t * t
    logit = -(k / 2) * gap.sign() * (gap.abs() / square).log1p()
    return logit.masked_fill_(gap == 0, 0.0)


def mass_weights(log_masses: Tensor) -> tuple[Tensor, Tensor]:
    """Weights softmax_p(log_mass_p) (P, B) and the total log mass (B,), both float64.

    Differentiable; equal infinities share equally, NaN stays NaN.
    """
    log_masses = log_masses.double()
    peak = log_masses.detach().amax(0)
    shared = torch.where(log_masses == peak, 0.0, -torch.inf)
    weights = torch.where(peak.isfinite(), log_masses - peak, shared).exp()
    total = weights.sum(0)
    return weights / total, peak + total.log()
