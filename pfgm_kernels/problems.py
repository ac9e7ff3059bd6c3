# SPDX-License-Identifier: Apache-2.0
"""The problems on which kernels prove themselves, for each family of kernels, and what the contract
allows the results to be off by.

float64 queries belong to the family of their d and their references: the same kernels finish the
float32 queries that float32 does not do for. So each family has problems in float64.
"""

from __future__ import annotations

import math
from itertools import product, starmap
from typing import NamedTuple

import torch
from torch import Tensor

from pfgm_kernels.backends._values import decode
from pfgm_kernels.outputs import Output

LOG_MASS, GRADIENT = 1e-6, 1e-5
"""The contract: of the log mass in all, of gradients beside their terms."""
BANDS = ("d ≤ 32", "32 < d ≤ 128", "d > 128")
DIMS = ((3, 32), (33, 128), (129, 300))
"""Of each band: few columns, and as many as it has or an odd number of tiles."""


class Family(NamedTuple):
    band: int
    """Of `BANDS`."""
    codes: bool
    """The references are in 8 bits."""
    backward: bool

    def __str__(self) -> str:
        stored, direction = ("float", "8-bit")[self.codes], ("forward", "backward")[self.backward]
        return f"{BANDS[self.band]}, {stored}, {direction}"


FAMILIES = tuple(starmap(Family, product(range(len(BANDS)), (False, True), (False, True))))


def band_of(d: int) -> int:
    return 0 if d <= 32 else 1 if d <= 128 else 2


class Problem(NamedTuple):
    x: Tensor
    t: Tensor
    x0: Tensor
    D: float = 1
    output: Output = Output("displacement", 0, 1)
    strict: bool = False
    """It is in the contract's stricter column at any d."""
    values_grad: bool = False
    """Gradients of x0 are asked for, too, unless it is in 8 bits."""
    cut: bool = False
    """The workspace is so small that the references are cut into chunks."""

    def tensors(self, family: Family, device: torch.device) -> list[Tensor]:
        """x, t, values, table, and cotangents of the result and of the log mass."""
        values, table = encode(self.x0) if family.codes else (self.x0, self.x0.new_empty(0).float())
        shape = self.output.shape(self.x, self.x.shape[1])
        g = torch.arange(math.prod(shape), dtype=self.x.dtype, device="cpu").sin().view(shape)
        g_log_mass = g[:, 0].double() * (self.output.name == "displacement")
        return [each.to(device) for each in (self.x, self.t, values, table, g, g_log_mass)]


