# SPDX-License-Identifier: Apache-2.0
"""torch.library contracts of the op, and the loop over chunks that every backend shares.

    pfgm::field_forward   x, t, values, table, operands, k
                          → displacement, log_mass, anchor, anchor_log_weight
    pfgm::field_backward  … and the cotangents   → dx, dt, dvalues

With s_j = ‖x − x0_j‖² + t² and w = softmax_j(−(k/2) log s_j) (k = ∞: softmax_j(−‖x − x0_j‖²/2t²)):
displacement v = Σ_j w_j (x0_j − x) (B, d) and log_mass (B,), the logsumexp of the logits, in
float64; anchor (B,) int64 is the nearest reference and anchor_log_weight (B,) float64 its log w,
which is what the backward pass needs to recompute every weight.

A backend is a module with

    unsupported_reason(device, d, requires_grad) → None or why it cannot run
    chunk_shape(B, N, d, workspace, prepared, values_grad)
                                                 → queries and references that one call may take
    prepare(values, table, workspace)            → operands, what is computed once of the references
    operands_of(operands, references)            → those of a slice of the references
    forward(x, t, values, table, operands, k)    → the four outputs for one chunk
    backward(…, values_grad)                     → 2 Σ_j c_j (x0_j − x), dt, dvalues or None

x is float32 or float64, and float64 where the values are; t float64; values (N, d) float32,
float64 or uint8 codes into table (256,) float32.
operands are what `prepare` returned for all values, or empty: then the op has them prepared, chunk
by chunk, within 5/8 of the workspace.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from pfgm_kernels.backends import BACKENDS
from pfgm_kernels.backends._values import decode
from pfgm_kernels.merge import mass_weights, merge

Partial = tuple[Tensor, Tensor, Tensor, Tensor]

torch.library.define(
    "pfgm::field_forward",
    "(Tensor x, Tensor t, Tensor values, Tensor table, Tensor[] operands, float k, int workspace,"
    " str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "pfgm::field_backward",
    "(Tensor x, Tensor t, Tensor values, Tensor table, Tensor[] operands, float k,"
    " Tensor displacement, Tensor anchor, Tensor anchor_log_weight, Tensor grad_displacement,"
    " Tensor grad_log_mass, bool values_grad, int workspace, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("pfgm::field_forward")
def _(
    x: Tensor,
    t: Tensor,
    values: Tensor,
    table: Tensor,
    operands: list[Tensor],
    k: float,
    workspace: int,
    backend: str,
) -> Partial:
    rows = x.new_empty(x.shape[0], dtype=torch.float64)
    anchor = torch.empty_like(rows, dtype=torch.int64)
    return x.new_empty(x.shape, dtype=torch.float64), rows, anchor, torch.empty_like(rows)


@torch.library.register_fake("pfgm::field_backward")
def _(x: Tensor, t: Tensor, values: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    values_grad = args[8]
    dvalues = torch.empty_like(values) if values_grad else values.new_empty(0)
    return x.new_empty(x.shape, dtype=torch.float64), torch.empty_like(t), dvalues


@torch.library.impl("pfgm::field_forward", "CompositeExplicitAutograd")
def _field_forward(
    x: Tensor,
    t: Tensor,
    values: Tensor,
    table: Tensor,
    operands: list[Tensor],
    k: float,
    workspace: int,
    backend: str,
) -> Partial:
    module = BACKENDS[backend]
    sizes = module.chunk_shape(x.shape[0], *values.shape, workspace, bool(operands), False)
    prepared = _Prepared(module, values, table, operands, workspace * 5 // 8)
    blocks = []
    with torch.autocast(x.device.type, enabled=False):
        for queries in _slices(x.shape[0], sizes[0]):
            block: Partial | None = None
            for references in _slices(values.shape[0], sizes[1]):
                part = module.forward(
                    x[queries], t[queries], values[references], table, prepared(references), k
                )
                if block is None:
                    block = part
                else:
                    part[2].add_(references.start)
                    block = _merge_partials(block, part)
            assert block is not None
            blocks.append(block)
        if len(blocks) == 1:
            return blocks[0]
        return tuple(torch.cat(tensors) for tensors in zip(*blocks, strict=True))  # type: ignore


@torch.library.impl("pfgm::field_backward", "CompositeExplicitAutograd")
def _field_backward(
    x: Tensor,
    t: Tensor,
    values: Tensor,
    table: Tensor,
    operands: list[Tensor],
    k: float,
    displacement: Tensor,
    anchor: Tensor,
    anchor_log_weight: Tensor,
    grad_displacement: Tensor,
    grad_log_mass: Tensor,
    values_grad: bool,
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module = BACKENDS[backend]
    shape = (x.shape[0], *values.shape)
    sizes = module.chunk_shape(*shape, workspace, bool(operands), values_grad)
    prepared = _Prepared(module, values, table, operands, workspace * 5 // 8)
    anchor_x0 = decode(values[anchor], table)
    dx = -grad_displacement
    dt = torch.zeros_like(t)
    dvalues = torch.empty_like(values) if values_grad else values.new_empty(0)
    with torch.autocast(x.device.type, enabled=False):
        for references in _slices(values.shape[0], sizes[1]):
            total: Tensor | None = None
            for queries in _slices(x.shape[0], sizes[0]):
                dx_part, dt_part, dvalues_part = module.backward(
                    x[queries],
                    t[queries],
                    values[references],
                    table,
                    prepared(references),
                    k,
                    displacement[queries],
                    anchor_x0[queries],
                    anchor_log_weight[queries],
                    grad_displacement[queries],
                    grad_log_mass[queries],
                    values_grad,
                )
                dx[queries] += dx_part
                dt[queries] += dt_part
                if values_grad:
                    total = dvalues_part if total is None else total.add_(dvalues_part)
            if total is not None:
                dvalues[references] = total
    if math.isfinite(k):  # the singular point, t = 0 on a reference, has zero gradients
        dx.masked_fill_(((t == 0) & (anchor_x0 == x).all(1))[:, None], 0.0)
    return dx, dt, dvalues


class _Prepared:
    """Operands of chunks of references: cut from what is prepared of all, or else prepared for a
    chunk and kept for as long as it is the same.
    """

    def __init__(
        self,
        module: ModuleType,
        values: Tensor,
        table: Tensor,
        operands: list[Tensor],
        workspace: int,
    ) -> None:
        self.module, self.values, self.table, self.workspace = module, values, table, workspace
        self.all = operands
        self.last: tuple[slice, list[Tensor]] | None = None

    def __call__(self, chunk: slice) -> list[Tensor]:
        if self.all:
            return self.module.operands_of(self.all, chunk)
        if self.last is None or self.last[0] != chunk:
            operands = self.module.prepare(self.values[chunk], self.table, self.workspace)
            self.last = chunk, operands
        return self.last[1]


def no_vmap(*_: object) -> None:
    raise NotImplementedError(
        "the Poisson field does not support vmap: it is batched already, pass the queries as one x "
        "of shape (B, *event)"
    )


torch.library.register_vmap("pfgm::field_forward", no_vmap)
torch.library.register_vmap("pfgm::field_backward", no_vmap)


def _merge_partials(a: Partial, b: Partial) -> Partial:
    displacement, log_mass = merge([a[:2], b[:2]])
    weights, _ = mass_weights(torch.stack([a[1], b[1]]))
    anchor_log_weight, nearest = (torch.stack([a[3], b[3]]) + weights.log()).max(0)
    return displacement, log_mass, torch.where(nearest == 0, a[2], b[2]), anchor_log_weight


def _slices(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `total`; one empty slice where there is nothing."""
    for start in range(0, max(total, 1), max(size, 1)):
        yield slice(start, min(start + size, total))
