# SPDX-License-Identifier: Apache-2.0
"""A perceptron for points and for images of a few hundred pixels: quick to train on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from pfgm_kernels._checks import non_negative, positive, shape_of_event

FREQUENCIES = 16
T_FLOOR = 1e-5


class Perceptron(nn.Module):
    """Residual blocks on flat events, modulated by conditions and, if there are any, by a class.

    It is called as every network here, (x (B, *event), noise_condition (B,), labels (B,) or none)
    -> (B, *event), and with `height` also gives the t-component of a field, (B,).
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        width: int,
        depth: int,
        num_classes: int = 0,
        height: bool = False,
        conditions: int = 1,
    ) -> None:
        super().__init__()
        d = math.prod(shape_of_event(event_shape))
        self.height = height
        self.condition = _Condition(conditions, width=64)
        self.first = nn.Linear(d, width)
        self.blocks = nn.ModuleList(_Block(width, condition=64) for _ in range(depth))
        self.last = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, d + height))
        self.classes = nn.Embedding(num_classes, 64) if num_classes else None

    def forward(
        self, x: Tensor, noise_condition: Tensor, labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        # At four times the condition, log t or log sigma, the frequencies are those of a logarithm.
        output = self.body(x.flatten(1), 4 * noise_condition[:, None], labels)
        if self.height:
            return output[:, :-1].view_as(x), output[:, -1]
        return output.view_as(x)

    def body(self, flat: Tensor, conditions: Tensor, labels: Tensor | None) -> Tensor:
        """(B, d), (B, conditions) -> (B, d), of order 1 like what comes in."""
        condition = self.condition(conditions)
        if self.classes is not None:
            if labels is None:
                raise ValueError("a network with classes expects labels, got none")
            condition = condition + self.classes(labels)
        h = self.first(flat)
        for block in self.blocks:
            h = block(h, condition)
        return self.last(h)


class FieldNetwork(Perceptron):
    """A network whose output is a field: (x (B, *event), t (B,)) -> (B, d + 1), as `poisson_field`.

    It predicts the posterior mean, the weighted mean x + v of the references, and derives the field
    scale * (v, -t) / (|(v, -t)| + gamma) of Eq. (12) from it. So its t-component is exact, and the
    slope of the sampling ODE, Eq. (4), is (x - mean) / t however small t becomes.

    gamma, scale: those of the loss that it is trained on; None for sqrt(d), as there.
    center (*event), spread: mean and standard deviation of the data, to normalise in- and output.
    width, depth, num_classes: of the perceptron with residual blocks that does the work.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        width: int,
        depth: int,
        gamma: float,
        scale: float | None = None,
        center: Tensor | None = None,
        spread: float = 1.0,
        num_classes: int = 0,
    ) -> None:
        # As torch's modules do: on the default device, unless the centre says where.
        with nullcontext() if center is None else center.device:
            super().__init__(
                event_shape, width=width, depth=depth, num_classes=num_classes, conditions=2
            )
            d = self.first.in_features
            self.center: Tensor
            self.spread: Tensor
            self.register_buffer("center", torch.zeros(d) if center is None else center.flatten())
            self.register_buffer("spread", torch.tensor(spread))
        self.gamma = non_negative("gamma", gamma)
        self.scale = math.sqrt(d) if scale is None else positive("scale", scale)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        offset = x.flatten(1) - self.center
        t = t[:, None]
        # Far out the query's direction matters, near the data its position.
        radius = (offset.square().mean(dim=1, keepdim=True) + self.spread.square()).sqrt()
        conditions = torch.cat([t.clamp_min(T_FLOOR), radius], dim=1).log()
        output = self.body(offset / radius, conditions, labels)
        displacement = self.spread * output.to(x.dtype) - offset
        field = torch.cat([displacement, -t], dim=1)
        return self.scale * field / (field.norm(dim=1, keepdim=True) + self.gamma)


class _Condition(nn.Module):
    """Logarithms (B, count) -> sines and cosines at several frequencies -> (B, width)."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.linear = nn.Linear(2 * count * FREQUENCIES, width)
        device = self.linear.weight.device
        frequencies = torch.logspace(-2, 3, FREQUENCIES, base=2, device=device)
        self.register_buffer("frequencies", frequencies)

    def forward(self, log: Tensor) -> Tensor:
        angles = (log[:, :, None] * self.frequencies).flatten(1)
        return silu(self.linear(torch.cat([angles.sin(), angles.cos()], dim=1)))


class _Block(nn.Module):
    """A residual block, modulated by the condition (B, condition). It starts as the identity."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(condition, 2 * width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        gain, shift = self.modulation(condition).chunk(2, dim=1)
        return h + self.outer(silu(self.inner(self.norm(h) * (1 + gain) + shift)))
