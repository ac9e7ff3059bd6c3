# SPDX-License-Identifier: Apache-2.0
"""Who computes it. A provider is one function: add it here and it takes part in every benchmark.

The function is called once for each problem and prepares whatever it can from the references,
untimed. It returns `field(x (b, d), t (b,)) -> (b, d + 1)`, scale · (v, −t) / (‖(v, −t)‖ + GAMMA),
which is called for rows of the problem's queries; gradients are taken through it by autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.problems import GAMMA, Problem
from pfgm_kernels import poisson_field
from pfgm_kernels.backends import BACKENDS
from tests import oracle

Field = Callable[[Tensor, Tensor], Tensor]


class RefusedError(Exception):
    """The provider cannot run here; the message says why."""


@dataclass(frozen=True)
class Provider:
    """prepare(problem, gradient) -> field, `gradient` telling whether gradients will be taken.

    tolerances: of `Exact.forward_error` and `Exact.gradient_error`; a provider that is further off
    is not timed. temporaries(problem, gradient): bytes that one query takes, for a provider that
    does not bound its own memory; its queries are then cut into chunks that fit.
    """

    name: str
    prepare: Callable[[Problem, bool], Field]
    tolerances: tuple[float, float]
    temporaries: Callable[[Problem, bool], int] | None = None
    ours: bool = False

    def __str__(self) -> str:
        return self.name


PEER_TOLERANCES = (1e-2, 1e-2)
"""Peers are timed with the error that they have, and it is shown; this stops only nonsense."""
OUR_TOLERANCES = (1e-6, oracle.GRADIENT)
"""The accuracy contract."""


def published(problem: Problem, gradient: bool) -> Field:
    """The formula as Xu et al. 2022 published it: differences, weights and weighted differences of
    shape (B, N, d + 1), weights relative to the nearest source, 1e-7 against division by zero.
    """
    sources = torch.cat([problem.x0, problem.x0.new_zeros(len(problem.x0), 1)], 1)

    def field(x: Tensor, t: Tensor) -> Tensor:
        difference = sources - torch.cat([x, t[:, None]], 1)[:, None]
        distance = difference.square().sum(2).sqrt()
        nearest = distance.amin(1, keepdim=True)
        weights = (nearest / (distance + 1e-7)) ** sources.shape[1]
        weights = weights / (weights.sum(1, keepdim=True) + 1e-7)
        total = (weights[:, :, None] * difference).sum(1)
        return total * (problem.scale / (total.norm(dim=1, keepdim=True) + GAMMA))

    return field


def published_temporaries(problem: Problem, gradient: bool) -> int:
    """Two tensors (N, d + 1) at a time; the backward pass holds four."""
    return (4 if gradient else 2) * 4 * len(problem.x0) * (problem.x0.shape[1] + 1)


def composite(dtype: torch.dtype) -> Callable[[Problem, bool], Field]:
    """Distances by one matrix product from norms computed beforehand, softmax of the logits, and a
    second matrix product: the best that plain PyTorch calls do.
    """

    def prepare(problem: Problem, gradient: bool) -> Field:
        x0 = problem.x0.to(dtype)
        sq_norms = x0.square().sum(1)
        k = x0.shape[1] + 1
        smallest = torch.finfo(dtype).tiny

        def field(x: Tensor, t: Tensor) -> Tensor:
            x, t = x.to(dtype), t.to(dtype)
            s = torch.addmm(sq_norms, x, x0.T, alpha=-2)
            s = s.add_((x.square().sum(1) + t.square())[:, None]).clamp_min_(smallest)
            v = torch.softmax(s.log_().mul_(-k / 2), 1) @ x0 - x
            return problem.normalise(v, t)

        return field

    return prepare


def ours(backend: str, prepared: bool) -> Callable[[Problem, bool], Field]:
    """The op on a ReferenceSet (of 8-bit images where the data are images) or on a plain tensor."""

    def prepare(problem: Problem, gradient: bool) -> Field:
        d = problem.x0.shape[1]
        reason = BACKENDS[backend].unsupported_reason(problem.x0.device, d, gradient)
        if reason is not None:
            raise RefusedError(reason)
        references = problem.reference_set() if prepared else problem.x0

        def field(x: Tensor, t: Tensor) -> Tensor:
            return poisson_field(
                x, t, references, gamma=GAMMA, scale=problem.scale, backend=backend
            )

        return field

    return prepare


def providers(device: torch.device) -> list[Provider]:
    """Peers, then ours by backend that runs on the device."""
    peers = [
        Provider("published formula", published, PEER_TOLERANCES, published_temporaries),
        Provider("float32 composite", composite(torch.float32), PEER_TOLERANCES),
        Provider("float64 composite", composite(torch.float64), PEER_TOLERANCES),
    ]
    available = [name for name, b in BACKENDS.items() if b.unsupported_reason(device) is None]
    return peers + [
        Provider(
            f"pfgm_kernels {name}, {form}",
            ours(name, form == "ReferenceSet"),
            OUR_TOLERANCES,
            ours=True,
        )
        for name in available
        # `eager` is slow and prepares nothing: its two forms would show the same time twice.
        for form in (("tensor",) if name == "eager" else ("ReferenceSet", "tensor"))
    ]
