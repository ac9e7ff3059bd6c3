# SPDX-License-Identifier: Apache-2.0
"""Training losses: on the field, Eqs. (12) and (10), and on the posterior mean, as a denoiser's.

All compute in float32 (float64 for a float64 batch), whatever the network computes in: batches of
16 bits are taken in float32, targets are made outside autocast, and outputs are cast up.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pfgm_kernels._checks import finite, non_negative, positive
from pfgm_kernels.field import poisson_field, posterior_mean
from pfgm_kernels.flow._queries import points, shaped, t_to_sigma
from pfgm_kernels.flow._range import RangeWatch
from pfgm_kernels.flow.constants import PUBLISHED, SIGMA, TAU, constants
from pfgm_kernels.flow.perturb import check_noise, heights, perturb, perturb_at
from pfgm_kernels.references import ReferenceSet

Network = Callable[..., Tensor]


class _Mean:
    """A loss that is the mean over its queries."""

    per_query: Callable[..., tuple[Tensor, Tensor]]

    def __call__(
        self,
        network: Network,
        x0_batch: Tensor,
        generator: torch.Generator | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The mean of the losses of `per_query`, of the same arguments: a 0-dim tensor."""
        return self.per_query(network, x0_batch, generator, labels)[1].mean()


class FieldLoss(_Mean):
    """The loss of Eq. (12), Xu et al. 2022: regression on the normalised field of all references.

        mean over queries and over the d + 1 components of (network(x, t) − field(x, t))²
        field = scale · (v, −t) / (‖(v, −t)‖ + gamma)

    where (x, t) = `perturb(x0_batch)` and v is the displacement to the references (which is why
    there is no sign in front of the field: it is −Normalize(·) of Eq. (12)). The references are
    meant to be the whole data set; the batch only says around which points to place queries.

    A network trained on it is a field to sample from as it is; `Substitution(gamma, …)` needs the
    same gamma and the default scale.

    The published code takes half the sum over components instead of their mean: its loss is
    (d + 1)/2 times this one (1,536.5 times at d = 3,072), which matters where gradients are clipped
    at a norm.

    Args:
        references: ReferenceSet or (N, *event) tensor, on the device of the batches.
        D: > 0, dimensions added to the data's; 1 is PFGM.
        gamma: ≥ 0, added to the norm, in the units of x; None is that of `constants(references)`.
        scale: > 0, factor of the target; None is √d, which makes the target's components of
            order 1.
        sigma, tau, M, restrict_M: of `perturb`; None for M is that of `constants(references)`.

    Attributes:
        references, D, gamma, scale: as given, gamma and scale as numbers.
        perturb: `perturb` with the arguments given.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """

    def __init__(
        self,
        references: Tensor | ReferenceSet,
        *,
        D: float = 1,
        gamma: float | None = None,
        scale: float | None = None,
        sigma: float = SIGMA,
        tau: float = TAU,
        M: float | None = None,
        restrict_M: bool = True,
    ) -> None:
        if not isinstance(references, ReferenceSet):
            references = ReferenceSet(references)
        if gamma is None or M is None:
            rule = constants(references, sigma=sigma, tau=tau)
            gamma, M = rule.gamma if gamma is None else gamma, rule.M if M is None else M
        sigma, tau, M, self.D = check_noise(sigma, tau, M, D)
        self.references = references
        self.gamma = non_negative("gamma", gamma)
        d = math.prod(references.event_shape)
        self.scale = math.sqrt(d) if scale is None else positive("scale", scale)
        self.perturb = partial(perturb, sigma=sigma, tau=tau, M=M, restrict_M=restrict_M, D=self.D)
        self._watch = RangeWatch()

    def per_query(
        self,
        network: Network,
        x0_batch: Tensor,
        generator: torch.Generator | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The heights t (B,) of the queries and the loss of each (B,), of
        `network(x (B, *event), t (B,)) -> (B, d + 1)` around x0_batch (B, *event).

        Where labels (B,) are given, the network is called with `labels=labels`, and the field is
        that of the references of each query's class.

        Differentiable in the network's parameters. Raises TypeError or ValueError where the batch
        or the network's output does not fit. Warns where the first batch is in another range than
        the references, as [0, 1] beside [-1, 1]; within a compiled or captured call, which cannot
        look at values, nothing does.
        """
        x, t = self.perturb(x0_batch, generator=generator)
        options = _keywords(labels)
        with torch.no_grad():
            target = poisson_field(
                x, t, self.references, D=self.D, gamma=self.gamma, scale=self.scale, **options
            )
        self._watch(x0_batch, self.references)
        return t, _squared_error(network(x, t, **options), target, "(B, d + 1)").mean(1)


class PosteriorMeanLoss(_Mean):
    """EDM's regression of a denoiser (Karras et al. 2022), for any D, on the exact posterior mean.

        mean over queries and over the d components of λ(σ) (denoiser(x, t) − E[x0 | x, t])²
        λ(σ) = (σ² + σ_d²) / (σ σ_d)²,   t = σ √D, for D = ∞ t = σ

    where t = `heights`, x = `perturb_at(x0_batch, t)` and σ_d = sigma_data. The posterior mean is
    over all references, meant to be the whole data set: a stable target (Xu et al. 2023, "Stable
    Target Field", for D = ∞) without the bias of a reference batch. Without references the target
    is x0 itself, as in PFGM++ and EDM: the same minimiser over the data, with noise on the way.

    λ is what makes the network inside `Preconditioned` of the same sigma_data be trained on targets
    of unit variance at every level. The published code takes the sum over components, d times this.

    Take D ≥ 8: λ knows of a draw its σ alone, and the tail of draws falls as r^(−D−1), so that for
    D ≤ 2 the loss of a denoiser that is not exact has no mean (which warns).

    Args:
        references: ReferenceSet or (N, *event) tensor, on the device of the batches, or None.
        D: > 0, dimensions added to the data's; `math.inf` is diffusion.
        sigma_data: > 0, standard deviation of the data's components, in the units of x.
        mean, std: of log σ, see `heights`.

    Attributes:
        references, D, sigma_data: as given.
        heights: `heights` with the arguments given.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """

    def __init__(
        self,
        references: Tensor | ReferenceSet | None = None,
        *,
        D: float,
        sigma_data: float = 0.5,
        mean: float = -1.2,
        std: float = 1.2,
    ) -> None:
        if not (references is None or isinstance(references, ReferenceSet)):
            references = ReferenceSet(references)
        self.references = references
        self.D = positive("D", D, finite=False)
        if self.D <= 2:
            warnings.warn(
                f"PosteriorMeanLoss expects D > 2 for a loss that has a mean (D ≥ 8 trains well), "
                f"got {self.D:g}: draws lie too far out; FieldLoss is for D = 1",
                stacklevel=2,
            )
        self.sigma_data = positive("sigma_data", sigma_data)
        mean, std = finite("mean", mean), positive("std", std)
        self.heights = partial(heights, D=self.D, mean=mean, std=std)
        self._watch = RangeWatch()

    def per_query(
        self,
        denoiser: Network,
        x0_batch: Tensor,
        generator: torch.Generator | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The heights t (B,) of the queries and the loss of each (B,), of
        `denoiser(x (B, *event), t (B,)) -> (B, *event)` around x0_batch (B, *event).

        Where labels (B,) are given, the denoiser is called with `labels=labels`, and the mean is
        over the references of each query's class. Raises and warns as `FieldLoss.per_query`.
        """
        x0 = points(x0_batch, "x0_batch")
        t = self.heights(len(x0), generator=generator, dtype=x0.dtype, device=x0.device)
        x = perturb_at(x0, t, D=self.D, generator=generator)
        target, options = x0, _keywords(labels)
        if self.references is not None:
            with torch.no_grad():
                target = posterior_mean(x, t, self.references, D=self.D, **options)
            self._watch(x0, self.references)
        sigma = t_to_sigma(t.double(), self.D)
        weight = (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()
        error = _squared_error(denoiser(x, t, **options), target, "(B, *event)").flatten(1).mean(1)
        return t, weight.to(error.dtype) * error


class UnnormalizedLoss(_Mean):
    """The loss of Eq. (10), Xu et al. 2022: regression on the raw field of one source per query.

        mean over queries and over the d + 1 components of
        (network(x, t) + (x − x0, t) / (‖x − x0‖² + t²)^((d+D)/2))²

    It needs no references: the minimiser is the mean of the raw field over the sources that a query
    may have come from. But the target's norm is r^(−(d+D−1)) at the distance r, over all noise
    levels. Beyond a few dimensions it overflows the float range where r < 1 (the loss is then inf)
    and underflows to 0 where r > 1: at d = 3072 float32 holds it only for r between 0.97 and 1.04,
    and then the few largest make up the whole loss. It is here for low d and for comparison; train
    on `FieldLoss`.

    Args:
        D: > 0 and finite, dimensions added to the data's; 1 is PFGM.
        sigma, tau, M, restrict_M: of `perturb`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """

    def __init__(
        self,
        *,
        D: float = 1,
        sigma: float = PUBLISHED.sigma,
        tau: float = PUBLISHED.tau,
        M: float = PUBLISHED.M,
        restrict_M: bool = PUBLISHED.restrict_M,
    ) -> None:
        sigma, tau, M, self.D = check_noise(sigma, tau, M, positive("D", D))
        self.perturb = partial(perturb, sigma=sigma, tau=tau, M=M, restrict_M=restrict_M, D=self.D)

    def per_query(
        self,
        network: Network,
        x0_batch: Tensor,
        generator: torch.Generator | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `FieldLoss.per_query`; labels are for the network alone."""
        x0 = points(x0_batch, "x0_batch")
        x, t = self.perturb(x0, generator=generator)
        difference = torch.cat([(x.double() - x0.double()).flatten(1), t.double()[:, None]], 1)
        # The power as exp of a logarithm in float64: it leaves the float range only where the
        # target itself does.
        log_squared = difference.square().sum(1, keepdim=True).log()
        k = difference.shape[1] - 1 + self.D
        target = (-difference * (-k / 2 * log_squared).exp()).to(x.dtype)
        return t, _squared_error(network(x, t, **_keywords(labels)), target, "(B, d + 1)").mean(1)


def _keywords(labels: Tensor | None) -> dict[str, Any]:
    """What networks and the op are called with besides: labels where there are any."""
    return {} if labels is None else {"labels": labels}


def _squared_error(prediction: object, target: Tensor, letters: str) -> Tensor:
    """(prediction − target)² in the shape of the target and, at the least, in its precision."""
    return (shaped("the network's output", prediction, target.shape, letters) - target).square()
