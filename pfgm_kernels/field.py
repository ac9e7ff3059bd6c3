# SPDX-License-Identifier: Apache-2.0
"""The op: the normalised empirical Poisson field of a reference batch.

With k = d + D and s_j = ‖x − x0_j‖² + t² (Eqs. 3 and 12 of Xu et al. 2022, "Poisson Flow
Generative Models"; D as in Xu et al. 2023, "PFGM++"):

    w = softmax_j(−(k/2) log s_j)
    displacement v = Σ_j w_j (x0_j − x),   log_mass = logsumexp_j(−(k/2) log s_j)
    field = scale · (v, −t) / (‖(v, −t)‖ + gamma)
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from pfgm_kernels._checks import (
    REAL,
    check_references,
    floating,
    holds,
    integer,
    non_negative,
    number,
    tensor,
)
from pfgm_kernels._traced import traceable
from pfgm_kernels.autograd import apply, forward_mode
from pfgm_kernels.choice import choose
from pfgm_kernels.chunks import References, default_workspace
from pfgm_kernels.references import ReferenceSet
from pfgm_kernels.shards import Sharded


def poisson_field(
    x: Tensor,
    t: Tensor | float,
    x0: Tensor | ReferenceSet,
    *,
    D: float = 1,
    gamma: float = 0.0,
    scale: float = 1.0,
    labels: Tensor | int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The normalised Poisson field of the references x0 at the queries (x, t), Eq. (12).

    field = scale · (v, −t) / (‖(v, −t)‖ + gamma), with v the displacement of
    `poisson_displacement`. It points toward the data. gamma = 0 and scale = 1 is the Normalize of
    Eq. (12); gamma = 5 and scale = √d is the target that the published PFGM models train on. A
    field of zero norm is 0, with zero gradient. t < 0 gives the mirror image.

    Differentiable in x, t and a tensor x0, once.

    Args:
        x: (B, *event) float16, bfloat16, float32 or float64: the queries.
        t: number, 0-dim or (B,): the distance from the data's plane, in the units of x. For D > 1
            the augmented radius r = σ√D; for D = ∞ it is σ itself.
        x0: (N, *event) tensor or ReferenceSet: the reference batch. A tensor is what it holds at
            the call, however it was edited since the last one (through `.data`, by NumPy): it is
            prepared anew each time. A ReferenceSet is prepared once, and stays as it was then.
        D: dimensions added to the data's d, real, ≥ 0; 1 is PFGM, `math.inf` the Gaussian kernel.
        gamma: ≥ 0, added to the norm, in the units of x.
        scale: factor of the normalised field.
        labels: (B,) integers or one for all, where x0 is a ReferenceSet that has labels: each query
            sees the references of its class alone, at their cost. None: all see all.
        backend: a name from `report()`, or None for the one that a ReferenceSet was made for, or
            else the first that can run; on a GPU, that has proven itself there (see `report`).

    Returns:
        (B, d + 1), the last column the t-component, in the dtype that x and x0 promote to
        (float32 for 16-bit inputs). A row whose query is not finite is NaN; so is, on a GPU or in
        a compiled call, where labels are not looked at, one whose class has no references.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, an empty x0, labels for references that have none, a
            class without references (on a CPU), or a scalar out of its range.
        RuntimeError: the backend asked for cannot run here; the message says why.
    """
    gamma, scale = non_negative("gamma", gamma), number("scale", scale)
    if not holds(abs(scale) < math.inf):
        raise ValueError(f"scale expects a finite number, got {scale}")
    return _run(x, t, x0, D, labels, backend, "field", gamma, scale)[0]


