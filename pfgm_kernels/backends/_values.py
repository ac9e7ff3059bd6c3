# SPDX-License-Identifier: Apache-2.0
"""How stored reference values are read."""

from __future__ import annotations

import torch
from torch import Tensor


def decode(values: Tensor, table: Tensor) -> Tensor:
    """Stored values (M, d), uint8 codes into `table` or floats, as a float64 tensor (M, d)."""
    if table.numel() == 0:
        return values.double()
    return torch.index_select(table.double(), 0, values.reshape(-1).int()).view(values.shape)
