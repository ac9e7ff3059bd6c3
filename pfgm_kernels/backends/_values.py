# SPDX-License-Identifier: Apache-2.0
"""How stored reference values are read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pfgm_kernels._checks import number


def decode(values: Tensor, table: Tensor) -> Tensor:
    """Stored values (M, d), uint8 codes into `table` or floats, as a float64 tensor (M, d)."""
    if table.numel() == 0:
        return values.double()
    return torch.index_select(table.double(), 0, values.reshape(-1).int()).view(values.shape)


def table_of(low: float, high: float, device: torch.device) -> Tensor:
    """(256,) float32, what 8-bit codes stand for."""
    low, high = number("low", low), number("high", high)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"8-bit images expect finite low < high, got {low} and {high}")
    codes = torch.arange(256, dtype=torch.float64, device=device)
    return (low + (high - low) * codes / 255).float()
