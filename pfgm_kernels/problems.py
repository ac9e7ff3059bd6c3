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
    """Gradients too, beside the values that they are of."""

    def __str__(self) -> str:
        stored, direction = ("float", "8-bit")[self.codes], ("forward", "backward")[self.backward]
        return f"{BANDS[self.band]}, {stored}, {direction}"


FAMILIES = tuple(starmap(Family, product(range(len(BANDS)), (False, True), (False, True))))


def band_of(d: int) -> int:
    return 0 if d <= 32 else 1 if d <= 128 else 2


DISPLACEMENT, MEAN = (Output(name, 0, 1) for name in ("displacement", "mean"))


class Problem(NamedTuple):
    x: Tensor
    t: Tensor
    x0: Tensor
    D: float = 1
    output: Output = DISPLACEMENT
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


class _Draws:
    """What the problems of a family are made of, on the CPU."""

    def __init__(self, family: Family) -> None:
        self.few, self.many = DIMS[family.band]
        self._codes = family.codes
        self._generator = torch.Generator("cpu").manual_seed(family.band)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float32, device="cpu")

    def stored(self, x0: Tensor) -> Tensor:
        """The references that stand for x0."""
        return decode(*encode(x0)).float() if self._codes else x0

    def heights(self, count: int, d: int, D: float = 1) -> Tensor:
        """t from where normal references share the weight down to where a few have it."""
        widest = math.sqrt((1 if math.isinf(D) else d + D) * math.sqrt(2 * d))
        return widest * _even(1, 0.35, count)


def _even(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64, device="cpu")


def tails(draws: _Draws) -> Problem:
    """Tiles of queries, of references and of columns that are not full; sums in several splits."""
    d = draws.many
    return Problem(draws.normal(131, d), draws.heights(131, d), draws.stored(draws.normal(277, d)))


def one(draws: _Draws) -> Problem:
    """B = N = 1, for which compilers have special cases."""
    x, x0 = draws.normal(1, draws.few), draws.stored(draws.normal(1, draws.few))
    return Problem(x, draws.heights(1, draws.few), x0, values_grad=True)


def chunks(draws: _Draws) -> Problem:
    """What was prepared of all references is cut; D = ∞."""
    t, x0 = draws.heights(3, draws.many, math.inf), draws.stored(draws.normal(500, draws.many))
    return Problem(draws.normal(3, draws.many), t, x0, D=math.inf, cut=True)


def offset(draws: _Draws) -> Problem:
    """Little spread far from the origin, where squares leave nothing of distances; means."""
    x0 = draws.stored(100 + 2e-3 * draws.normal(300, draws.few))
    x = x0[:16] + 1e-3 / math.sqrt(draws.few) * draws.normal(16, draws.few)
    return Problem(x, 2e-3 * draws.heights(16, draws.few), x0, output=MEAN)


def clusters(draws: _Draws) -> Problem:
    """Three references that almost coincide; and sixteen around a query: more that have much of the
    weight than a pass lists in one of its tiles.
    """
    d, centre, x0 = draws.few, draws.normal(1, draws.few), draws.normal(130, draws.few)
    x0[70:72] = x0[0] + 1e-3 / math.sqrt(d) * draws.normal(2, d)
    x0[33:49] = centre + torch.nn.functional.normalize(draws.normal(16, d), dim=1)
    x0 = draws.stored(x0)
    x = torch.cat([x0[[0, 70, 71]].mean(0).expand(6, d), centre.expand(6, d)])
    spread = 10 ** _even(-0.5, 0.5, 6)
    t = torch.cat([1e-3 * math.sqrt(d) * spread, spread])
    return Problem(x + 1e-3 / math.sqrt(d) * draws.normal(12, d), t, x0, strict=True)


def points(draws: _Draws) -> Problem:
    """Queries on references, at t = 0 on one that is there once and one that is there twice; and
    rows of NaN and Inf among them.
    """
    x0 = draws.normal(100, draws.few)
    x0[60] = x0[3]
    x0 = draws.stored(x0)
    x, t = x0[:14].clone(), 10 ** _even(-5, 4, 14)
    x[9, draws.few // 2], x[11, 0], t[12], t[[0, 3]] = math.nan, math.inf, math.nan, 0
    return Problem(x, t, x0, strict=True)


def field_on_points(draws: _Draws) -> Problem:
    """Some fields have no norm."""
    return points(draws)._replace(output=Output("field", 0, 1))


def crowds(draws: _Draws) -> Problem:
    """Equal references, whose errors add up; a D that magnifies them; fields as models train on."""
    x0, t = draws.stored(draws.normal(4, draws.few)).repeat(66, 1), _even(10, 300, 12)
    x, t = draws.normal(12, draws.few), t * draws.few**0.25
    return Problem(x, t, x0, D=1e4, output=Output("field", 5, 9), values_grad=True)


def float64(draws: _Draws) -> Problem:
    x, x0 = draws.normal(20, draws.few).double() / 3, draws.normal(99, draws.few).double() / 3
    return Problem(x, draws.heights(20, draws.few), x0, values_grad=True)


def float64_queries(draws: _Draws) -> Problem:
    """Of references in float32, which is how few columns give means."""
    x, x0 = draws.normal(20, draws.few).double() / 3, draws.stored(draws.normal(99, draws.few))
    return Problem(x, draws.heights(20, draws.few), x0, output=MEAN)


ALL = (
    *(tails, one, chunks, offset, clusters, points),
    *(field_on_points, crowds, float64, float64_queries),
)


def problems(family: Family) -> dict[str, Problem]:
    """By name; the same ones whenever they are asked for."""
    draws = _Draws(family)
    return {build.__name__.replace("_", " "): build(draws) for build in ALL}


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
