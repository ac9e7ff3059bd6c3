# SPDX-License-Identifier: Apache-2.0
"""The best that libraries do on a GPU's tensor cores at the accuracy of float32.

Both products in bfloat16 with float32 sums, from operands split into a high and a low part and put
side by side, so that one `torch.mm` adds all the parts' products; weights relative to the nearest
reference, whose own distance is a direct difference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Field
from benchmarks.problems import Problem

Split = Callable[[Tensor], Tensor]


def split_composite(problem: Problem, gradient: bool) -> Field:
    """High·high + high·low + low·high; 8-bit references are exact in bfloat16 and take two products
    instead of three. On a CPU the same with the bfloat16 values held in float32, for the tests.
    """
    x0, images = problem.x0, problem.images
    if images is None:
        high, low = _halves(x0)
        parts, unit, split = [high, low, high], 1.0, _three
    else:
        # Images are −1 + 2u/255 = (2u − 255)/255: odd integers of 8 bits.
        integers = (2 * images.to(torch.int16) - 255).to(torch.bfloat16)
        parts, unit, split = [integers, integers], 1 / 255, _two
    wide, tall = torch.cat(parts, 1), torch.cat(parts, 0)
    sq_norms, exponent = x0.square().sum(1), x0.new_tensor(-(x0.shape[1] + 1) / 2)
    weigh = _compiled(_weigh) if x0.is_cuda else _weigh
    split = _compiled(split) if x0.is_cuda else split

    def field(x: Tensor, t: Tensor) -> Tensor:
        s = sq_norms - (2 * unit) * _SplitProduct.apply(x, wide.T, tall, split)
        anchor = s.detach().argmin(1, keepdim=True)
        from_x = x0[anchor[:, 0]] - x
        nearest = (from_x.double().square().sum(1) + t.double().square()).float()
        weights = weigh(s, anchor, nearest[:, None], exponent)
        mass = weights.sum(1, keepdim=True)
        total = unit * _SplitProduct.apply(weights, tall, wide.T, split)
        # The anchor's own weight is 1; the others pull away from it: v = x0_a − x + Σ w_j (x0_j −
        # x0_a), where nothing cancels.
        return problem.normalise(from_x + (total - mass * x0[anchor[:, 0]]) / (1 + mass), t)

    return field


def _weigh(s: Tensor, anchor: Tensor, nearest: Tensor, exponent: Tensor) -> Tensor:
    """(1 + (s_j − s_a) / nearest)^exponent, of the anchors 0, for s and the result (b, N)."""
    excess = s - s.gather(1, anchor)
    weights = torch.exp(exponent * torch.log1p(excess / nearest))
    columns = torch.arange(s.shape[1], device=s.device)
    return torch.where(columns == anchor, 0.0, weights)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as a sum of two bfloat16 parts. The high one is rounded by its bits: to bfloat16 and back,
    which says the same, is what torch.compile leaves out, and the low part is then zero.
    """
    high = ((x.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)
    return high.to(torch.bfloat16), (x - high).to(torch.bfloat16)


def _three(x: Tensor) -> Tensor:
    high, low = _halves(x)
    return torch.cat([high, high, low], 1)


def _two(x: Tensor) -> Tensor:
    return torch.cat(_halves(x), 1)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled once for all sizes: nothing in it depends on them."""
    return torch.compile(function, dynamic=True)


class _SplitProduct(torch.autograd.Function):
    """split(x) @ matrix; `transposed` is the matrix that takes the result's gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, transposed: Tensor, split: Split) -> Tensor:
        ctx.transposed, ctx.split = transposed, split
        return _product(split(x), matrix)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _product(ctx.split(gradient.contiguous()), ctx.transposed), None, None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for bfloat16 tensors, products exact and summed in float32."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