def poisson_displacement(
    x: Tensor,
    t: Tensor | float,
    x0: Tensor | ReferenceSet,
    *,
    D: float = 1,
    labels: Tensor | int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted mean displacement from the queries to the references, and the log of the mass.

    With k = d + D, s_j = ‖x − x0_j‖² + t² and w = softmax_j(−(k/2) log s_j):

        v = Σ_j w_j (x0_j − x),   log_mass = logsumexp_j(−(k/2) log s_j)

    Eq. (3) is exp(log_mass) · (v, −t) / (N · S_{d+1}(1)), and x + v is the posterior mean that
    PFGM++ and stable target fields train on. D = 0 with t = 0 is Eq. (2). For D = ∞ the logits are
    −‖x − x0_j‖²/(2t²). Partial results over disjoint references combine by `merge`. At the
    singular point (t = 0 on a reference) v = 0, log_mass = +∞, and gradients are zero.

    Arguments and errors are those of `poisson_field`.

    Returns:
        v (B, *event) in the promoted dtype of x and x0, log_mass (B,) float64.
    """
    return _run(x, t, x0, D, labels, backend, "displacement")


def posterior_mean(
    x: Tensor,
    t: Tensor | float,
    x0: Tensor | ReferenceSet,
    *,
    D: float = 1,
    labels: Tensor | int | None = None,
    backend: str | None = None,
) -> Tensor:
    """The mean of the references given a query, E[x0 | x, t] = Σ_j w_j x0_j = x + v.

    It is what a denoiser learns, and what PFGM++ and stable target fields train on. The weights w
    are those of `poisson_displacement`. The sum x + v is formed in float64 and rounded once: where
    the query is far from the references, v in float32 does not hold the digits of the mean.
    Differentiable in x, t and a tensor x0, once.

    Arguments and errors are those of `poisson_field`.

    Returns:
        (B, *event) in the promoted dtype of x and x0.
    """
    return _run(x, t, x0, D, labels, backend, "mean")[0]


def _run(
    x: Tensor,
    t: Tensor | float,
    x0: Tensor | ReferenceSet,
    D: float,
    labels: Tensor | int | None,
    backend: str | None,
    output: str,
    gamma: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The result (see `outputs`) and the log mass of the op, after a look at the arguments."""
    with told(x0):
        call = resolve(x, t, x0, D, labels, backend)
    k, gamma, scale = traceable(call.k, gamma, scale)
    result, log_mass = apply(*call.inputs, k, call.ranges, output, gamma, scale, *call.ending)
    return call.restore(result), call.restore(log_mass) if output == "displacement" else log_mass


def told(x0: Tensor | ReferenceSet) -> AbstractContextManager[None]:
    """Where references are those of a group, its other ranks are told of an error in it."""
    if not isinstance(x0, ReferenceSet) or torch.compiler.is_compiling():
        return nullcontext()
    return x0.values.roll.before() if isinstance(x0.values, Sharded) else nullcontext()


class Call(NamedTuple):
    """The arguments of a function of the op, looked at, as `ops` takes them."""

    inputs: tuple[Tensor, Tensor, References, Tensor, list[Tensor]]
    """x, t, values, table and operands; with labels the queries of a class together."""
    k: float
    ranges: Tensor | None
    ending: tuple[int, str]
    """The workspace and the backend that will run."""
    back: Tensor | None = None
    """(B,) int64, where each query is; None where they are as given."""
    missing: Tensor | None = None
    """(B,), whether a query's class has no references."""

    def restore(self, rows: Tensor) -> Tensor:
        """rows (B, ...) of a result in the order of the queries as given."""
        if self.back is None or self.missing is None:
            return rows
        missing = self.missing.view(-1, *[1] * (rows.dim() - 1))
        return rows.index_select(0, self.back).masked_fill(missing, math.nan)


def resolve(
    x: Tensor,
    t: Tensor | float,
    x0: Tensor | ReferenceSet,
    D: float,
    labels: Tensor | int | None,
    backend: str | None,
    derivatives: bool = False,
) -> Call:
    """The call that the arguments of any function of the op ask for, after a look at them.

    derivatives: whether the function takes some, whatever is asked of its result.
    """
    references = x0 if isinstance(x0, ReferenceSet) else None
    if references:
        values, table = references.stored()
    else:
        values = check_references(x0)  # type: ignore[arg-type]
        table = values.new_empty(0, dtype=torch.float32)
    workspace = references.workspace if references else default_workspace(values.device)
    event_shape = references.event_shape if references else x0.shape[1:]  # type: ignore[union-attr]

    floating("x", x)
    if x.dim() < 1 or x.shape[1:] != event_shape:
        raise ValueError(
            f"x expects shape (B, *event) with event {tuple(event_shape)} as in x0, "
            f"got {tuple(x.shape)}"
        )
    if x.device != values.device:
        raise ValueError(f"x and x0 expect one device, got {x.device} and {values.device}")
    D = number("D", D)
    if not holds(D >= 0):
        raise ValueError(f"D expects a real number ≥ 0, got {D}")
    t = expand_t(t, x, D)

    derivatives |= forward_mode() or (
        torch.is_grad_enabled() and (x.requires_grad or t.requires_grad or values.requires_grad)
    )
    if backend is None and references:
        backend = references.backend
    d = math.prod(event_shape)
    name = choose(backend, x.device, d, values.dtype == torch.uint8, derivatives)
    operands = references.operands_for(name) if references else []
    ending = workspace, name
    if labels is None:
        return Call((x, t, values, table, operands), d + D, None, ending)
    ranges, classes, missing = seen(labels, x0, x)
    if isinstance(values, Sharded) and values.queries == "local":
        ranges = classes[:, None]  # ranges are each rank's own
    order = classes.argsort(stable=True)  # so that kernels take those of a class together
    x, t, ranges = (each.index_select(0, order) for each in (x, t, ranges))
    inputs = x, t, values, table, operands
    return Call(inputs, d + D, ranges, ending, order.argsort(), missing)


def seen(
    labels: Tensor | int, x0: Tensor | ReferenceSet, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`Classes.ranges` of the labels of the queries x (B, *event)."""
    if not isinstance(x0, ReferenceSet) or x0.classes is None:
        wanted = "a ReferenceSet that has labels, ReferenceSet(x0, labels=...)"
        raise ValueError(f"labels expects {wanted}, got references that have none")
    if not isinstance(labels, Tensor):
        one = torch.zeros((), dtype=torch.int64, device=x.device) + integer("labels", labels, 0)
        labels = one.expand(x.shape[0])
    return x0.classes.ranges(labels, x.shape[0])


def expand_t(t: Tensor | float, x: Tensor, D: float) -> Tensor:
    """t as a floating-point tensor (B,) on the device of x."""
    if not isinstance(t, Tensor):
        height = number("t", t)
        if not holds(abs(height) < math.inf):
            raise ValueError(f"t expects a finite number, got {height}")
        if not (holds(height != 0) or holds(math.inf > D)):
            raise ValueError("t expects a number other than 0 where D is infinite, got 0")
        # torch.full would have torch.compile trace every number anew.
        zero = torch.zeros((), dtype=torch.float64, device=x.device)
        return (zero + height).expand(x.shape[0])
    tensor("t", t, REAL, "real numbers")
    if t.dim() > 0 and t.device != x.device:
        raise ValueError(f"t expects the device of x, {x.device}, got {t.device}")
    if t.shape not in (torch.Size([]), x.shape[:1]):
        raise ValueError(
            f"t expects a number, a 0-dim tensor or shape ({x.shape[0]},), got {tuple(t.shape)}"
        )
    if t.dim() == 0 or not t.is_floating_point():
        t = t.to(x.device, torch.float64)
    return t.expand(x.shape[0])
