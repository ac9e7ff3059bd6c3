# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for NVIDIA GPUs: tensor cores at full precision, and TRITON_INTERPRET=1 on a CPU.

float32 queries take direct differences in float32 where d ≤ 32 (direct.py), and where d ≤ 128 one
pass of products of bfloat16 parts (fused.py). Beyond, and where one pass is not certain to do, they
take two: products give all distances to a known error; few references of a query are then taken by
direct differences, the others by a second product (route.py). float64 input takes direct
differences in float64 throughout (exact.py). The path of a query is chosen on the device.
"""

from __future__ import annotations

import importlib.util
import math
import os
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

import torch
from torch import Tensor

from pfgm_kernels.backends._shapes import fit
from pfgm_kernels.outputs import Output
from pfgm_kernels.rows import Cotangents, Rows

OLDEST = (3, 6)
RANGES = "all"  # of queries that see ranges of the references, a chunk holds all pairs


def unsupported_reason(device: torch.device | None = None) -> str | None:
    found = version()
    if found is None:
        return "triton is not installed (pip install -e '.[triton]')"
    if numbers(found) < OLDEST:
        return f"triton {found} is too old: it needs {'.'.join(map(str, OLDEST))} or later"
    if _interpreted():
        if device is not None and device.type != "cpu":
            return f"TRITON_INTERPRET=1 computes on CPU tensors, got {device}"
        return None
    if not torch.cuda.is_available():
        return "no NVIDIA GPU was found (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    if device is not None:
        if device.type != "cuda":
            return f"it computes on CUDA tensors, got {device}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs a GPU of compute capability 8.0 or later"
    return None


def version() -> str | None:
    """Of Triton, None where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return version_of("triton")
    except PackageNotFoundError:  # what comes with a nightly torch goes by another name
        import triton

        return triton.__version__


def numbers(version: str) -> tuple[int, ...]:
    """The first two, which compare as versions do."""
    return tuple(int(part) for part in version.split(".")[:2])


def _interpreted() -> bool:
    return (os.environ.get("TRITON_INTERPRET") or "0").lower() in ("1", "true", "on", "yes")


def chunk_shape(
    batch: int, count: int, d: int, workspace: int, prepared: bool, values_grad: bool
) -> tuple[int, int]:
    """A pair takes a float64 s and, for the gradients, a projection; beyond direct differences also
    a float32 r, a weight in two parts and another projection, and a tile a few bytes: 29 in all.
    Queries as digits, and sums of references, take up to 40 bytes of a column.
    """
    from pfgm_kernels.backends.triton import direct, operands

    if d <= direct.MAX_DIM:
        return fit(batch, count, workspace // 4 // (40 * d), workspace // 16)
    references = None
    if not prepared:
        references = workspace * 5 // 8 // operands.bytes_per_reference(d)
        workspace = workspace * 3 // 8
    return fit(batch, count, workspace // 4 // (40 * d), workspace // 29, references)


def prepare(values: Tensor, table: Tensor, workspace: int) -> list[Tensor]:
    """What triton.operands.Operands holds of float32 values or 8-bit codes."""
    from pfgm_kernels.backends.triton import direct, operands

    if values.dtype == torch.float64 or values.shape[1] <= direct.MAX_DIM:
        return []
    return operands.prepare(values, table).tensors()


def operands_of(operands: list[Tensor], references: slice) -> list[Tensor]:
    from pfgm_kernels.backends.triton.operands import Operands

    return Operands(*operands).of(references).tensors()


def forward(
    x: Tensor,
    t: Tensor,
    values: Tensor,
    table: Tensor,
    operands: list[Tensor],
    k: float,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from pfgm_kernels.backends.triton import direct, fused
    from pfgm_kernels.backends.triton.call import Call
    from pfgm_kernels.backends.triton.forward_pass import (
        empty_outputs,
        exact_forward,
        two_pass_forward,
    )
    from pfgm_kernels.backends.triton.operands import FUSED_MAX_DIM, Operands

    call = Call(x.contiguous(), t.contiguous(), values.contiguous(), table, k, ranges)
    out = empty_outputs(call)
    if call.B == 0:
        return out
    if x.dtype == torch.float64 or ranges is not None:
        exact_forward(call, call.rows(math.nan, torch.float32), out)
    elif call.d <= direct.MAX_DIM:
        direct.direct_forward(call, out)
    else:
        prepared, queries, wanted = Operands(*operands), None, None
        if call.d <= FUSED_MAX_DIM:
            queries, wanted = fused.fused_forward(call, prepared, out)
        two_pass_forward(call, prepared, out, queries, wanted)
    return out


def finish(queries: Rows, output: Output, v: Tensor, result: Tensor) -> None:
    """As rows.finish."""
    from pfgm_kernels.backends.triton import rows

    rows.finish(queries, output, v, result)


def begin(queries: Rows, output: Output, g: Tensor | None, g_m: Tensor | None) -> Cotangents:
    """As rows.begin."""
    from pfgm_kernels.backends.triton import rows

    return rows.begin(queries, output, g, g_m)


def backward(
    queries: Rows,
    values: Tensor,
    table: Tensor,
    operands: list[Tensor],
    cotangents: Cotangents,
    values_grad: bool,
) -> Tensor | None:
    from pfgm_kernels.backends.triton import backward_pass as passes
    from pfgm_kernels.backends.triton import direct
    from pfgm_kernels.backends.triton.call import Call
    from pfgm_kernels.backends.triton.operands import Operands

    x, values, ranges = queries.x.contiguous(), values.contiguous(), queries.ranges
    call = Call(x, queries.t, values, table, queries.k, ranges)
    if call.B == 0:
        return torch.zeros_like(values) if values_grad else None
    log_weight = queries.anchor_log_weight
    if values_grad:
        return passes.references_backward(call, cotangents, log_weight)
    if x.dtype == torch.float64 or ranges is not None:
        limit = call.rows(math.nan, torch.float32)
        passes.exact_backward(call, limit, cotangents, log_weight)
    elif call.d <= direct.MAX_DIM:
        direct.direct_backward(call, cotangents, log_weight)
    else:
        passes.two_pass_backward(call, Operands(*operands), cotangents, log_weight)
    return None
