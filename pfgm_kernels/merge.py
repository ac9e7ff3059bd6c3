# SPDX-License-Identifier: Apache-2.0
"""The one rule by which partial results over disjoint reference sets combine."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pfgm_kernels._checks import floating


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
    displacement, log_mass, _ = combine(displacements, log_masses)
    return displacement.to(dtype), log_mass


def combine(
    displacements: Sequence[Tensor], log_masses: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """What `merge` gives, of partial results that fit, in float64, and the weights (P, B)."""
    weights, log_mass = mass_weights(torch.stack(list(log_masses)))
    terms = (
        weight.view(-1, *[1] * (v.dim() - 1)) * v.double()
        for v, weight in zip(displacements, weights, strict=True)
    )
    return functools.reduce(torch.add, terms), log_mass, weights


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
