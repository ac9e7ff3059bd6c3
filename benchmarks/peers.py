# SPDX-License-Identifier: Apache-2.0
"""Peers: the published formula and the best that libraries do, each one function of a problem.

The function is called once for each problem and prepares whatever it can from the references,
untimed. It returns `field(x (b, d), t (b,)) -> (b, d + 1)`, scale · (v, −t) / (‖(v, −t)‖ + GAMMA),
which is called for rows of the problem's queries; gradients are taken through it by autograd.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.machine import cannot_compile
from benchmarks.problems import GAMMA, Problem

Field = Callable[[Tensor, Tensor], Tensor]


class RefusedError(Exception):
    """The provider cannot run here; the message says why."""


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


CACHED = 1 << 20
"""Elements of the weights of the queries that a composite takes at a time where d is small: passes
over weights that stay in the cache take half the time, but products are slower in small pieces.
"""

Products = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""(x -> ‖x0‖² − 2 x·x0 (b, N), weights (b, N) -> weights @ x0), of the references x0."""


def composite(dtype: torch.dtype) -> Callable[[Problem, bool], Field]:
    """Distances by one matrix product from norms computed beforehand, softmax of the logits, and a
    second matrix product: the best that plain PyTorch calls do.
    """

    def prepare(problem: Problem, gradient: bool) -> Field:
        x0 = problem.x0.to(dtype)
        return _in_pieces(problem, _composite(problem, _plain_products(x0), dtype))

    return prepare


def onednn_composite(problem: Problem, gradient: bool) -> Field:
    """The composite in float32 with both products by oneDNN, on references that it has packed."""
    if not torch.backends.mkldnn.is_available():
        raise RefusedError("this torch is built without oneDNN")
    return _in_pieces(problem, _composite(problem, _onednn_products(problem.x0), torch.float32))


COMPILED_ON_A_GPU = 64
"""The largest d for which the composite is compiled on a GPU: it takes seconds for each shape."""


def compiled_composite(problem: Problem, gradient: bool) -> Field:
    """The composite in float32 under torch.compile, for the one batch size that it meets."""
    if not problem.x0.is_cuda and (reason := cannot_compile(torch.__file__)):
        raise RefusedError(f"torch.compile: {reason}")
    if problem.x0.is_cuda and problem.x0.shape[1] > COMPILED_ON_A_GPU:
        raise RefusedError(
            f"compiled up to d = {COMPILED_ON_A_GPU}: beyond, products take the time"
        )
    torch.compiler.reset()  # what it made for other problems counts against its limit
    field = _composite(problem, _plain_products(problem.x0), torch.float32)
    return _in_pieces(problem, torch.compile(field, dynamic=False))


def _composite(problem: Problem, products: Products, dtype: torch.dtype) -> Field:
    distances, average = products
    k = problem.x0.shape[1] + 1
    smallest = torch.finfo(dtype).tiny

    def field(x: Tensor, t: Tensor) -> Tensor:
        x, t = x.to(dtype), t.to(dtype)
        s = distances(x).add_((x.square().sum(1) + t.square())[:, None]).clamp_min_(smallest)
        return problem.normalise(average(torch.softmax(s.log_().mul_(-k / 2), 1)) - x, t)

    return field


def _in_pieces(problem: Problem, field: Field) -> Field:
    """The field of as many queries at a time as is fastest."""
    N, d = problem.x0.shape
    if d > 64 or problem.x0.is_cuda:
        return field
    rows = max(1, CACHED // N)

    def in_pieces(x: Tensor, t: Tensor) -> Tensor:
        if len(x) <= rows:
            return field(x, t)
        return torch.cat(
            [field(*piece) for piece in zip(x.split(rows), t.split(rows), strict=True)]
        )

    return in_pieces


def _plain_products(x0: Tensor) -> Products:
    sq_norms = x0.square().sum(1)
    return lambda x: torch.addmm(sq_norms, x, x0.T, alpha=-2), lambda weights: weights @ x0


def _onednn_products(x0: Tensor) -> Products:
    sq_norms = x0.square().sum(1)
    rows, columns = (torch.ops.mkldnn._reorder_linear_weight(m.contiguous()) for m in (x0, x0.T))
    return (
        lambda x: _OneDNNProduct.apply(-2 * x, rows, columns, sq_norms),
        lambda weights: _OneDNNProduct.apply(weights, columns, rows, None),
    )


class _OneDNNProduct(torch.autograd.Function):
    """x @ matrixᵀ + bias for a packed matrix; PyTorch has no backward of its own for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, transposed: Tensor, bias: Any) -> Tensor:
        ctx.transposed = transposed
        return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        product = torch.ops.mkldnn._linear_pointwise
        gradient = gradient.contiguous()
        return product(gradient, ctx.transposed, None, "none", [], ""), None, None, None


KEOPS_FOLDER = Path(__file__).parent.parent / "build" / "keops"
KEOPS_FLAGS = (
    "-march=native -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math"
)
"""Twice as fast as KeOps' own. Not -ffast-math: it flushes denormals of the whole process."""


def keops(problem: Problem, gradient: bool) -> Field:
    """One online reduction over all references, weights relative to the query's largest."""
    pykeops = _keops()
    if not problem.x0.is_cuda and (reason := cannot_compile(pykeops.__file__, KEOPS_FOLDER)):
        raise RefusedError(f"KeOps: {reason}")
    lazy_tensor = pykeops.LazyTensor
    # t as one more coordinate: one gradient formula to compile instead of two.
    sources = torch.cat([problem.x0, problem.x0.new_zeros(len(problem.x0), 1)], 1)
    k = sources.shape[1]
    y = lazy_tensor(sources[None])

    def field(x: Tensor, t: Tensor) -> Tensor:
        z = torch.cat([x, t[:, None]], 1)
        s = ((lazy_tensor(z[:, None]) - y) ** 2).sum(-1)
        total = (s.log() * (-k / 2)).sumsoftmaxweight(y, axis=1) - z
        return total * (problem.scale / (total.norm(dim=1, keepdim=True) + GAMMA))

    return field


def keops_temporaries(problem: Problem, gradient: bool) -> int:
    """Some rows (d + 1); it is run on the checked queries alone only where all would take long."""
    return 32 * 4 * (problem.x0.shape[1] + 1)


def _keops() -> Any:
    environment = {"KEOPS_CACHE_FOLDER": str(KEOPS_FOLDER), "CXXFLAGS": KEOPS_FLAGS}
    try:
        with patch.dict(os.environ, environment):
            importlib.import_module("pykeops").set_verbose(False)
            return importlib.import_module("pykeops.torch")
    except ImportError as error:
        raise RefusedError(f"KeOps is not installed (pip install pykeops): {error}") from None
