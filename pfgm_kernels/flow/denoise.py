# SPDX-License-Identifier: Apache-2.0
"""Denoisers and fields, and how one becomes the other.

A denoiser `(x (B, *event), t (B,)) -> (B, *event)` is a network that predicts the posterior mean
E[x0 | x, t], or `posterior_mean` on a data set. A field `(x, t) -> (B, d + 1)` is what samplers
follow: (v, −t) with v = E[x0 | x, t] − x the displacement, times any factor > 0. Both pass keyword
arguments, such as labels, through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pfgm_kernels._checks import positive
from pfgm_kernels.flow._queries import columns, each_height, points, shaped, t_to_sigma

Denoiser = Callable[..., Tensor]
FieldFn = Callable[..., Tensor]
EVENTS = "(B, *event)"


class Preconditioned(nn.Module):
    """A denoiser: a network with the preconditioning of EDM (Karras et al. 2022), for any D.

        denoiser(x, t) = c_skip x + c_out network(c_in x, c_noise),   σ = t / √D, for D = ∞ σ = t
        c_skip = σ_d² / (σ² + σ_d²)     c_out = σ σ_d / √(σ² + σ_d²)
        c_in   = 1 / √(σ² + σ_d²)       c_noise = log(σ) / 4

    with σ_d = sigma_data. What the network sees and what it has to predict is of order 1 at all
    noise levels, and near the data (t → 0) the denoiser is the identity. `PosteriorMeanLoss` with
    the same D and sigma_data trains it, `as_field` makes it a field to sample from.

    Args:
        network: called as `network(x (B, *event), noise_condition (B,))`, and with a third argument
            `labels` where the denoiser is given labels; returns (B, *event).
        D: > 0, dimensions added to the data's.
        sigma_data: > 0, standard deviation of the data's components, in the units of x.

    Attributes:
        network, D, sigma_data: as given.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range.
    """

    def __init__(
        self, network: Callable[..., Tensor], *, D: float, sigma_data: float = 0.5
    ) -> None:
        super().__init__()
        if not callable(network):
            raise TypeError(f"network expects a function or module, got {type(network).__name__}")
        self.network = network
        self.D = positive("D", D, finite=False)
        self.sigma_data = positive("sigma_data", sigma_data)

    def forward(self, x: Tensor, t: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """The denoised x (B, *event) at t > 0, a number, 0-dim or (B,).

        Returns the shape and dtype of x, float32 where x has 16 bits and whatever the network
        computes in under autocast. The coefficients are computed in float64.
        """
        x = points(x, "x")
        sigma = t_to_sigma(each_height("t", t, len(x), x.device), self.D)
        variance = sigma.square() + self.sigma_data**2
        skip, out = self.sigma_data**2 / variance, sigma * self.sigma_data / variance.sqrt()
        skip, out, into = (columns(c.to(x.dtype), x) for c in (skip, out, variance.rsqrt()))
        condition = (sigma.log() / 4).to(x.dtype)
        output = self.network(into * x, condition, *([] if labels is None else [labels]))
        output = shaped("the network's output", output, x.shape, EVENTS)
        return skip * x + out * output.to(x.dtype)

    def extra_repr(self) -> str:
        return f"D={self.D}, sigma_data={self.sigma_data}"


def as_field(denoiser: Denoiser) -> FieldFn:
    """The field of a denoiser: `field_fn(x, t) = (denoiser(x, t) − x, −t)`, its t-component exact.

    This is how a network that predicts posterior means is sampled from; the slope of the sampling
    ODE is (x − denoiser(x, t)) / t. The result has the dtype of x, or of the denoiser's output if
    that has more bits, and at least 32 bits.

    Args:
        denoiser: (x (B, *event), t (B,)) -> (B, *event). Keyword arguments of the field, such as
            labels, are passed on to it.
    """

    def field_fn(x: Tensor, t: Tensor | float, **keywords: Any) -> Tensor:
        mean = shaped("the denoiser's output", denoiser(x, t, **keywords), x.shape, EVENTS)
        dtype = _at_least_float32(x, mean)
        height = each_height("t", t, len(x), x.device).to(dtype)
        return torch.cat([(mean.to(dtype) - x.to(dtype)).flatten(1), -height[:, None]], 1)

    return field_fn


def as_denoiser(field_fn: FieldFn) -> Denoiser:
    """The denoiser of a field: `denoiser(x, t) = x + (F_x / −F_t) t`, the inverse of `as_field`.

    Only the ratio of the components matters, so any normalisation will do: `poisson_field` on a
    data set, with any gamma and scale, or a network trained by `FieldLoss`. Where a network's F_t
    is not exact, at small t, neither is the mean (see `Substitution`); where it is 0 the result is
    not finite. The dtype is as in `as_field`.

    Args:
        field_fn: (x (B, *event), t (B,)) -> (B, d + 1), the t-component last. Keyword arguments of
            the denoiser are passed on to it.
    """

    def denoiser(x: Tensor, t: Tensor | float, **keywords: Any) -> Tensor:
        wanted = (len(x), x[0].numel() + 1)
        field = shaped("the field", field_fn(x, t, **keywords), wanted, "(B, d + 1)")
        dtype = _at_least_float32(x, field)
        field = field.to(dtype)
        ratio = each_height("t", t, len(x), x.device).to(dtype) / -field[:, -1]
        return x.to(dtype) + (field[:, :-1] * ratio[:, None]).view(x.shape)

    return denoiser


def field_of_pfgm(network: Callable[..., tuple[Tensor, Tensor]]) -> FieldFn:
    """The field of a network with the interface of the published PFGM models.

    These give (F_x, F_z) = √d (v, −z) / (‖(v, −z)‖ + gamma), as `FieldLoss` with its default scale:
    it points toward the data. `Substitution(gamma, below)` replaces F_z at small z, with the gamma
    (5) and the z of the model's configuration (`Constants.t_substitution`). The published samplers
    also add 1e-5 to F_z, which is left out here.

    Args:
        network: (x (B, *event), z (B,)) -> F_x (B, *event), F_z (B,), z being the t of this
            package. Keyword arguments are passed on to it.
    """

    def field_fn(x: Tensor, t: Tensor | float, **keywords: Any) -> Tensor:
        result = network(x, t, **keywords)
        if not (isinstance(result, tuple | list) and len(result) == 2):
            raise TypeError(f"network expects to return F_x and F_z, got {type(result).__name__}")
        field_x = shaped("the network's F_x", result[0], x.shape, EVENTS)
        field_z = shaped("the network's F_z", result[1], x.shape[:1], "(B,)")
        return torch.cat([field_x.flatten(1), field_z[:, None]], 1)

    return field_fn


def _at_least_float32(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for each in tensors:
        dtype = torch.promote_types(dtype, each.dtype)
    return dtype
