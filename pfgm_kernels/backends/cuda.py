# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernels (csrc/cuda): forward and backward, any d, without Triton.

float32 queries take direct differences in float32 where d ≤ 32. Beyond, products of bfloat16 parts
on tensor cores give all distances to a known error; few references of a query are then taken by
direct differences in float64, the others by a second product. float64 input takes direct
differences in float64 throughout. The path of a query is chosen on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pfgm_kernels.backends import _native
from pfgm_kernels.backends._rows import begin_arguments, cotangent_arguments, finish_arguments
from pfgm_kernels.backends._shapes import fit
from pfgm_kernels.outputs import Output
from pfgm_kernels.rows import Cotangents, Rows

MAX_DIRECT_DIM = 32
RANGES = "all"  # of queries that see ranges of the references, a chunk holds all pairs
CROWD_BLOCKS = 8  # parts of the sample in which equal references are counted
DIM_MULTIPLE = 64  # parts are padded to this many columns, with zeros
MAX_THREE_PART_DIM = 128


def unsupported_reason(device: torch.device | None = None) -> str | None:
    if _native.missing_reason is not None:
        return _native.missing_reason
    if _native.build_info["CUDA"] == "none":
        return "the extension was built without CUDA: nvcc was not found, or PFGM_CUDA=0 was set"
    if device is not None and device.type != "cuda":
        return f"it computes on CUDA tensors, got {device}"
    reason = _native.cuda_unavailable()
    if reason is not None:
        return f"no CUDA device can be used here ({reason})"
    if not torch.cuda.is_available():
        return "this torch finds no CUDA device"
    archs = _native.build_info["architectures"].split(";")
    capability = torch.cuda.get_device_capability(device)
    if not runs_on(capability, archs):
        major, minor = capability
        return f"the extension was built for {', '.join(archs)}, the GPU is {major}{minor}"
    return None


def runs_on(capability: tuple[int, int], archs: list[str]) -> bool:
    """Whether a GPU runs code built for `archs` ("80", "100") and the PTX of the last of them.

    Machine code runs on later GPUs of its major version, PTX on every later GPU.
    """
    number = 10 * capability[0] + capability[1]
    return number >= int(archs[-1]) or any(
        int(arch) // 10 == capability[0] and int(arch) <= number for arch in archs
    )


