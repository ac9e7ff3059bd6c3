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
    meta = partial(torch.empty, device="meta")
    table = meta(256 if dtype == torch.uint8 else 0)
    queries, references = backend.chunk_shape(B, N, d, workspace, prepared, values_grad)
    assert references <= 2**30
    values = meta(N if prepared else references, d, dtype=dtype)
    operands = backend.prepare(values, table, workspace)
    if prepared and len(operands) > 1:
        operands = backend.operands_of(operands, slice(N - references, N))
    values = values[:references]
    x = meta(queries, d, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    t, output, k = meta(queries, dtype=torch.float64), Output("field", 5.0, 1.0), d + 1.0
    v, log_mass, anchor, log_weight = backend.forward(x, t, values, table, operands, k)
    result, residual, stored = meta(queries, d + 1), meta(queries, d), Stored(values, table, anchor)
    backend.finish(output, v, x, t, result, residual, stored)
    rows = Rows(x, t, residual, stored, log_weight, k)
    cotangents = backend.begin(rows, output, result, log_mass)
    backend.backward(rows, values, table, operands, cotangents, values_grad)
