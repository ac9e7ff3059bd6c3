# SPDX-License-Identifier: Apache-2.0
"""`finish` and `begin` (rows.py) as arguments of the extension's entry points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pfgm_kernels.outputs import Output
from pfgm_kernels.rows import Cotangents, Rows


def finish_arguments(rows: Rows, output: Output, v: Tensor, result: Tensor) -> dict[str, Any]:
    kept = {"residual": rows.residual} if len(rows.residual) else {}
    return _rows(rows, output, result) | kept | {"displacement": v, "result": result}


def begin_arguments(
    rows: Rows, output: Output, g: Tensor | None, g_m: Tensor | None, found: Cotangents
) -> dict[str, Any]:
    """found: what is written."""
    given = {"result": None if g is None else g.to(rows.residual.dtype), "log_mass": g_m}
    given |= {"residual": rows.residual}
    return (
        _rows(rows, output, rows.residual)
        | {name: tensor for name, tensor in given.items() if tensor is not None}
        | cotangent_arguments(found)
    )


def cotangent_arguments(cotangents: Cotangents) -> dict[str, Any]:
    return {
        "grad_displacement": cotangents.g,
        "grad_log_mass": cotangents.g_m,
        "projection": cotangents.projection,
        "anchor_square": cotangents.anchor_square,
        "dx": cotangents.dx,
        "dt": cotangents.dt,
    }


def _rows(rows: Rows, output: Output, result: Tensor) -> dict[str, Any]:
    x, single, anchor = rows.x, rows.x.dtype == torch.float32, rows.anchor
    return {
        "batch": x.shape[0],
        "count": anchor.values.shape[0],
        "dim": x.shape[1],
        "half_k": rows.k / 2,
        "x_single" if single else "x": x.contiguous(),
        "t": rows.t.contiguous(),
        "single": single,
        "values": anchor.values.contiguous(),
        "table": anchor.table.contiguous(),
        "value_type": str(anchor.values.dtype).removeprefix("torch."),
        "anchor": anchor.index,
        "output": output.name,
        "gamma": output.gamma,
        "scale": output.scale,
        "result_single": result.dtype == torch.float32,
    }
