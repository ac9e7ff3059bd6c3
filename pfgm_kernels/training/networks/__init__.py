# SPDX-License-Identifier: Apache-2.0
"""Networks, and what they predict.

A network is called as ``network(x (B, *event), noise_condition (B,))``, with labels (B,) as a third
argument where there are classes, and returns (B, *event). What that means is chosen apart:

* ``denoiser``: the posterior mean, by `Preconditioned` (any D); the noise condition is log(σ) / 4.
  The field follows exactly.
* ``field``: the field of Eq. (12) as published. The network returns the x-components (B, *event)
  and the t-component (B,); the noise condition is log(t) / 4. Samplers need `Substitution`.
* ``mean``: the field by way of the posterior mean, normalised by the query's own radius: the
  perceptron alone does that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pfgm_kernels.flow import Preconditioned
from pfgm_kernels.flow._queries import shaped
from pfgm_kernels.training.networks import own
from pfgm_kernels.training.networks.perceptron import T_FLOOR, FieldNetwork, Perceptron
from pfgm_kernels.training.networks.unet import PRESETS, UNet

PREDICTIONS = ("mean", "denoiser", "field")
NAMES = ("perceptron", *PRESETS)
OWN = "own"
"""The name of a network that is given from Python."""


class PublishedField(nn.Module):
    """The field (x (B, *event), t (B,)) -> (B, d + 1) of a network that predicts both parts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        condition = t.clamp_min(T_FLOOR).log() / 4
        result = self.network(x, condition, *([] if labels is None else [labels]))
        if not (isinstance(result, tuple | list) and len(result) == 2):
            raise ValueError(
                "a network that predicts field expects to return the x-components (B, *event) and "
                f"the t-component (B,), got {type(result).__name__}"
            )
        field_x = shaped("the network's x-components", result[0], x.shape, "(B, *event)")
        field_t = shaped("the network's t-component", result[1], x.shape[:1], "(B,)")
        return torch.cat([field_x.flatten(1), field_t[:, None]], dim=1)


def check_name(name: str) -> str:
    """``name`` if a network may be called so; raises ValueError otherwise."""
    if name in (*NAMES, OWN):
        return name
    module, colon, factory = name.partition(":")
    if not (colon and module and factory.isidentifier()):
        raise ValueError(
            f"network expects one of {', '.join(NAMES)} or package.module:factory, got {name!r}"
        )
    return name


def build(
    network: str,
    event_shape: tuple[int, ...],
    *,
    predicts: str,
    num_classes: int,
    width: int,
    depth: int,
    gamma: float,
    D: float,
    sigma_data: float,
    given: nn.Module | None = None,
    **moments: Any,
) -> nn.Module:
    """A new model, (x, t, labels=) -> the field (B, d + 1), or (B, *event) of a denoiser.

    given: the module itself where the network is ``own``. moments: ``center`` and ``spread`` of the
    data, for what normalises by them. Raises ValueError, in one sentence, where the network cannot
    be had, or not for such events.
    """
    if (network == OWN) != (given is not None):
        raise ValueError(
            f"network={OWN!r} in the config goes with a network given from Python: expected both, "
            f"got {network!r} and {'no network' if given is None else type(given).__name__}"
        )
    if predicts == "mean":
        options: dict[str, Any] = {"gamma": gamma, "num_classes": num_classes} | moments
        return FieldNetwork(event_shape, width=width, depth=depth, **options)
    height = predicts == "field"
    if given is not None:
        module = own.check(network, given)
    elif network == "perceptron":
        module = Perceptron(
            event_shape, width=width, depth=depth, num_classes=num_classes, height=height
        )
    elif network in PRESETS:
        module = UNet(network, event_shape, num_classes=num_classes, height=height)
    else:
        module = own.make(network, event_shape, num_classes)
    return PublishedField(module) if height else Preconditioned(module, D=D, sigma_data=sigma_data)
