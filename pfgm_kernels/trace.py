# SPDX-License-Identifier: Apache-2.0
"""The trace of the derivative of the posterior mean x + v by x, which the divergence is made of.

With y_j = x0_j − x, and w and s of `ops`,

    tr = Σ_j w_j (k/s_j) y_j·(y_j − v)                  (D = ∞: Σ_j w_j (1/t²) y_j·(y_j − v))

Backends with a `trace` sum that. Of the others the gradients P of the log mass by x and L' by t
serve, tr = k + t L' − v·P (D = ∞: without k), or the portable sums where k is so large that it
would take their digits.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pfgm_kernels.backends import BACKENDS, eager
from pfgm_kernels.chunks import DIFFERENCES_DIM, Chunks, Inputs
from pfgm_kernels.loops import empty_gradients
from pfgm_kernels.outputs import Output
from pfgm_kernels.rows import Rows, begin

MOST_K = 8
"""Times d, for float32 gradients of the log mass to have digits of what k leaves."""


def field_trace(inputs: Inputs, workspace: int, backend: str) -> Tensor:
    """(B,) float64; 0 at the singular point."""
    module, d = BACKENDS[backend], math.prod(inputs.x.shape[1:])
    if not hasattr(module, "trace") and MOST_K * d < inputs.k < math.inf:
        module, inputs = eager, inputs._replace(operands=[])
    chunks, summed = Chunks(inputs, workspace, module), hasattr(module, "trace")
    if not summed and d <= DIFFERENCES_DIM:
        chunks.dtype = torch.float64
    result = inputs.x.new_empty(len(inputs.x), dtype=torch.float64)
    for queries, seen in chunks.parts:
        rows, v = _rows(chunks, queries, seen)
        if summed:
            trace = _trace(chunks, rows, queries, seen)
        else:
            trace = _trace_by_gradients(chunks, rows, v, queries, seen)
        result[queries] = trace.masked_fill_(rows.singular, 0.0)
    return result


def field_trace_backward(
    inputs: Inputs, g: Tensor, values_grad: bool, workspace: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dt and dvalues for the cotangent g (B,), in float64 by the portable sums.

    Three sweeps over the references: for v; for the trace, P and S = Σ_j w_j k/s_j; and, with
    e_j = y_j·(y_j − v), for

        f_j = (k/s_j) e_j − tr − P·(y_j − v),   C_j = w_j (k/s_j) (f_j/2 + e_j/s_j)
        dx = 2 Σ_j C_j y_j + S v − P,  dt = −2t Σ_j C_j
        dx0_j = −Σ_b (2 C_j y_j − w_j (k/s_j) (2 y_j − v) + w_j P)

    (D = ∞: C_j = w_j f_j/2t², dt = (2/t) (Σ_j C_j ‖y_j‖² − tr).) dx0 is summed in float64.
    """
    # Pairs take more matrices here than in the gradients that eager's chunks are made for.
    chunks = Chunks(inputs._replace(operands=[]), workspace // 2, eager, values_grad)
    chunks.dtype = torch.float64
    dx, dt, dvalues = empty_gradients(inputs, values_grad)
    total = torch.zeros(dvalues.shape, dtype=torch.float64, device=dvalues.device).flatten(1)
    for queries, seen in chunks.parts:
        rows, v = _rows(chunks, queries, seen)
        trace, slope, pull = torch.zeros_like(rows.t), torch.zeros_like(rows.t), torch.zeros_like(v)
        for references in seen:
            values, table, _ = chunks.reference_rows(references)
            sums = eager.trace_sums(rows, values, table)
            trace, slope, pull = trace + sums[0], slope + sums[1], pull + sums[2]
        chunks.total(queries, trace, slope, pull)
        weight = g[queries].masked_fill(rows.singular, 0.0)
        gradient_x, gradient_t = torch.zeros_like(v), torch.zeros_like(rows.t)
        for references in seen:
            values, table, _ = chunks.reference_rows(references)
            part = eager.trace_gradients(rows, values, table, weight, trace, pull, values_grad)
            gradient_x += part[0]
            gradient_t += part[1]
            if part[2] is not None:
                total[references] += part[2]
        chunks.total(queries, gradient_x, gradient_t)
        gradient_x += weight[:, None] * (slope[:, None] * v - pull)
        if math.isinf(chunks.k):
            gradient_t -= 2 / rows.t * weight * trace
        dx[queries] = gradient_x.view(dx[queries].shape).to(dx.dtype)
        dt[queries] = gradient_t.to(dt.dtype)
    return dx, dt, dvalues.copy_(total.view(dvalues.shape))


def _rows(chunks: Chunks, queries: slice, seen: list[slice]) -> tuple[Rows, Tensor]:
    """A chunk of queries as the forward pass leaves it, and v (n, d) float64."""
    x, t = chunks.rows(queries)
    v, _, anchor, log_weight = chunks.forward(x, t, queries, seen)
    stored = chunks.stored(anchor)
    residual = v - stored.decode().sub_(x)
    return Rows(x, t, residual, stored, log_weight, chunks.k, chunks.ranges(queries)), v


def _trace(chunks: Chunks, rows: Rows, queries: slice, seen: list[slice]) -> Tensor:
    trace = torch.zeros_like(rows.t)
    for references in seen:
        trace += chunks.module.trace(rows, *chunks.reference_rows(references))
    chunks.total(queries, trace)
    return trace


def _trace_by_gradients(
    chunks: Chunks, rows: Rows, v: Tensor, queries: slice, seen: list[slice]
) -> Tensor:
    rows = replace(rows, residual=rows.residual.to(rows.x.dtype))
    start = getattr(chunks.module, "begin", begin)
    gradients = start(rows, Output("displacement", 0.0, 1.0), None, torch.ones_like(rows.t))
    for references in seen:
        chunks.module.backward(rows, *chunks.reference_rows(references), gradients, False)
    chunks.total(queries, gradients.dx, gradients.dt)
    k = chunks.k if math.isfinite(chunks.k) else 0.0
    return k + rows.t * gradients.dt - (gradients.dx * v).sum(1)
