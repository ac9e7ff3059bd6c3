# SPDX-License-Identifier: Apache-2.0
"""References and queries as the tensor cores read them: y = (x0 − origin)/unit as a sum of bfloat16
parts.

8-bit codes: unit is the step of their grid, y = code − 128, exact in one part. Floats: unit is 1,
the origin a point amid the data, and each part holds 8 bits of y. With x' = (x − origin)/unit

    s_j / unit² = ‖x'‖² + t²/unit² + ‖y_j‖² − 2 x'·y_j

Under the interpreter, whose products of bfloat16 are wrong, the parts are rounded to bfloat16 all
the same and held in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from pfgm_kernels.backends.triton.configurations import INTERPRETED, blocks
from pfgm_kernels.backends.triton.launch import Kernel
from pfgm_kernels.backends.triton.maths import load_values, round_to_bfloat16

PART = torch.float32 if INTERPRETED else torch.bfloat16
DIM_MULTIPLE = 64  # rows are padded to this many columns, with zeros
CODE_ORIGIN = 128
FUSED_MAX_DIM = 128  # columns up to which queries take one pass (fused.py)
SAMPLE = 1024  # references among which equal ones are looked for
CROWD = 8  # so many of them: rounding errors do not average out


@Kernel
def split_kernel(
    values_ptr,  # (rows, d)
    table_ptr,  # (256,) float32, for CODES
    origin_ptr,  # (d,) float64
    inverse_unit_ptr,  # (1,) float64
    mean_ptr,  # (d,) float64, but for REFERENCES
    parts_ptr,  # (PARTS, rows, width)
    norms_ptr,  # (rows,) float64
    marks_ptr,  # (rows,) float64
    rows,
    d,
    width,
    CODES: tl.constexpr,
    REFERENCES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Parts and ‖y‖² of BLOCK_R rows, and a mark of each: of a reference a sum that is the same for
    equal references and hardly else; of a query what its parts leave of its product with the mean
    of the references, an error that all of its products would share.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inverse_unit = tl.load(inverse_unit_ptr)
    norm = tl.zeros((BLOCK_R,), tl.float64)
    mark = tl.zeros((BLOCK_R,), tl.float64)
    for first in range(0, width, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        mask = (row < rows)[:, None] & (column < d)[None, :]
        y = load_values(values_ptr, table_ptr, row[:, None] * d + column[None, :], mask, False)
        if CODES:
            y = tl.where(mask, y - 128, 0.0)
        else:
            origin = tl.load(origin_ptr + column, mask=column < d, other=0.0)
            y = tl.where(mask, (y - origin[None, :]) * inverse_unit, 0.0)
        norm += tl.sum(y * y, 1)
        if REFERENCES:
            mark += tl.sum(y * ((column % 32768) * 40503 % 65536).to(tl.float64)[None, :], 1)
        rest = y.to(tl.float32)
        for part in tl.static_range(PARTS):
            high = round_to_bfloat16(rest)
            rest -= high
            y -= high.to(tl.float64)
            to = (part * tl.cast(rows, tl.int64) + row[:, None]) * width + column[None, :]
            stored = (row < rows)[:, None] & (column < width)[None, :]
            tl.store(parts_ptr + to, high.to(parts_ptr.dtype.element_ty), mask=stored)
        if not REFERENCES:
            mean = tl.load(mean_ptr + column, mask=column < d, other=0.0)
            mark += tl.sum(y * mean[None, :], 1)
    tl.store(norms_ptr + row, norm, mask=row < rows)
    tl.store(marks_ptr + row, mark, mask=row < rows)


@dataclass(frozen=True)
class Operands:
    """What `prepare` makes of N references of dimension d; all on their device."""

    header: Tensor
    """(5,) float64: unit; ‖x0 − (origin + unit · y)‖/unit at most; whether many references are
    equal; max ‖y‖; a number amid the ‖y‖², which what follows of them is relative to.
    """
    origin: Tensor
    """(d,) float64"""
    mean: Tensor
    """(d,) float64: of a sample of the y"""
    norms: Tensor
    """(N,) float32"""
    parts: Tensor
    """(parts, N, width), of which two passes read two at most"""

    def tensors(self) -> list[Tensor]:
        return [self.header, self.origin, self.mean, self.norms, self.parts]

    def of(self, references: slice) -> Operands:
        return replace(self, norms=self.norms[references], parts=self.parts[:, references])


def split(
    values: Tensor,
    table: Tensor,
    origin: Tensor,
    inverse_unit: Tensor,
    parts: int,
    mean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Parts (parts, rows, width), ‖y‖² (rows,) and marks (rows,) of values (rows, d): of
    references, or where there is a mean of these, of queries.
    """
    rows, d = values.shape
    width = padded(d)
    out = torch.empty(parts, rows, width, dtype=PART, device=values.device)
    norms = torch.empty(rows, dtype=torch.float64, device=values.device)
    marks = torch.empty_like(norms)
    sizes = blocks("split", values.device)
    sizes = sizes | {"BLOCK_D": min(sizes["BLOCK_D"], triton.next_power_of_2(width))}
    split_kernel[(triton.cdiv(rows, sizes["BLOCK_R"]),)](
        values,
        table,
        origin,
        inverse_unit,
        origin if mean is None else mean,
        out,
        norms,
        marks,
        rows,
        d,
        width,
        CODES=values.dtype == torch.uint8,
        REFERENCES=mean is None,
        PARTS=parts,
        **sizes,
    )
    return out, norms, marks


