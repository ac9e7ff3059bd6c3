# SPDX-License-Identifier: Apache-2.0
"""The derivatives of the op for PyTorch: closed forms, once, backward and forward.

`apply` is the way in. torch.compile takes no function with a `jvp`: those that have one are used
only where a level of forward mode is entered.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pfgm_kernels import ops
from pfgm_kernels.chunks import References

SECOND = (
    "the Poisson field is differentiable once, got a request for second derivatives: take "
    "differences of the first ones (for a Jacobian-vector product torch.func.jvp needs none)"
)
NUM_INPUTS = 13  # of pfgm::field_forward


def apply(*args: Any) -> tuple[Tensor, Tensor]:
    """result and log_mass of pfgm::field_forward (x, t, values, table, operands, k, ranges, output,
    gamma, scale, workspace, backend), differentiable in x, t and values.
    """
    *inputs, workspace, backend = args
    if forward_mode():
        run = _DualField.apply
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs[:3]):
        run = _Field.apply
    else:
        return ops.call("field_forward", *inputs, False, workspace, backend)[:2]
    return run(*inputs, True, workspace, backend)[:2]


def apply_trace(*args: Any) -> Tensor:
    """pfgm::field_trace, differentiable in x, t and values, backward."""
    if forward_mode():
        return _DualTrace.apply(*args)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in args[:3]):
        return _Trace.apply(*args)
    return ops.call("field_trace", *args)


def forward_mode() -> bool:
    """Whether a level of forward mode is entered, by torch.func.jvp or by forward_ad itself."""
    return forward_ad._current_level >= 0


class _Field(torch.autograd.Function):
    """pfgm::field_forward with pfgm::field_backward."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return ops.call("field_forward", *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, t, values, table, operands, k, ranges, *scalars = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, t, _kept(ctx, values), table, ranges, *output[2:], *operands)
        ctx.constants = k, scalars[:3], scalars[4:]

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_log_mass: Tensor | None, *_: Any) -> Any:
        # Where a second derivative is prepared for, the detour makes asking for it an error.
        run: Any = partial(ops.call, "field_backward")
        if forward_mode():
            run = _DualGradient.apply
        elif torch.is_grad_enabled():
            run = _Gradient.apply
        inputs, saved, ending = _saved(ctx)
        values_grad = ctx.needs_input_grad[2]
        dx, dt, dvalues = run(*inputs, *saved, g, g_log_mass, values_grad, *ending)
        return dx, dt, dvalues if values_grad else None, *[None] * (NUM_INPUTS - 3)

    vmap = staticmethod(ops.no_vmap)


class _DualField(_Field):
    """The same with pfgm::field_jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _Field.setup_context(ctx, inputs, output)
        x, t, values, table, operands, _, ranges, *_ = inputs
        ctx.save_for_forward(x, t, _kept(ctx, values), table, ranges, *output[2:], *operands)

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, t: Tensor | None, values: Tensor | None, *_: Any) -> Any:
        inputs, saved, ending = _saved(ctx)
        tangents = _Tangent.apply(*inputs, *saved, x, t, values, *ending)
        return *tangents, None, None, None


def _kept(ctx: Any, values: References) -> Tensor | None:
    """What autograd saves of references; what is no tensor is kept beside that."""
    ctx.values = None
    if isinstance(values, Tensor):
        return values
    ctx.values = values
    return None


def _saved(ctx: Any) -> tuple[Any, Any, Any]:
    x, t, values, table, ranges, *rest = ctx.saved_tensors
    k, output, ending = ctx.constants
    values = ctx.values if values is None else values
    return (x, t, values, table, rest[3:], k, ranges, *output), rest[:3], ending


class _Once(torch.autograd.Function):
    """A derivative, which cannot be differentiated again."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(SECOND)


class _Gradient(_Once):
    @staticmethod
    def forward(*args: Any) -> Any:
        return ops.call("field_backward", *args)

    vmap = staticmethod(ops.no_vmap)


class _DualGradient(_Gradient):
    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(SECOND)


class _Tangent(_Once):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return ops.call("field_jvp", *args)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(SECOND)


class _Trace(torch.autograd.Function):
    """pfgm::field_trace with pfgm::field_trace_backward."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return ops.call("field_trace", *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, t, values, table, _, k, ranges, workspace, _ = inputs
        ctx.save_for_backward(x, t, _kept(ctx, values), table, ranges)
        ctx.constants = k, workspace

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        run: Any = partial(ops.call, "field_trace_backward")
        if forward_mode():
            run = _DualTraceGradient.apply
        elif torch.is_grad_enabled():
            run = _TraceGradient.apply
        k, workspace = ctx.constants
        values_grad = ctx.needs_input_grad[2]
        x, t, values, table, ranges = ctx.saved_tensors
        values = ctx.values if values is None else values
        dx, dt, dvalues = run(x, t, values, table, [], k, ranges, g, values_grad, workspace)
        return dx, dt, dvalues if values_grad else None, *[None] * 6

    vmap = staticmethod(ops.no_vmap)


class _DualTrace(_Trace):
    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "the divergence has no forward mode: take its gradients backward, or differences"
        )


class _TraceGradient(_Once):
    @staticmethod
    def forward(*args: Any) -> Any:
        return ops.call("field_trace_backward", *args)

    vmap = staticmethod(ops.no_vmap)


class _DualTraceGradient(_TraceGradient):
    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(SECOND)
