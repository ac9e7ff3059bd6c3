# SPDX-License-Identifier: Apache-2.0
"""Training losses: the normalised one of Eq. (12) and the unnormalised one of Eq. (10)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pfgm_kernels._checks import non_negative, positive
from pfgm_kernels.field import poisson_field
from pfgm_kernels.flow._range import warn_of_another_range
from pfgm_kernels.flow.perturb import check_noise, perturb
from pfgm_kernels.references import ReferenceSet

Field = Callable[[Tensor, Tensor], Tensor]


class FieldLoss:
    """The loss of Eq. (12), Xu et al. 2022: regression on the normalised field of all references.

        mean over queries and over the d + 1 components of (network(x, t) − field(x, t))²
        field = scale · (v, −t) / (‖(v, −t)‖ + gamma)

    where (x, t) = `perturb(x0_batch)` and v is the displacement to the references (which is why
    there is no sign in front of the field: it is −Normalize(·) of Eq. (12)). The references are
    meant to be the whole data set; the batch only says around which points to place queries.

    A network trained on it is a field to sample from as it is; `Substitution(gamma, …)` needs the
    same gamma and the default scale.

    Args:
        references: ReferenceSet or (N, *event) tensor, on the device of the batches.
        D: > 0, dimensions added to the data's; 1 is PFGM.
        gamma: ≥ 0, added to the norm, in the units of x.
        scale: > 0, factor of the target; None is √d, which makes the target's components of
            order 1.
        sigma, tau, M, restrict_M: of `perturb`.

    Attributes:
        references, D, gamma, scale: as given, scale as a number.
        perturb: `perturb` with the arguments given.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """

    def __init__(
        self,
        references: Tensor | ReferenceSet,
        *,
        D: float = 1,
        gamma: float = 5.0,
        scale: float | None = None,
        sigma: float = 0.01,
        tau: float = 0.03,
        M: float = 291,
        restrict_M: bool = True,
    ) -> None:
        if not isinstance(references, ReferenceSet):
            references = ReferenceSet(references)
        sigma, tau, M, self.D = check_noise(sigma, tau, M, D)
        self.references = references
        self.gamma = non_negative("gamma", gamma)
        d = math.prod(references.event_shape)
        self.scale = math.sqrt(d) if scale is None else positive("scale", scale)
        self.perturb = partial(perturb, sigma=sigma, tau=tau, M=M, restrict_M=restrict_M, D=self.D)
        self._looked = False

    def __call__(
        self, network: Field, x0_batch: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss of `network(x (B, *event), t (B,)) -> (B, d + 1)` around x0_batch (B, *event).

        Returns a 0-dim tensor, differentiable in the network's parameters. Raises TypeError or
        ValueError where the batch or the network's output does not fit. Warns where the first batch
        is in another range than the references, as [0, 1] beside [-1, 1]; within a compiled or
        captured call, which cannot look at values, nothing does.
        """
        x, t = self.perturb(x0_batch, generator=generator)
        with torch.no_grad():
            target = poisson_field(
                x, t, self.references, D=self.D, gamma=self.gamma, scale=self.scale
            )
        if not _blind(x) and not self._looked:
            self._looked = True
            warn_of_another_range(x0_batch, self.references)
        return _regression(network, x, t, target)


class UnnormalizedLoss:
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
        sigma: float = 0.01,
        tau: float = 0.03,
        M: float = 291,
        restrict_M: bool = True,
    ) -> None:
        sigma, tau, M, self.D = check_noise(sigma, tau, M, positive("D", D))
        self.perturb = partial(perturb, sigma=sigma, tau=tau, M=M, restrict_M=restrict_M, D=self.D)

    def __call__(
        self, network: Field, x0_batch: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """As `FieldLoss.__call__`."""
        x, t = self.perturb(x0_batch, generator=generator)
        difference = torch.cat(
            [(x.double() - x0_batch.double()).flatten(1), t.double()[:, None]], 1
        )
        # The power as exp of a logarithm in float64: it leaves the float range only where the
        # target itself does.
        log_squared = difference.square().sum(1, keepdim=True).log()
        k = difference.shape[1] - 1 + self.D
        target = -difference * (-k / 2 * log_squared).exp()
        return _regression(network, x, t, target.to(x.dtype))


def _blind(x: Tensor) -> bool:
    """Whether values cannot be looked at: within a compiled or captured call."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _regression(network: Field, x: Tensor, t: Tensor, target: Tensor) -> Tensor:
    """Mean of the squared error over queries and components."""
    prediction = network(x, t)
    if prediction.shape != target.shape:
        raise ValueError(
            f"the network's output expects shape (B, d + 1) = {tuple(target.shape)}, "
            f"got {tuple(prediction.shape)}"
        )
    return (prediction - target).square().mean()
