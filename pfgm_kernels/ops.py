# SPDX-License-Identifier: Apache-2.0
"""torch.library contracts of the op; `loops` computes them.

    pfgm::field_forward   x, t, values, table, operands, k, ranges, …
                          → result, log_mass, and what the other two need:
                            residual, anchor, anchor_log_weight
    pfgm::field_backward  … and the cotangents of result and log_mass   → dx, dt, dvalues
    pfgm::field_jvp       … and the tangents of x, t and values   → those of result and log_mass
    pfgm::field_trace     the same inputs → the trace (B,) of the mean's derivative by x (`trace`)
    pfgm::field_trace_backward   … and its cotangent   → dx, dt, dvalues, whatever the backend

With s_j = ‖x − x0_j‖² + t² and w = softmax_j(−(k/2) log s_j) (k = ∞: softmax_j(−‖x − x0_j‖²/2t²)):
displacement v = Σ_j w_j (x0_j − x) (B, d) and log_mass (B,) float64, the logsumexp of the logits.
The result is what `outputs` makes of v; log_mass is (0,) unless that is v itself. anchor (B,) int64
is the nearest reference a, residual (B, d) is v − (x0_a − x) and anchor_log_weight (B,) float64 is
log w_a, from which derivatives recompute every weight; they are (0,) unless saved.

x (B, *event) and values (N, *event) are of any floating dtype and strides, or values are uint8
codes into table (256,) float32, which is else (0,). t (B,). operands are what the backend prepared
of all values, or empty. ranges (B, 2) int64 are the first and the last + 1 of the references that
each query sees, never none, equal ones together; None where all see all.

A backend is a module with

    unsupported_reason(device) → None or why it cannot run
    chunk_shape(B, N, d, workspace, prepared, values_grad)
                                                 → queries and references that one call may take
    prepare(values, table, workspace)            → operands, what is computed once of the references
    operands_of(operands, references)            → those of a slice of the references
    forward(x, t, values, table, operands, k)    → v, log_mass, anchor, anchor_log_weight of a chunk
    backward(rows, values, table, operands, cotangents, values_grad)
                                                 → dvalues or None; adds 2 Σ_j c_j (x0_j − x) to
                                                   cotangents.dx and to cotangents.dt
    jvp(rows, values, table, operands, ẋ, ṫ, l̇)  → pull, slope (see `loops.field_jvp`)
    trace(rows, values, table, operands)         → its share of the trace (see `trace`)

for x (n, d) float32 or float64, and float64 where the values are; t float64; values (m, d) float32,
float64 or uint8; everything else float64. rows and cotangents are what `rows` has of n queries.
Without `jvp` the portable sums serve, without `finish` and `begin` those of `rows`, without `trace`
the gradients. A module with RANGES takes those of the queries too, as the last argument of
`forward` and in rows, and it says whether its chunks hold "all" pairs or those that are "seen", of
which the host has to know; the others are called for each range by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pfgm_kernels import loops, trace
from pfgm_kernels.chunks import Inputs
from pfgm_kernels.loops import Saved
from pfgm_kernels.outputs import Output
from pfgm_kernels.shards import Sharded

INPUTS = (
    "Tensor x, Tensor t, Tensor values, Tensor table, Tensor[] operands, float k, Tensor? ranges"
)
OUTPUT = "str output, float gamma, float scale"
SAVED = "Tensor residual, Tensor anchor, Tensor anchor_log_weight"
ENDING = "int workspace, str backend"
SCHEMAS = {
    "field_forward": f"({INPUTS}, {OUTPUT}, bool save, {ENDING})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "field_backward": f"({INPUTS}, {OUTPUT}, {SAVED}, Tensor? g, Tensor? g_log_mass,"
    f" bool values_grad, {ENDING}) -> (Tensor, Tensor, Tensor)",
    "field_jvp": f"({INPUTS}, {OUTPUT}, {SAVED}, Tensor? x_tangent, Tensor? t_tangent,"
    f" Tensor? values_tangent, {ENDING}) -> (Tensor, Tensor)",
    "field_trace": f"({INPUTS}, {ENDING}) -> Tensor",
    "field_trace_backward": f"({INPUTS}, Tensor g, bool values_grad, int workspace)"
    " -> (Tensor, Tensor, Tensor)",
}
QUERY_ROWS = {
    "field_forward": {0, 1, 6},
    "field_backward": {0, 1, 6, 10, 11, 12, 13, 14},
    "field_jvp": {0, 1, 6, 10, 11, 12, 13, 14},
    "field_trace": {0, 1, 6},
    "field_trace_backward": {0, 1, 6, 7},
}
"""Which of the arguments have a row a query."""
TANGENTS = slice(13, 16)
"""Where field_jvp has the tangents among its arguments."""

for name, schema in SCHEMAS.items():
    torch.library.define(f"pfgm::{name}", schema)


def _grouped(*args: Any) -> tuple[Inputs, Output, tuple[Any, ...]]:
    return Inputs(*args[:7]), Output(*args[7:10]), args[10:]


@torch.library.register_fake("pfgm::field_forward")
def _(*args: Any) -> tuple[Tensor, ...]:
    inputs, output, (save, *_) = _grouped(*args)
    return loops.empty_result(inputs, output), *loops.empty_rows(inputs, output, save)


@torch.library.register_fake("pfgm::field_backward")
def _(*args: Any) -> tuple[Tensor, ...]:
    inputs, _, (*_, values_grad, _, _) = _grouped(*args)
    return loops.empty_gradients(inputs, values_grad)


@torch.library.register_fake("pfgm::field_jvp")
def _(*args: Any) -> tuple[Tensor, ...]:
    inputs, output, _ = _grouped(*args)
    return loops.empty_result(inputs, output), loops.empty_rows(inputs, output, False)[0]


@torch.library.register_fake("pfgm::field_trace")
def _(*args: Any) -> Tensor:
    x = args[0]
    return x.new_empty(x.shape[0], dtype=torch.float64)


@torch.library.register_fake("pfgm::field_trace_backward")
def _(*args: Any) -> tuple[Tensor, ...]:
    return loops.empty_gradients(Inputs(*args[:7]), args[8])


def field_forward(*args: Any) -> tuple[Tensor, ...]:
    inputs, output, rest = _grouped(*args)
    with torch.autocast(inputs.x.device.type, enabled=False):
        return loops.field_forward(inputs, output, *rest)


def field_backward(*args: Any) -> tuple[Tensor, ...]:
    inputs, output, rest = _grouped(*args)
    with torch.autocast(inputs.x.device.type, enabled=False):
        return loops.field_backward(inputs, output, Saved(*rest[:3]), *rest[3:])


def field_jvp(*args: Any) -> tuple[Tensor, ...]:
    inputs, output, rest = _grouped(*args)
    with torch.autocast(inputs.x.device.type, enabled=False):
        return loops.field_jvp(inputs, output, Saved(*rest[:3]), rest[3:6], *rest[6:])


def field_trace(*args: Any) -> Tensor:
    inputs = Inputs(*args[:7])
    with torch.autocast(inputs.x.device.type, enabled=False):
        return trace.field_trace(inputs, *args[7:])


def field_trace_backward(*args: Any) -> tuple[Tensor, ...]:
    inputs = Inputs(*args[:7])
    with torch.autocast(inputs.x.device.type, enabled=False):
        return trace.field_trace_backward(inputs, *args[7:])


COMPUTED = {
    "field_forward": field_forward,
    "field_backward": field_backward,
    "field_jvp": field_jvp,
    "field_trace": field_trace,
    "field_trace_backward": field_trace_backward,
}
for name, function in COMPUTED.items():
    torch.library.impl(f"pfgm::{name}", "CompositeExplicitAutograd", function)


def call(name: str, *args: Any) -> Any:
    """An op by its name. Of references that are no tensor here, what computes it."""
    values = args[2]
    if isinstance(values, Tensor):
        return getattr(torch.ops.pfgm, name)(*args)
    if isinstance(values, Sharded):
        return values.call(name, COMPUTED[name], args, QUERY_ROWS[name])
    if values.near is not None:
        return values.near.call(name, COMPUTED[name], args, QUERY_ROWS[name])
    return COMPUTED[name](*args)


def no_vmap(*_: object) -> None:
    raise NotImplementedError(
        "the Poisson field does not support vmap (nor what uses it: is_grads_batched, jacrev, "
        "torch.autograd.functional.jacobian with vectorize): it is batched already, pass the "
        "queries as one x of shape (B, *event); for a Jacobian use torch.func.jacfwd"
    )


for name in SCHEMAS:
    if name != "field_jvp":
        torch.library.register_vmap(f"pfgm::{name}", no_vmap)
    # that of is_grads_batched and of torch.autograd.functional
    torch.library.impl(f"pfgm::{name}", "Batched", no_vmap)


@torch.library.register_vmap("pfgm::field_jvp")
def _(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], Any]:
    """Many tangents of the same queries, as `torch.func.jacfwd` asks for: one after the other."""
    x, t, values, table, operands, *rest = in_dims
    dims = in_dims[TANGENTS]
    others = (x, t, values, table, *operands, *rest[: TANGENTS.start - 5])
    if any(dim is not None for dim in others):
        no_vmap()
    results = []
    for i in range(info.batch_size):
        tangents = [
            tensor if dim is None else tensor.select(dim, i)
            for tensor, dim in zip(args[TANGENTS], dims, strict=True)
        ]
        results.append(
            torch.ops.pfgm.field_jvp(*args[: TANGENTS.start], *tangents, *args[TANGENTS.stop :])
        )
    result, log_mass = (torch.stack(tensors) for tensors in zip(*results, strict=True))
    return (result, log_mass), (0, 0)
