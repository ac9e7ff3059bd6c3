# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernel: forward only, direct differences up to d = 32, no (B, N) matrix.

Everything is computed in float64, which A100, H100, H200 and B200 run at half the rate of float32
and other GPUs at 1/32 to 1/64. There is no `backward` here: `unsupported_reason` refuses inputs
that require grad. So far the kernel has been compiled, and run through a shim on the CPU
(tests/test_field_math.py), but not on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pfgm_kernels.backends import _native

MAX_DIM = 32
BLOCK_QUERIES = 128  # queries that a thread block takes where there are that many
BLOCKS = 2048  # thread blocks that fill a GPU several times over
MIN_SPLIT = 256  # references that are worth a thread block


def unsupported_reason(
    device: torch.device | None = None, d: int | None = None, requires_grad: bool = False
) -> str | None:
    if _native.missing_reason is not None:
        return _native.missing_reason
    if _native.build_info["CUDA"] == "none":
        return "the extension was built without CUDA: nvcc was not found, or PFGM_CUDA=0 was set"
    if device is not None and device.type != "cuda":
        return f"it computes on CUDA tensors, got {device}"
    if d is not None and d > MAX_DIM:
        return f"it takes direct differences, up to d = {MAX_DIM} so far, got d = {d}"
    if requires_grad:
        return "it has no backward pass yet"
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


def chunk_shape(batch: int, count: int, d: int, workspace: int, prepared: bool) -> tuple[int, int]:
    """Every reference, and as many queries as their partial sums leave room for."""
    rows = batch
    # A query in float64, and per split its displacement, nearest s, sum and anchor.
    while rows > 1 and 8 * rows * (d + _num_splits(rows, count) * (d + 3)) > workspace:
        rows = -(-rows // 2)
    return rows, count


def prepare(values: Tensor, table: Tensor, workspace: int) -> list[Tensor]:
    return []


def operands_of(operands: list[Tensor], references: slice) -> list[Tensor]:
    return []


def forward(
    x: Tensor, t: Tensor, values: Tensor, table: Tensor, operands: list[Tensor], k: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, d = x.shape
    splits = _num_splits(batch, values.shape[0])
    queries = x.double().contiguous()
    displacement = queries.new_empty(splits, batch, d)
    nearest = queries.new_empty(splits, batch)
    anchor = torch.empty_like(nearest, dtype=torch.int64)
    log_mass, anchor_log_weight = queries.new_empty(batch), queries.new_empty(batch)
    _native.launch(
        "field_forward_cuda",
        batch=batch,
        count=values.shape[0],
        dim=d,
        half_k=k / 2,
        x=queries,
        t=t.contiguous(),
        values=values.contiguous(),
        table=table.contiguous(),
        value_type=str(values.dtype).removeprefix("torch."),
        num_splits=splits,
        displacement=displacement,
        nearest=nearest,
        sum=torch.empty_like(nearest),
        anchor=anchor,
        log_mass=log_mass,
        anchor_log_weight=anchor_log_weight,
    )
    # Copies: a view would keep every split's part alive.
    return displacement[0].clone(), log_mass, anchor[0].clone(), anchor_log_weight


def _num_splits(batch: int, count: int) -> int:
    """Parts that the references are shared out in, so that few queries fill the GPU too."""
    blocks = max(1, -(-batch // BLOCK_QUERIES))
    return max(1, min(-(-BLOCKS // blocks), count // MIN_SPLIT))
