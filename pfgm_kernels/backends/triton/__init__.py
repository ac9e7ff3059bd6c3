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

OLDEST = (3, 6)


def unsupported_reason(
    device: torch.device | None = None, d: int | None = None, requires_grad: bool = False
) -> str | None:
    found = version()
    if found is None:
        return "triton is not installed (pip install -e '.[triton]')"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
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


def _interpreted() -> bool:
    return (os.environ.get("TRITON_INTERPRET") or "0").lower() in ("1", "true", "on", "yes")


def chunk_shape(
    batch: int, count: int, d: int, workspace: int, prepared: bool, values_grad: bool
) -> tuple[int, int]:
    """A pair takes a float64 s and, for the gradients, a projection; beyond direct differences also
    a float32 r, a weight in two parts and another projection: 32 bytes in all. Queries as parts,
    and sums of references, take up to 40 bytes of a column.
    """
    from pfgm_kernels.backends.triton import direct, operands

    if d <= direct.MAX_DIM:
        pairs = workspace // 16
    elif prepared:
        pairs = workspace // 32
    else:
        pairs = workspace * 3 // 8 // 32
        count = min(count, workspace * 5 // 8 // operands.bytes_per_reference(d))
    batch = max(1, min(batch, 1024, pairs // 128, workspace // 4 // (40 * d)))
    return batch, max(1, min(count, pairs // batch))


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
    x: Tensor, t: Tensor, values: Tensor, table: Tensor, operands: list[Tensor], k: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from pfgm_kernels.backends.triton import direct, fused
    from pfgm_kernels.backends.triton.call import Call
    from pfgm_kernels.backends.triton.forward_pass import (
        empty_outputs,
        exact_forward,
        two_pass_forward,
    )
    from pfgm_kernels.backends.triton.operands import FUSED_MAX_DIM, Operands

    call = Call(x.contiguous(), t.contiguous(), values.contiguous(), table, k)
    out = empty_outputs(call)
    if call.B == 0:
        return out
    if x.dtype == torch.float64:
        exact_forward(call, call.rows(math.nan, torch.float32), out)
    elif call.d <= direct.MAX_DIM:
        direct.direct_forward(call, out)
    else:
        prepared, wanted = Operands(*operands), call.rows(1, torch.int8)
        if call.d <= FUSED_MAX_DIM:
            wanted = fused.fused_forward(call, prepared, out)
        two_pass_forward(call, prepared, wanted, out)
    return out


def backward(
    x: Tensor,
    t: Tensor,
    values: Tensor,
    table: Tensor,
    operands: list[Tensor],
    k: float,
    displacement: Tensor,
    anchor_x0: Tensor,
    anchor_log_weight: Tensor,
    grad_displacement: Tensor,
    grad_log_mass: Tensor,
    values_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    from pfgm_kernels.backends.triton import backward_pass as passes
    from pfgm_kernels.backends.triton import direct
    from pfgm_kernels.backends.triton.call import Call
    from pfgm_kernels.backends.triton.operands import Operands

    call = Call(x.contiguous(), t.contiguous(), values.contiguous(), table, k)
    base = (anchor_x0 - x).square().sum(1)
    constant = grad_log_mass - (grad_displacement * displacement).sum(1)
    g = grad_displacement.contiguous()
    cotangents = passes.Cotangents(g, constant, base, anchor_log_weight.contiguous())
    dx, dt = torch.empty_like(g), torch.empty_like(call.t)
    if call.B == 0:
        return dx, dt, torch.zeros_like(values) if values_grad else None
    if values_grad:
        return dx, dt, passes.references_backward(call, cotangents, dx, dt)
    if x.dtype == torch.float64:
        limit = call.rows(math.nan, torch.float32)
        passes.exact_backward(call, limit, cotangents, dx, dt, None)
    elif call.d <= direct.MAX_DIM:
        direct.direct_backward(call, cotangents, dx, dt)
    else:
        wanted = call.rows(1, torch.int8)
        passes.two_pass_backward(call, Operands(*operands), wanted, cotangents, dx, dt)
    return dx, dt, None
