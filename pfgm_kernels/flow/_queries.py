# SPDX-License-Identifier: Apache-2.0
"""What queries (x, t) are made of: points, a height for each, and the noise level it means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pfgm_kernels._checks import REAL, batch, floating, holds, positive, tensor


def points(x0: object, name: str = "x0") -> Tensor:
    """x0 as a float32 or float64 tensor (B, *event); 16 bits are computed with in float32."""
    x0 = floating(name, x0)
    return batch(name, x0.to(torch.promote_types(x0.dtype, torch.float32)))


def each_height(name: str, value: Tensor | float, count: int, device: torch.device) -> Tensor:
    """`value`, a number > 0, 0-dim or (count,), as a float64 tensor (count,) on `device`.

    Values of tensors are not looked at: that would have a GPU wait.
    """
    if not isinstance(value, Tensor):
        # torch.full would have torch.compile trace every number anew.
        zero = torch.zeros(count, dtype=torch.float64, device=device)
        return zero + positive(name, value)
    tensor(name, value, REAL, "real numbers")
    if value.shape not in (torch.Size([]), torch.Size([count])):
        raise ValueError(
            f"{name} expects a number, a 0-dim tensor or shape ({count},), got {tuple(value.shape)}"
        )
    if value.dim() > 0 and value.device != device:
        raise ValueError(f"{name} expects the device {device}, got {value.device}")
    return value.to(device, torch.float64).expand(count)


def shaped(name: str, output: object, shape: Sequence[int], letters: str) -> Tensor:
    """What a caller's function returned, a tensor of `shape`, which `letters` stand for."""
    if not isinstance(output, Tensor) or output.shape != torch.Size(shape):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{name} expects shape {letters} = {tuple(shape)}, got {got}")
    return output


def columns(values: Tensor, x: Tensor) -> Tensor:
    """(B,) as (B, 1, …, 1), to be multiplied with x (B, *event)."""
    return values.view(-1, *[1] * (x.dim() - 1))


def root_of(D: float) -> float:
    """√D of t = σ √D; 1 for D = ∞, where t is σ."""
    return 1.0 if math.isinf(D) else math.sqrt(D)


def sigma_to_t(sigma: Tensor, D: float) -> Tensor:
    """t = σ √D; σ itself for D = ∞."""
    return sigma * (sigma.new_zeros(()) + D).sqrt() if holds(math.inf > D) else sigma


def t_to_sigma(t: Tensor, D: float) -> Tensor:
    """The inverse of `sigma_to_t`."""
    return t / (t.new_zeros(()) + D).sqrt() if holds(math.inf > D) else t
