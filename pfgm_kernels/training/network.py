# SPDX-License-Identifier: Apache-2.0
"""A small network for images of a few hundred pixels and for points: quick to train on a CPU."""

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


class FieldNetwork(nn.Module):
    """A network whose output is a field: (x (B, *event), t (B,)) -> (B, d + 1), as `poisson_field`.

    It predicts the posterior mean, the weighted mean x + v of the references, and derives the field
    scale * (v, -t) / (|(v, -t)| + gamma) of Eq. (12) from it. So its t-component is exact, and the
    slope of the sampling ODE, Eq. (4), is (x - mean) / t however small t becomes.

    gamma, scale: those of the loss that it is trained on; None for sqrt(d), as there.
    center (*event), spread: mean and standard deviation of the data, to normalise in- and output.
    width, depth: of the perceptron with residual blocks that does the work.
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
    ) -> None:
        super().__init__()
        d = math.prod(shape_of_event(event_shape))
        self.gamma = non_negative("gamma", gamma)
        self.scale = math.sqrt(d) if scale is None else positive("scale", scale)
        self.center: Tensor
        self.spread: Tensor
        # As torch's modules do: on the default device, unless the centre says where.
        with nullcontext() if center is None else center.device:
            self.register_buffer("center", torch.zeros(d) if center is None else center.flatten())
            self.register_buffer("spread", torch.tensor(spread))
            self.condition = _Condition(width=64)
            self.first = nn.Linear(d, width)
            self.blocks = nn.ModuleList(_Block(width, condition=64) for _ in range(depth))
            self.last = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, d))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        offset = x.flatten(1) - self.center
        t = t[:, None]
        # Far out the query's direction matters, near the data its position.
        radius = (offset.square().mean(dim=1, keepdim=True) + self.spread.square()).sqrt()
        condition = self.condition(torch.cat([t.clamp_min(T_FLOOR), radius], dim=1).log())
        h = self.first(offset / radius)
        for block in self.blocks:
            h = block(h, condition)
        displacement = self.spread * self.last(h) - offset
        field = torch.cat([displacement, -t], dim=1)
        return self.scale * field / (field.norm(dim=1, keepdim=True) + self.gamma)


class _Condition(nn.Module):
    """(log t, log radius) (B, 2) -> sines and cosines at several frequencies -> (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.linear = nn.Linear(4 * FREQUENCIES, width)
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