def reference_parts(dtype: torch.dtype, d: int) -> int:
    """Codes are exact in one part, two do for two passes, and the one pass reads three."""
    return 1 if dtype == torch.uint8 else 3 if d <= FUSED_MAX_DIM else 2


def padded(d: int) -> int:
    return triton.cdiv(d, DIM_MULTIPLE) * DIM_MULTIPLE


def bytes_per_reference(d: int) -> int:
    """Of the operands of float32 references, in bfloat16, with what making them takes."""
    return 2 * reference_parts(torch.float32, d) * padded(d) + 24


def prepare(values: Tensor, table: Tensor) -> Operands:
    """Operands of values (N, d) float32, or uint8 codes into table."""
    count, d = values.shape
    one = torch.ones(1, dtype=torch.float64, device=values.device)
    mean = sample(values, 256).double().mean(0)
    if values.dtype == torch.uint8:
        codes = torch.arange(256, dtype=torch.float64, device=values.device)
        low, unit = table[0].double(), (table[255].double() - table[0].double()) / 255
        deviation = (table.double() - (low + unit * codes)).abs().amax() / unit.abs() * d**0.5
        origin, mean = (low + CODE_ORIGIN * unit).expand(d).contiguous(), mean - CODE_ORIGIN
    else:
        origin = mean.float().double()
        unit, deviation, mean = one[0], 0 * one[0], 0 * origin
    parts, squares, hashes = split(
        values, table, origin, 1 / unit.reshape(1), reference_parts(values.dtype, d)
    )
    centre = (squares[0] + squares[count // 2] + squares[-1]) / 3
    radius = squares.amax().sqrt()
    equal = crowded(sample(hashes, SAMPLE)).double()
    header = torch.stack([unit, deviation, equal, radius, centre])
    return Operands(header, origin, mean, (squares - centre).float(), parts)


def sample(rows: Tensor, most: int) -> Tensor:
    """At most so many of the rows (N, …), evenly spread."""
    count = min(len(rows), most)
    return rows[torch.arange(count, device=rows.device) * len(rows) // count]


def crowded(hashes: Tensor) -> Tensor:
    """Whether many references are equal, judged by the hashes of a sample."""
    ordered = hashes.sort().values
    return (ordered[1:] == ordered[:-1]).sum() >= CROWD
