# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels for CPUs (csrc/cpu): SIMD, threads, float32 wherever it is certain to do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pfgm_kernels.backends import _native
from pfgm_kernels.backends._rows import begin_arguments, finish_arguments
from pfgm_kernels.backends._sketch import Sketch, columns_of, sketches
from pfgm_kernels.outputs import Output
from pfgm_kernels.rows import Cotangents, Rows

PAD = 8  # the kernels read rows padded to a multiple of this
TILE = 64  # queries that they take at a time
WORK_PER_THREAD = 1 << 20  # columns of pairs that take longer than a thread takes to wake up
COLUMN_OF_QUERY = 8  # columns of pairs that take as long as one of a query in `finish` or `begin`
WORK = 1 << 35  # columns of pairs in a chunk, so that an interrupt is noticed within a second or so
MAX_DIRECT_DIM = 24  # up to here they need nothing prepared
RANGES = "seen"  # of queries that see ranges of the references, a chunk holds these pairs


def unsupported_reason(device: torch.device | None = None) -> str | None:
    if _native.missing_reason is not None:
        return _native.missing_reason
    if device is not None and device.type != "cpu":
        return f"it computes on CPU tensors, got {device}"
    return None


def chunk_shape(
    batch: int, count: int, d: int, workspace: int, prepared: bool, values_grad: bool
) -> tuple[int, int]:
    """The kernels for larger d keep a float for each query and reference, at times two, in what
    operands that are yet to be prepared leave of the workspace.
    """
    if d <= MAX_DIRECT_DIM:
        return batch, max(1, min(count, WORK // (batch * (d + 8))))
    if not prepared:
        count = max(1, min(count, workspace * 5 // 8 // (d + 40)))  # codes, and what finds copies
    pairs = (workspace if prepared else workspace * 3 // 8) // (2 * 4)
    count = max(1, min(count, pairs // TILE, WORK // (min(batch, 2 * TILE) * d)))
    return max(TILE, pairs // count), count


def prepare(values: Tensor, table: Tensor, workspace: int) -> list[Tensor]:
    """Norms (N,) and the grid (4 + d,) of the values for the kernels for larger d, and codes (N, d)
    uint8 where float32 values turn out to lie on a grid of 256 steps (csrc/cpu/common/operands.h).
    """
    count, d = values.shape
    if values.dtype == torch.float64 or d <= MAX_DIRECT_DIM:
        return []
    norms = torch.empty(count, dtype=torch.float64, device=values.device)
    grid = torch.empty(4 + d, dtype=torch.float64, device=values.device)
    encode = values.dtype == torch.float32 and values.numel() <= workspace
    codes = [torch.empty_like(values, dtype=torch.uint8)] if encode else []
    _native.launch("prepare_references_cpu", **_references(values, table, [norms, grid, *codes]))
    return [norms, grid, *(codes if grid[1] >= 0 else [])]


def sketch(values: Tensor, table: Tensor, operands: list[Tensor]) -> list[Tensor]:
    """The operands that `prepare` made, and sketches of the references where these may pay."""
    if not operands:
        return []
    norms, grid = operands[:2]
    columns = columns_of(values.shape[1] * (1 if grid[1] >= 0 else 4))
    found = sketches(values, table, norms, grid, columns)
    return [*_prepared(operands), *(each for one in found for each in one)]


def operands_of(operands: list[Tensor], references: slice) -> list[Tensor]:
    norms, grid, *codes = _prepared(operands)
    cut = [norms[references], grid, *(rows[references] for rows in codes)]
    for points, rest, *basis in _sketches(operands):
        cut += [points[references], rest[references], *basis]
    return cut


def _prepared(operands: list[Tensor]) -> list[Tensor]:
    """Norms, grid and, where they were made, codes."""
    return operands[: 3 if operands[2:] and operands[2].dtype == torch.uint8 else 2]


def _sketches(operands: list[Tensor]) -> list[Sketch]:
    more = operands[len(_prepared(operands)) :]
    return [Sketch(*more[i : i + 4]) for i in range(0, len(more), 4)]


def forward(
    x: Tensor,
    t: Tensor,
    values: Tensor,
    table: Tensor,
    operands: list[Tensor],
    k: float,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, d = x.shape
    arguments = _common(x, t, values, table, operands, k, ranges)
    displacement = torch.empty_like(arguments["x"])
    log_mass, anchor_log_weight = displacement.new_empty(batch), displacement.new_empty(batch)
    anchor = torch.empty(batch, dtype=torch.int64, device=x.device)
    _native.launch(
        "field_forward_cpu",
        **arguments,
        displacement=displacement,
        anchor=anchor,
        log_mass=log_mass,
        anchor_log_weight=anchor_log_weight,
    )
    if ranges is not None:
        anchor += ranges[:, 0]
    return displacement[:, :d], log_mass, anchor, anchor_log_weight


def finish(rows: Rows, output: Output, v: Tensor, result: Tensor) -> None:
    """As rows.finish."""
    arguments = finish_arguments(rows, output, _padded(v), result)
    _native.launch("field_finish_cpu", **arguments, num_threads=_num_threads_of(rows))


def begin(rows: Rows, output: Output, g: Tensor | None, g_m: Tensor | None) -> Cotangents:
    """As rows.begin."""
    found = Cotangents.empty(rows, columns=rows.x.shape[1] + -rows.x.shape[1] % PAD)
    arguments = begin_arguments(rows, output, g, g_m, found)
    _native.launch("field_begin_cpu", **arguments, num_threads=_num_threads_of(rows))
    return found


def backward(
    rows: Rows,
    values: Tensor,
    table: Tensor,
    operands: list[Tensor],
    cotangents: Cotangents,
    values_grad: bool,
) -> Tensor | None:
    dx, dt = cotangents.dx, cotangents.dt
    arguments = _common(rows.x, rows.t, values, table, operands, rows.k, rows.ranges) | {
        "anchor_square": cotangents.anchor_square,
        "anchor_log_weight": rows.anchor_log_weight,
        "grad_displacement": _padded(cotangents.g),
        "projection": cotangents.projection,
        "grad_log_mass": cotangents.g_m,
    }
    more, more_t = torch.empty_like(arguments["x"]), torch.empty_like(rows.t)
    _native.launch("field_backward_queries_cpu", **arguments, dx=more, dt=more_t)
    dx += more[:, : dx.shape[1]]
    dt += more_t
    if not values_grad:
        return None
    dvalues = torch.empty_like(values)
    _native.launch("field_backward_references_cpu", **arguments, dvalues=dvalues)
    return dvalues


def jvp(
    rows: Rows,
    values: Tensor,
    table: Tensor,
    operands: list[Tensor],
    x_tangent: Tensor,
    t_tangent: Tensor,
    centre: Tensor,
) -> tuple[Tensor, Tensor]:
    """This chunk's share of Σ_j w_j (l̇_j − l̇)(x0_j − x) and of Σ_j w_j (l̇_j − l̇), l̇ the centre:
    2 Σ_j c_j (x0_j − x) and 2 Σ_j c_j with tilted coefficients (csrc/cpu/common/pull.h).
    """
    x, t, k = rows.x, rows.t, rows.k
    square, stretch = (rows.anchor_x0 - x).square().sum(1), t * t_tangent
    if math.isfinite(k):
        tilt = centre * (square + t * t) / k
        shift = stretch + tilt
    else:
        tilt, shift = -2 * stretch, centre * t * t - square * t_tangent / t
    arguments = _common(x, t, values, table, operands, k, rows.ranges) | {
        "anchor_square": square,
        "anchor_log_weight": rows.anchor_log_weight,
        "grad_displacement": _padded(x_tangent),
        "projection": shift,
        "grad_log_mass": torch.zeros_like(t),
        "tilt": tilt,
    }
    pull, slope = torch.empty_like(arguments["x"]), torch.empty_like(t)
    _native.launch("field_backward_queries_cpu", **arguments, dx=pull, dt=slope)
    return pull[:, : x.shape[1]], slope


def trace(rows: Rows, values: Tensor, table: Tensor, operands: list[Tensor]) -> Tensor:
    """This chunk's share of Σ_j w_j (k/s_j) y_j·(y_j − v), y_j = x0_j − x: 2 Σ_j c_j with tilted
    coefficients (csrc/cpu/common/pull.h).
    """
    x, t, k = rows.x, rows.t, rows.k
    square = (rows.anchor_x0 - x).square().sum(1)
    arguments = _common(x, t, values, table, operands, k, rows.ranges) | {
        "anchor_square": square,
        "anchor_log_weight": rows.anchor_log_weight,
        "grad_displacement": _padded(-rows.v),
        "projection": -square,
        "grad_log_mass": torch.zeros_like(t),
        "tilt": -square - t * t if math.isfinite(k) else -2 * t * t,
    }
    total = torch.empty_like(t)
    _native.launch("field_backward_queries_cpu", **arguments, dt=total)
    return total


def _common(
    x: Tensor,
    t: Tensor,
    values: Tensor,
    table: Tensor,
    operands: list[Tensor],
    k: float,
    ranges: Tensor | None,
) -> dict[str, Any]:
    pairs = x.shape[0] * values.shape[0]
    if ranges is not None:
        pairs = int(ranges.diff().sum())
    within = {} if ranges is None else {"ranges": ranges}
    return (
        _references(values, table, operands)
        | within
        | {
            "num_threads": _num_threads(pairs * (8 + x.shape[1])),  # a weight costs some columns
            "batch": x.shape[0],
            "half_k": k / 2,
            "x": _padded(x),
            "t": t.contiguous(),
            "single": x.dtype == torch.float32,
        }
    )


def _references(values: Tensor, table: Tensor, operands: list[Tensor]) -> dict[str, Any]:
    return {
        "num_threads": _num_threads(values.numel()),
        "count": values.shape[0],
        "dim": values.shape[1],
        "half_k": 1.0,
        "values": values.contiguous(),
        "table": table.contiguous(),
        "value_type": str(values.dtype).removeprefix("torch."),
        **dict(zip(("norms", "grid", "codes"), _prepared(operands), strict=False)),
        **_sketch_arguments(operands),
    }


def _sketch_arguments(operands: list[Tensor]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for i, sketch in enumerate(_sketches(operands)):
        each = sketch._asdict() | {"dim": len(sketch.basis)}
        each |= zip(("unit", "residual", "reach"), each.pop("scale").tolist(), strict=True)
        arguments |= {f"sketches[{i}].{name}": value for name, value in each.items()}
    return arguments


def _num_threads(work: int) -> int:
    return max(1, min(torch.get_num_threads(), work // WORK_PER_THREAD))


def _num_threads_of(rows: Rows) -> int:
    return _num_threads(rows.x.numel() * COLUMN_OF_QUERY)


def _padded(rows: Tensor) -> Tensor:
    """Rows (B, d) as float64 (B, ld), with zeros in the columns beyond d; those of `forward` and
    `begin` as they are.
    """
    padding = -rows.shape[1] % PAD
    if rows.dtype == torch.float64 and rows.stride() == (rows.shape[1] + padding, 1):
        return rows
    return torch.nn.functional.pad(rows.double(), (0, padding)).contiguous()
