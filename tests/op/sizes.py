# SPDX-License-Identifier: Apache-2.0
"""Calls of any size, of which nothing is computed: what would they launch?"""

from __future__ import annotations

from functools import partial
from itertools import product
from types import ModuleType

import torch

from pfgm_kernels.outputs import Output
from pfgm_kernels.rows import Rows, Stored

BATCHES, COUNTS = (1, 1000, 10**8), (1, 1000, 10**8, 2**33)
WORKSPACES = 1 << 20, 1 << 30, 1 << 36
DIMENSIONS = 1, 32, 64, 128, 3072, 200_000


def call_all(backend: ModuleType, d: int) -> None:
    """Forward and backward passes of a GPU's backend, of the dtypes, with references prepared and
    not, over the largest chunk of each call: on tensors that hold nothing.
    """
    for B, N, workspace in product(BATCHES, COUNTS, WORKSPACES):
        for prepared, dtype in ((True, torch.float32), (False, torch.float32), (True, torch.uint8)):
            _call_chunk(backend, B, N, d, dtype, workspace, prepared, False)
        _call_chunk(backend, B, N, d, torch.float64, workspace, False, True)


def _call_chunk(
    backend: ModuleType,
    B: int,
    N: int,
    d: int,
    dtype: torch.dtype,
    workspace: int,
    prepared: bool,
    values_grad: bool,
) -> None:
    queries, references = backend.chunk_shape(B, N, d, workspace, prepared, values_grad)
    assert references <= 2**30
    kept = N if prepared else references
    call(backend, queries, references, d, dtype, kept, values_grad)


def call(
    backend: ModuleType,
    B: int,
    N: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    kept: int | None = None,
    values_grad: bool = False,
) -> None:
    """The passes over B queries and N references, out of more where so many are kept."""
    meta = partial(torch.empty, device="meta")
    table = meta(256 if dtype == torch.uint8 else 0)
    values = meta(kept or N, d, dtype=dtype)
    operands = backend.prepare(values, table, values.nbytes)
    if len(operands) > 1:
        operands = backend.operands_of(operands, slice(len(values) - N, len(values)))
    values = values[:N]
    x = meta(B, d, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    t, output, k = meta(B, dtype=torch.float64), Output("field", 5.0, 1.0), d + 1.0
    v, log_mass, anchor, log_weight = backend.forward(x, t, values, table, operands, k)
    result, residual, stored = meta(B, d + 1), meta(B, d), Stored(values, table, anchor)
    rows = Rows(x, t, residual, stored, log_weight, k)
    backend.finish(rows, output, v, result)
    cotangents = backend.begin(rows, output, result, log_mass)
    backend.backward(rows, values, table, operands, cotangents, values_grad)