def chunk_shape(
    batch: int, count: int, d: int, workspace: int, prepared: bool, values_grad: bool
) -> tuple[int, int]:
    """Direct differences keep a row of each query and next to nothing of a pair, unless references
    get gradients; products up to 16 bytes of a column and 24 of a pair.
    """
    if d <= MAX_DIRECT_DIM:
        pairs = workspace // 64 if values_grad else batch * count
        return fit(batch, count, workspace // 2 // (8 * (d + 9)), pairs)
    references = None
    if not prepared:
        references = workspace * 5 // 8 // _bytes_per_reference(d)
        workspace = workspace * 3 // 8
    return fit(batch, count, workspace // 4 // (16 * d), workspace // 32, references)


def prepare(values: Tensor, table: Tensor, workspace: int) -> list[Tensor]:
    """header, origin, mean, squares and parts as poisson_field.h has them; in few dimensions crowd
    alone.
    """
    if values.dtype == torch.float64:
        return []
    count, d = values.shape
    device = values.device
    if d <= MAX_DIRECT_DIM:
        operands = [torch.empty(CROWD_BLOCKS, dtype=torch.int32, device=device)]
        _launch("prepare_references_cuda", **_references(values, table, operands))
        return operands
    header, origin, mean = (torch.empty(n, dtype=torch.float64, device=device) for n in (5, d, d))
    squares = torch.empty(count, dtype=torch.float32, device=device)
    shape = _num_parts(values.dtype, d), count, _width(d)
    parts = torch.empty(shape, dtype=torch.bfloat16, device=device)
    operands = [header, origin, mean, squares, parts]
    _launch("prepare_references_cuda", **_references(values, table, operands))
    return operands


def operands_of(operands: list[Tensor], references: slice) -> list[Tensor]:
    if len(operands) == 1:
        return operands
    header, origin, mean, squares, parts = operands
    return [header, origin, mean, squares[references], parts[:, references]]


def forward(
    x: Tensor,
    t: Tensor,
    values: Tensor,
    table: Tensor,
    operands: list[Tensor],
    k: float,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = _common(x, t, values, table, operands, k) | _within(ranges)
    displacement = torch.empty_like(x, dtype=torch.float64)
    log_mass, anchor_log_weight = torch.empty_like(t), torch.empty_like(t)
    anchor = torch.empty_like(t, dtype=torch.int64)
    _launch(
        "field_forward_cuda",
        **arguments,
        displacement=displacement,
        anchor=anchor,
        log_mass=log_mass,
        anchor_log_weight=anchor_log_weight,
    )
    return displacement, log_mass, anchor, anchor_log_weight


def finish(rows: Rows, output: Output, v: Tensor, result: Tensor) -> None:
    """As rows.finish."""
    _launch("field_finish_cuda", **finish_arguments(rows, output, v, result))


def begin(rows: Rows, output: Output, g: Tensor | None, g_m: Tensor | None) -> Cotangents:
    """As rows.begin."""
    found = Cotangents.empty(rows)
    _launch("field_begin_cuda", **begin_arguments(rows, output, g, g_m, found))
    return found


def backward(
    rows: Rows,
    values: Tensor,
    table: Tensor,
    operands: list[Tensor],
    cotangents: Cotangents,
    values_grad: bool,
) -> Tensor | None:
    dvalues = torch.empty_like(values) if values_grad else None
    if dvalues is not None and len(rows.x) == 0:
        dvalues.zero_()
    _launch(
        "field_backward_cuda",
        **_common(rows.x, rows.t, values, table, operands, rows.k),
        **cotangent_arguments(cotangents),
        **_within(rows.ranges),
        anchor_log_weight=rows.anchor_log_weight,
        **({} if dvalues is None else {"dvalues": dvalues}),
    )
    return dvalues


def _within(ranges: Tensor | None) -> dict[str, Any]:
    return {} if ranges is None else {"ranges": ranges}


def _common(
    x: Tensor, t: Tensor, values: Tensor, table: Tensor, operands: list[Tensor], k: float
) -> dict[str, Any]:
    return _references(values, table, operands) | {
        "batch": x.shape[0],
        "half_k": k / 2,
        "x_single" if x.dtype == torch.float32 else "x": x.contiguous(),
        "t": t.contiguous(),
        "single": x.dtype == torch.float32,
    }


def _references(values: Tensor, table: Tensor, operands: list[Tensor]) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "count": values.shape[0],
        "dim": values.shape[1],
        "half_k": 1.0,
        "values": values.contiguous(),
        "table": table.contiguous(),
        "value_type": str(values.dtype).removeprefix("torch."),
    }
    if len(operands) == 1:
        arguments["crowd"] = operands[0]
    elif operands:
        arguments |= dict(
            zip(("header", "origin", "mean", "squares", "parts"), operands, strict=True)
        )
        arguments |= {"plane": operands[4].stride(0), "num_parts": len(operands[4])}
    return arguments


def _launch(entry: str, **arguments: Any) -> None:
    """Asks the entry point how large a workspace it needs, and calls it with one."""
    size = _native.launch(entry, **arguments)
    workspace = torch.empty(size, dtype=torch.uint8, device=arguments["values"].device)
    _native.launch(entry, **arguments, workspace=workspace)


def _num_parts(dtype: torch.dtype, d: int) -> int:
    """8-bit codes are exact in one bfloat16; in few dimensions two of a float would not do."""
    return 1 if dtype == torch.uint8 else 3 if d <= MAX_THREE_PART_DIM else 2


def _width(d: int) -> int:
    return -(-d // DIM_MULTIPLE) * DIM_MULTIPLE


def _bytes_per_reference(d: int) -> int:
    """Of the operands of a float32 reference, and of what making them takes."""
    return 2 * _num_parts(torch.float32, d) * _width(d) + 56
