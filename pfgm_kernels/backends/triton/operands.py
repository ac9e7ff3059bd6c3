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
CODE_ORIGIN = tl.constexpr(128)
FUSED_MAX_DIM = 128  # columns up to which queries take one pass (fused.py)
MEAN_SAMPLE = tl.constexpr(256)  # references whose mean is that of all, nearly
SAMPLE = tl.constexpr(1024)  # references among which equal ones are looked for
CROWD = tl.constexpr(8)  # so many of them: rounding errors do not average out


@Kernel
def origin_kernel(
    values_ptr,  # (N, d)
    table_ptr,  # (256,) float32, for CODES
    header_ptr,  # these and all below are written: see Operands
    origin_ptr,
    mean_ptr,
    N,
    d,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Unit, deviation, and the origin and the mean of BLOCK_D columns."""
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tl.minimum(N, MEAN_SAMPLE).to(tl.int64)
    total = tl.zeros((BLOCK_D,), tl.float64)
    for first in range(0, rows, GROUP):
        i = first + tl.arange(0, GROUP)
        row = i * tl.cast(N, tl.int64) // rows
        mask = (i < rows)[:, None] & (column < d)[None, :]
        index = row[:, None] * d + column[None, :]
        total += tl.sum(load_values(values_ptr, table_ptr, index, mask, False), 0)
    mean = total / rows.to(tl.float64)
    unit = tl.full((), 1, tl.float64)
    deviation = tl.full((), 0, tl.float64)
    if CODES:
        codes = tl.arange(0, 256)
        low, high = tl.load(table_ptr).to(tl.float64), tl.load(table_ptr + 255).to(tl.float64)
        unit = (high - low) / 255
        off = tl.load(table_ptr + codes).to(tl.float64) - (low + unit * codes)
        deviation = tl.max(tl.abs(off), 0) / tl.abs(unit) * tl.sqrt(tl.cast(d, tl.float64))
        origin = low + CODE_ORIGIN * unit + 0 * mean
        mean -= CODE_ORIGIN
    else:
        origin = mean.to(tl.float32).to(tl.float64)
        mean = tl.zeros((BLOCK_D,), tl.float64)
    tl.store(header_ptr, unit)
    tl.store(header_ptr + 1, deviation)
    tl.store(origin_ptr + column, origin, mask=column < d)
    tl.store(mean_ptr + column, mean, mask=column < d)


@Kernel
def split_kernel(
    values_ptr,  # (rows, d)
    table_ptr,  # (256,) float32, for CODES
    header_ptr,  # (5,) float64
    origin_ptr,  # (d,) float64
    mean_ptr,  # (d,) float64, but for REFERENCES
    x_ptr,  # (rows, d) queries, for COTANGENTS as the next two
    g_m_ptr,  # (rows,) float64
    product_ptr,  # (rows,) float64 g·v
    parts_ptr,  # (PARTS, rows, width)
    norms_ptr,  # (rows,) float64
    marks_ptr,  # (2, rows) float64
    rows,
    d,
    width,
    CODES: tl.constexpr,
    REFERENCES: tl.constexpr,
    COTANGENTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Parts and ‖y‖² of BLOCK_R rows, and a mark of each: of a reference a sum that is the same for
    equal references and hardly else; of a query what two parts, and what all of them, leave of its
    product with the mean of the references, an error that all of its products would share; of a
    cotangent, y = g, that and (g_m − g·v + g·(origin − x))/unit, in two parts as float32 holds it.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    norm = tl.zeros((BLOCK_R,), tl.float64)
    early = tl.zeros((BLOCK_R,), tl.float64)
    mark = tl.zeros((BLOCK_R,), tl.float64)
    shift = tl.zeros((BLOCK_R,), tl.float64)
    for first in range(0, width, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        mask = (row < rows)[:, None] & (column < d)[None, :]
        index = row[:, None] * d + column[None, :]
        y = load_values(values_ptr, table_ptr, index, mask, False)
        if CODES:
            y = tl.where(mask, y - CODE_ORIGIN, 0.0)
        else:
            origin = tl.load(origin_ptr + column, mask=column < d, other=0.0)[None, :]
            if COTANGENTS:
                x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float64)
                shift += tl.sum(y * (origin - x), 1)
            elif REFERENCES:
                y = tl.where(mask, y - origin, 0.0)
            else:
                y = tl.where(mask, (y - origin) / tl.load(header_ptr), 0.0)
        norm += tl.sum(y * y, 1)
        if REFERENCES:
            mark += tl.sum(y * ((column % 32768) * 40503 % 65536).to(tl.float64)[None, :], 1)
        else:
            mean = tl.load(mean_ptr + column, mask=column < d, other=0.0)[None, :]
        rest = y.to(tl.float32)
        for part in tl.static_range(PARTS):
            high = round_to_bfloat16(rest)
            rest -= high
            y -= high.to(tl.float64)
            to = (part * tl.cast(rows, tl.int64) + row[:, None]) * width + column[None, :]
            stored = (row < rows)[:, None] & (column < width)[None, :]
            tl.store(parts_ptr + to, high.to(parts_ptr.dtype.element_ty), mask=stored)
            if part == 1 and not REFERENCES:
                early += tl.sum(y * mean, 1)
        if not REFERENCES:
            mark += tl.sum(y * mean, 1)
    if COTANGENTS:
        own = tl.load(g_m_ptr + row, mask=row < rows, other=0.0)
        own -= tl.load(product_ptr + row, mask=row < rows, other=0.0)
        early = mark + (own + shift) / tl.load(header_ptr)
        mark = early - early.to(tl.float32).to(tl.float64)
    tl.store(norms_ptr + row, norm, mask=row < rows)
    tl.store(marks_ptr + row, early, mask=row < rows)
    tl.store(marks_ptr + rows + row, mark, mask=row < rows)


@Kernel
def summarise_kernel(
    squares_ptr,  # (N,) float64 ‖y‖²
    marks_ptr,  # (N,) float64
    header_ptr,  # this and the next are written: see Operands
    norms_ptr,
    N,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What is known of all references together, by the first program, and the norms of BLOCK."""
    count = tl.cast(N, tl.int64)
    centre = tl.load(squares_ptr) + tl.load(squares_ptr + count // 2)
    centre = (centre + tl.load(squares_ptr + count - 1)) / 3
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    squares = tl.load(squares_ptr + row, mask=row < N, other=0.0)
    tl.store(norms_ptr + row, (squares - centre).to(tl.float32), mask=row < N)
    if tl.program_id(0) == 0:
        most = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, count, BLOCK):
            row = first + tl.arange(0, BLOCK)
            squares = tl.load(squares_ptr + row, mask=row < N, other=0.0)
            most = tl.where((squares > most) | (squares != squares), squares, most)
        worst = tl.sum(tl.where(most != most, most, 0.0), 0)  # NaN, which a maximum may swallow
        samples = tl.minimum(N, SAMPLE)
        ids = tl.arange(0, SAMPLE)
        marks = tl.load(marks_ptr + ids * count // samples, mask=ids < samples, other=0.0)
        equal = 0
        for first in range(0, samples, GROUP):
            i = first + tl.arange(0, GROUP)
            own = tl.load(marks_ptr + i * count // samples, mask=i < samples, other=0.0)
            same = (own[:, None] == marks[None, :]) & (ids[None, :] < i[:, None])
            found = tl.max(same.to(tl.int32), 1)
            equal += tl.sum(tl.where(i < samples, found, 0), 0)
        tl.store(header_ptr + 2, tl.where(equal >= CROWD, 1.0, 0.0).to(tl.float64))
        tl.store(header_ptr + 3, tl.sqrt(tl.max(most, 0)) + worst)
        tl.store(header_ptr + 4, centre)


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


@dataclass(frozen=True)
class Split:
    """Rows as the tensor cores read them; see split_kernel."""

    parts: Tensor
    """(parts, rows, width)"""
    norms: Tensor
    """(rows,) float64 ‖y‖²"""
    marks: Tensor
    """(2, rows) float64"""


def split(
    values: Tensor,
    table: Tensor,
    operands: Operands,
    parts: int,
    references: bool = False,
    cotangents: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Split:
    """Of queries (rows, d), of the references that the operands are being made of, or of cotangents
    with x, g_m and g·v.
    """
    rows, d = values.shape
    out = Split(
        torch.empty(parts, rows, padded(d), dtype=PART, device=values.device),
        torch.empty(rows, dtype=torch.float64, device=values.device),
        torch.empty(2, rows, dtype=torch.float64, device=values.device),
    )
    sizes = blocks("split", values.device)
    block = min(sizes["BLOCK_D"], triton.next_power_of_2(padded(d)))
    split_kernel[triton.cdiv(rows, sizes["BLOCK_R"]),](
        values,
        table,
        operands.header,
        operands.origin,
        operands.mean,
        *(cotangents or (values, out.norms, out.norms)),
        out.parts,
        out.norms,
        out.marks,
        rows,
        d,
        padded(d),
        CODES=values.dtype == torch.uint8,
        REFERENCES=references,
        COTANGENTS=cotangents is not None,
        PARTS=parts,
        **(sizes | {"BLOCK_D": block}),
    )
    return out


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
    codes = values.dtype == torch.uint8
    header, origin, mean = (
        torch.empty(n, dtype=torch.float64, device=values.device) for n in (5, d, d)
    )
    norms = torch.empty(count, dtype=torch.float32, device=values.device)
    sizes = {"GROUP": 16, "BLOCK_D": min(256, triton.next_power_of_2(d))}
    origin_kernel[triton.cdiv(d, sizes["BLOCK_D"]),](
        values, table, header, origin, mean, count, d, CODES=codes, **sizes
    )
    found = Operands(header, origin, mean, norms, norms)
    rows = split(values, table, found, reference_parts(values.dtype, d), references=True)
    summarise_kernel[triton.cdiv(count, 1024),](
        rows.norms, rows.marks[1], header, norms, count, BLOCK=1024, GROUP=16
    )
    return replace(found, parts=rows.parts)


def count_equal(values: Tensor) -> Tensor:
    """How many of a sample of values (N, d) equal another, as summarise_kernel counts them."""
    count = min(len(values), SAMPLE.value)
    rows = values[torch.arange(count, device=values.device) * len(values) // count]
    # A number that is the same for equal rows and hardly else.
    factors = torch.arange(values.shape[1], device=values.device) * 40503 % 65521 + 1
    ordered = (rows.double() * factors).sum(1).sort().values
    return (ordered[1:] == ordered[:-1]).sum()
