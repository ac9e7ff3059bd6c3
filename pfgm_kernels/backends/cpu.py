# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels for CPUs: direct differences in float64, SIMD and OpenMP, no (B, N) matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pfgm_kernels.backends import _native

PAD = 8  # the kernels read rows padded to a multiple of this


def unsupported_reason(
    device: torch.device | None = None, d: int | None = None, requires_grad: bool = False
) -> str | None:
    if _native.missing_reason is not None:
        return _native.missing_reason
    if device is not None and device.type != "cpu":
        return f"it computes on CPU tensors, got {device}"
    return None


def chunk_shape(batch: int, count: int, d: int, workspace: int) -> tuple[int, int]:
    """Everything at once: the kernels bound their own memory."""
    return batch, count


def forward(
    x: Tensor, t: Tensor, values: Tensor, table: Tensor, k: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, d = x.shape
    arguments = _common(x, t, values, table, k)
    displacement = torch.empty_like(arguments["x"])
    log_mass, anchor_log_weight = displacement.new_empty(batch), displacement.new_empty(batch)
    anchor = torch.empty(batch, dtype=torch.int64)
    _native.launch(
        "field_forward_cpu",
        **arguments,
        displacement=displacement,
        anchor=anchor,
        log_mass=log_mass,
        anchor_log_weight=anchor_log_weight,
    )
    return displacement[:, :d].contiguous(), log_mass, anchor, anchor_log_weight


def backward(
    x: Tensor,
    t: Tensor,
    values: Tensor,
    table: Tensor,
    k: float,
    displacement: Tensor,
    anchor_x0: Tensor,
    anchor_log_weight: Tensor,
    grad_displacement: Tensor,
    grad_log_mass: Tensor,
    values_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    d = x.shape[1]
    anchor_s = (anchor_x0 - x).square().sum(1)
    if k != torch.inf:
        anchor_s += t * t
    arguments = _common(x, t, values, table, k) | {
        "anchor_s": anchor_s,
        "anchor_log_weight": anchor_log_weight,
        "grad_displacement": _padded(grad_displacement),
        "projection": (grad_displacement * displacement).sum(1),
        "grad_log_mass": grad_log_mass,
    }
    dx, dt = torch.empty_like(arguments["x"]), torch.empty_like(t)
    _native.launch("field_backward_queries_cpu", **arguments, dx=dx, dt=dt)
    dvalues = None
    if values_grad:
        dvalues = torch.empty_like(values)
        _native.launch("field_backward_references_cpu", **arguments, dvalues=dvalues)
    return dx[:, :d], dt, dvalues


def _common(x: Tensor, t: Tensor, values: Tensor, table: Tensor, k: float) -> dict[str, Any]:
    return {
        "batch": x.shape[0],
        "count": values.shape[0],
        "dim": x.shape[1],
        "half_k": k / 2,
        "x": _padded(x),
        "t": t.contiguous(),
        "values": values.contiguous(),
        "table": table.contiguous(),
        "value_type": str(values.dtype).removeprefix("torch."),
        "single": x.dtype == torch.float32,
        "workspace": 256 << 20,
    }


def _padded(rows: Tensor) -> Tensor:
    """Rows (B, d) as contiguous float64 (B, ld), with zeros in the columns beyond d."""
    padding = -rows.shape[1] % PAD
    return torch.nn.functional.pad(rows.double(), (0, padding)).contiguous()