def problems(family: Family) -> dict[str, Problem]:
    """By name, on the CPU; the same ones whenever they are asked for."""
    generator = torch.Generator("cpu").manual_seed(family.band)
    few, many = DIMS[family.band]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    def even(start: float, end: float, count: int) -> Tensor:
        return torch.linspace(start, end, count, dtype=torch.float64, device="cpu")

    def stored(x0: Tensor) -> Tensor:
        return decode(*encode(x0)).float() if family.codes else x0

    def heights(count: int, d: int, D: float = 1) -> Tensor:
        """t from where normal references share the weight down to where a few have it."""
        widest = math.sqrt((1 if math.isinf(D) else d + D) * math.sqrt(2 * d))
        return widest * even(1, 0.35, count)

    offset = stored(100 + 2e-3 * normal(300, few))
    amid = offset[:16] + 1e-3 / math.sqrt(few) * normal(16, few)

    # Three references that almost coincide; and sixteen on a sphere, equally far from its centre,
    # which are more that have much of the weight than a pass lists for a query in one tile.
    near, centre = 1e-3 / math.sqrt(few), normal(1, few)
    clusters = normal(130, few)
    clusters[70:72] = clusters[0] + near * normal(2, few)
    clusters[33:49] = centre + torch.nn.functional.normalize(normal(16, few), dim=1)
    clusters = stored(clusters)
    within = torch.cat([clusters[[0, 70, 71]].mean(0).expand(6, few), centre.expand(6, few)])
    within = within + near * normal(12, few)
    spread = 10 ** even(-0.5, 0.5, 6)

    # On references, at t = 0 on one that is there twice; and rows that are no numbers.
    points = stored(normal(100, few))
    points[60] = points[3]
    on, above = points[:14].clone(), 10 ** even(-5, 4, 14)
    on[9, few // 2], on[11, 0], above[12], above[[0, 3]] = math.nan, math.inf, math.nan, 0

    finer, mean, field = normal(20, few).double() / 3, Output("mean", 0, 1), Output("field", 5, 9)
    crowds, far = stored(normal(4, few)).repeat(66, 1), even(10, 300, 12)
    return {
        "tails": Problem(normal(131, many), heights(131, many), stored(normal(277, many))),
        "one": Problem(normal(1, few), heights(1, few), stored(normal(1, few)), values_grad=True),
        "chunks": Problem(
            *(normal(3, many), heights(3, many, math.inf), stored(normal(500, many))),
            D=math.inf,
            cut=True,
        ),
        "offset": Problem(amid, 2e-3 * heights(16, few), offset, output=mean),
        "clusters": Problem(
            within, torch.cat([1e-3 * math.sqrt(few) * spread, spread]), clusters, strict=True
        ),
        "points": Problem(on, above, points, strict=True),
        "points, field": Problem(on, above, points, output=Output("field", 0, 1), strict=True),
        "crowds": Problem(normal(12, few), far * few**0.25, crowds, 1e4, field, values_grad=True),
        "float64": Problem(finer, heights(20, few), normal(99, few) + finer[:1], values_grad=True),
        "float64 queries": Problem(finer, heights(20, few), stored(normal(99, few)), output=mean),
    }


def encode(x0: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 close to x0 (N, d), exactly where it is what codes stand for, and their table."""
    low, high = x0.amin().double(), x0.amax().double()
    steps = torch.arange(256, dtype=torch.float64, device=x0.device)
    codes = ((x0.double() - low) / (high - low) * 255).round().to(torch.uint8)
    return codes, (low + (high - low) * steps / 255).float()


def allowed_errors(problem: Problem, tensors: list[Tensor]) -> dict[str, Tensor]:
    """Of each row of the results, by name: by the contract a part of the sum of the absolute values
    of its terms. Those too small to be summed may be missing.
    """
    x, t, values, table, g, g_log_mass = tensors
    k, x0, output = x.shape[1] + problem.D, decode(values, table), problem.output
    distances = torch.cdist(x.double(), x0, compute_mode="donot_use_mm_for_euclid_dist")
    squares, heights = distances.square(), t[:, None].abs()
    nearest = squares.amin(1, keepdim=True)
    if math.isinf(k):
        rates, stretch = 0.5 / heights.square(), 2 * squares / heights
        depths = (squares - nearest) * rates
    else:
        rates, stretch = k / 2 / (squares + heights.square()), 2 * heights
        depths = k / 2 * ((squares - nearest) / (nearest + heights.square())).log1p()
    weights = (-depths).softmax(1)
    least = weights.amax(1, keepdim=True) / len(x0)

    def part_of_terms(tolerance: float) -> Tensor:
        missing = weights < min(tolerance, math.exp(-16)) * least
        return torch.where(missing, weights, tolerance * weights).nan_to_num(0)

    gain = torch.ones_like(nearest)  # of the result, for what (v, −t) changes by
    if output.name == "field":
        norm = (weights @ x0 - x).norm(dim=1, keepdim=True).hypot(heights)
        gain = output.scale / (norm + output.gamma)
    tolerance = 1e-6 if problem.strict or x.shape[1] <= 16 else 5e-6
    tolerance = 1e-10 if x.dtype == torch.float64 else tolerance
    result = gain * part_of_terms(tolerance) * distances.hypot(heights)

    terms, size = part_of_terms(GRADIENT), gain * g.double().norm(dim=1, keepdim=True)
    length = (weights * distances).sum(1, keepdim=True)
    slopes = terms * (size * (distances + length) + g_log_mass[:, None].abs()) * rates
    slopes = slopes.nan_to_num(0, 0)
    past_weights = GRADIENT * size[:, 0]  # what reaches x and t not by way of the weights
    return {
        output.name: result.sum(1),
        "log_mass": torch.full_like(t, LOG_MASS),
        "gradient of x": past_weights * (output.name != "mean") + 2 * (slopes * distances).sum(1),
        "gradient of t": past_weights * (output.name == "field") + (slopes * stretch).sum(1),
        "gradient of x0": (terms * size + 2 * slopes * distances).sum(0),
    }
