# SPDX-License-Identifier: Apache-2.0
"""References in a few coordinates, by which the CPU kernels find those that are near a query
(csrc/cpu/two_pass/sketch.h). Any orthonormal basis is correct; the data's own is fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pfgm_kernels.backends._values import decode
from pfgm_kernels.on_disk import OnDisk

COLUMNS = (32, 256)
LEAST_DIM, LEAST_COUNT = 400, 8192
LEAST_SHARE = 0.3
"""Of the references' squared norm that the first columns have to hold: of white data they hold
nothing, and every query would be looked at in vain."""
MOST_BYTES = 0.25
"""Of those of a reference that a sketch may take."""
FEW, LOOKED_AT = 1 / 500, 2048
"""References that may be left of how many, where it is measured when a sketch pays."""
NORM = 32000  # kShortNorm
BASIS_ERROR = 1e-11  # kBasisError
SAMPLE, ROUNDS, BYTES = 4096, 3, 1 << 27

Values = Tensor | OnDisk


class Sketch(NamedTuple):
    points: Tensor
    """(N, q) int16, P y_j in multiples of the unit, with y_j = (x0_j − origin)/unit of the grid."""
    rest: Tensor
    """(N,) float32 ‖Q y_j‖, rounded up; Q is what the rows of P leave."""
    basis: Tensor
    """P (q, d) float64, orthonormal rows."""
    scale: Tensor
    """(3,) float64: the unit of the points; the norm of what they leave of P y_j, at most; ‖Q x‖ up
    to which a query is likely to be left with few references, by this sketch or the ones after it.
    """


def columns_of(row_bytes: int) -> list[int]:
    """How many columns the sketches of references of this size may have."""
    most = int(row_bytes * MOST_BYTES / 2) // 2 * 2
    columns = [q for q in (COLUMNS[0], min(COLUMNS[1], most)) if q <= most]
    # The next one would else hardly be cheaper than all columns.
    return columns if len(columns) < 2 or columns[1] >= 4 * columns[0] else columns[:1]


def sketches(
    values: Values, table: Tensor, norms: Tensor, grid: Tensor, columns: Sequence[int]
) -> list[Sketch]:
    """Those that are likely to pay.

    values (N, d) float32 or uint8, table, norms and grid as of `cpu.prepare`.
    """
    count, d = values.shape
    if not columns or d < LEAST_DIM or count < LEAST_COUNT:
        return []
    sample = _sample(values, table, grid, SAMPLE)
    basis = _basis(sample, columns[-1])
    if (sample @ basis[: columns[0]].T).square().sum() < LEAST_SHARE * sample.square().sum():
        return []
    return in_basis(values, table, norms, grid, basis, columns)


def in_basis(
    values: Values,
    table: Tensor,
    norms: Tensor,
    grid: Tensor,
    basis: Tensor,
    columns: Sequence[int],
) -> list[Sketch]:
    """The sketches by the first rows of an orthonormal basis."""
    count, d = values.shape
    unit = norms.max().sqrt().clamp(min=1e-280) * 1.001 / NORM  # values are not quite on the grid
    found = [
        (
            torch.empty(count, q, dtype=torch.int16, device=values.device),
            torch.empty(count, dtype=torch.float32, device=values.device),
            norms.new_zeros(()),
        )
        for q in columns
    ]
    rows = max(1, BYTES // (32 * d))
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        y = _shifted(values[part], table, grid)
        squared, exact = y.square().sum(1), y @ basis.T
        for points, rest, lost in found:
            held = exact[:, : points.shape[1]]
            rounded = (held / unit).round()
            points[part] = rounded
            left = (squared - held.square().sum(1)).clamp(min=0) + BASIS_ERROR * squared
            rest[part] = left.sqrt() * (1 + 1e-7)
            lost.copy_(torch.maximum(lost, (held - rounded * unit).square().sum(1).max()))
    sample = _sample(values, table, grid, LOOKED_AT)
    noise = max(_decided(sample, basis[:q]) for q in columns)
    sketches = []
    for points, rest, lost in found:
        q = points.shape[1]
        own = rest.double().square().kthvalue(max(1, count * 9 // 10)).values
        reach = (own + noise**2 * (1 - q / d)).sqrt()
        scale = torch.stack([unit, lost.sqrt() * (1 + 1e-9), reach])
        sketches.append(Sketch(points, rest, basis[:q].contiguous(), scale))
    return sketches


def _decided(y: Tensor, basis: Tensor) -> float:
    """Up to what norm noise on a reference leaves few others that may be near, as measured."""
    d = y.shape[1]
    others, squared = y @ basis.T, y.square().sum(1)
    rest = (squared - others.square().sum(1)).clamp(min=0)
    x, x_rest = others[::32], rest[::32, None]
    generator = torch.Generator(x.device).manual_seed(0)
    reach = 0.0
    for relative in torch.logspace(-2, 1, 40, device="cpu").tolist():
        square = relative**2 * squared.mean()
        normal = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        seen = torch.cdist(x + (square / d).sqrt() * normal, others).square()
        hidden = ((x_rest + square * (1 - len(basis) / d)).sqrt() - rest.sqrt()).square()
        # Weights of exp(-30) are cut, those of 60/d farther in squared distances.
        if (seen + hidden <= square * (1 + 60 / d)).double().mean() > FEW:
            break
        reach = float(square.sqrt())
    return reach


def _sample(values: Values, table: Tensor, grid: Tensor, most: int) -> Tensor:
    """Some y, evenly spread."""
    count, d = values.shape
    wanted = min(most, BYTES // (8 * d), count)
    places = torch.arange(wanted, device=values.device) * count // wanted
    return _shifted(values[places], table, grid)


def _shifted(values: Tensor, table: Tensor, grid: Tensor) -> Tensor:
    return (decode(values, table) - grid[4:]) / grid[0]


def _basis(sample: Tensor, width: int) -> Tensor:
    """The principal directions (width, d) of a sample (n, d), by subspace iteration."""
    generator = torch.Generator(sample.device).manual_seed(0)
    directions = torch.randn(
        sample.shape[1], width, dtype=torch.float64, device=sample.device, generator=generator
    )
    single = sample.float()
    for _ in range(ROUNDS):
        image = single.T @ (single @ directions.float())
        directions, _ = torch.linalg.qr(image.double())
    image = sample @ directions
    _, rotation = torch.linalg.eigh(image.T @ image)
    return (directions @ rotation.flip(1)).T.contiguous()
