# SPDX-License-Identifier: Apache-2.0
"""References and queries as the tensor cores read them, y = (x0 − origin)/unit, in two ways.

8-bit codes: unit is the step of their grid, y = code − 128. Floats: unit is 1, the origin a point
amid the data. With x' = (x − origin)/unit

    s_j / unit² = ‖x'‖² + t²/unit² + ‖y_j‖² − 2 x'·y_j

- Digits, for distances: integers of 8 bits whose products are summed exactly. A row is a whole
  multiple of a step of its own, 2⁻²³ of its largest element, plus what that leaves, which is known;
  the multiple is three digits, first · 2¹⁶ + second · 2⁸ + third. Codes are one digit.
- Sums of bfloat16 parts, for what is weighted and for the one pass (fused.py). Codes are exact in
  one part; each part of a float holds 8 bits of it. Under the interpreter, whose products of
  bfloat16 are wrong, the parts are rounded to bfloat16 all the same and held in float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from pfgm_kernels.backends.triton.configurations import INTERPRETED, blocks
from pfgm_kernels.backends.triton.copies import count_copies, crowded, room_for_copies
from pfgm_kernels.backends.triton.digits import CODE_ORIGIN, last_digit, load_centred, multiple
from pfgm_kernels.backends.triton.launch import Kernel
from pfgm_kernels.backends.triton.maths import load_values, round_to_bfloat16

PART = torch.float32 if INTERPRETED else torch.bfloat16
DIM_MULTIPLE = 64  # rows are padded to this many columns, with zeros
FUSED_MAX_DIM = 128  # columns up to which queries take one pass (fused.py)
MEAN_SAMPLE = tl.constexpr(256)  # references whose mean is that of all, nearly


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
    header_ptr,  # (7,) float64
    origin_ptr,  # (d,) float64
    mean_ptr,  # (d,) float64, but for REFERENCES
    x_ptr,  # (rows, d) queries, for COTANGENTS as the next two
    g_m_ptr,  # (rows,) float64
    product_ptr,  # (rows,) float64 g·v
    parts_ptr,  # (PARTS, rows, width)
    digits_ptr,  # (DIGITS, rows, width) int8
    steps_ptr,  # (rows,) float64, for three DIGITS
    norms_ptr,  # (rows,) float64
    marks_ptr,  # (3, rows) float64
    copies_ptr,  # of room_for_copies, for REFERENCES
    slots,
    rows,
    d,
    width,
    CODES: tl.constexpr,
    REFERENCES: tl.constexpr,
    COTANGENTS: tl.constexpr,
    PARTS: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Parts, digits and ‖y‖² of BLOCK_R rows, and marks: of a query what digits, and what parts,
    leave of its product with the mean of the references, an error that all of its products would
    share; of both, third, the norm of what digits leave; of a cotangent, y = g, what parts leave of
    that product and (g_m − g·v + g·(origin − x))/unit, in two parts as float32 holds it.
    References are counted, see count_copies.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    norm = tl.zeros((BLOCK_R,), tl.float64)
    early = tl.zeros((BLOCK_R,), tl.float64)
    mark = tl.zeros((BLOCK_R,), tl.float64)
    shift = tl.zeros((BLOCK_R,), tl.float64)
    rest_norm = tl.zeros((BLOCK_R,), tl.float64)
    step = tl.full((BLOCK_R,), 1, tl.float64)
    if DIGITS == 3:
        largest = tl.zeros((BLOCK_R,), tl.float64)
        for first in range(0, d, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D)
            mask = (row < rows)[:, None] & (column < d)[None, :]
            index = row[:, None] * d + column[None, :]
            y = load_centred(
                *(values_ptr, table_ptr, header_ptr, origin_ptr, index, mask, column, d),
                *(CODES, REFERENCES, COTANGENTS),
            )
            largest = tl.maximum(largest, tl.max(tl.abs(y), 1))
        step = tl.where(largest > 0, largest / 8323072, 1.0)
        tl.store(steps_ptr + row, step, mask=row < rows)
    for first in range(0, width, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        mask = (row < rows)[:, None] & (column < d)[None, :]
        index = row[:, None] * d + column[None, :]
        y = load_centred(
            *(values_ptr, table_ptr, header_ptr, origin_ptr, index, mask, column, d),
            *(CODES, REFERENCES, COTANGENTS),
        )
        norm += tl.sum(y * y, 1)
        if COTANGENTS:
            origin = tl.load(origin_ptr + column, mask=column < d, other=0.0)[None, :]
            x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float64)
            shift += tl.sum(y * (origin - x), 1)
        if REFERENCES:
            mark += tl.sum(y * ((column % 32768) * 40503 % 65536).to(tl.float64)[None, :], 1)
        else:
            mean = tl.load(mean_ptr + column, mask=column < d, other=0.0)[None, :]
        to = row[:, None] * width + column[None, :]
        plane = tl.cast(rows, tl.int64) * width
        stored = (row < rows)[:, None] & (column < width)[None, :]
        if DIGITS == 1:
            tl.store(digits_ptr + to, y.to(tl.int32).to(tl.int8), mask=stored)
        if DIGITS == 3:
            near = multiple(y, step[:, None])
            third, n = last_digit(near.to(tl.int32))
            second, n = last_digit(n)
            tl.store(digits_ptr + to, n.to(tl.int8), mask=stored)
            tl.store(digits_ptr + plane + to, second.to(tl.int8), mask=stored)
            tl.store(digits_ptr + 2 * plane + to, third.to(tl.int8), mask=stored)
            rest = y - near * step[:, None]
            rest_norm += tl.sum(rest * rest, 1)
            if not REFERENCES:
                early += tl.sum(rest * mean, 1)
        rest_float = y.to(tl.float32)
        for part in tl.static_range(PARTS):
            high = round_to_bfloat16(rest_float)
            rest_float -= high
            y -= high.to(tl.float64)
            tl.store(
                parts_ptr + part * plane + to, high.to(parts_ptr.dtype.element_ty), mask=stored
            )
        if not REFERENCES:
            mark += tl.sum(y * mean, 1)
    if COTANGENTS:
        own = tl.load(g_m_ptr + row, mask=row < rows, other=0.0)
        own -= tl.load(product_ptr + row, mask=row < rows, other=0.0)
        early = mark + (own + shift) / tl.load(header_ptr)
        mark = early - early.to(tl.float32).to(tl.float64)
    if REFERENCES:
        count_copies(copies_ptr, slots, norm, mark, row < rows)
    tl.store(norms_ptr + row, norm, mask=row < rows)
    tl.store(marks_ptr + row, early, mask=row < rows)
    tl.store(marks_ptr + rows + row, mark, mask=row < rows)
    tl.store(marks_ptr + 2 * rows + row, tl.sqrt(rest_norm), mask=row < rows)


@Kernel
def summarise_kernel(
    squares_ptr,  # (N,) float64 ‖y‖²
    marks_ptr,  # (3, N) float64, the second and the third of a reference
    copies_ptr,  # of count_copies, for all
    steps_ptr,  # (N,) float64, for STEPS
    header_ptr,  # this and the next are written: see Operands
    norms_ptr,
    N,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What is known of all references together, by the first program, and the norms of BLOCK."""
    count = tl.cast(N, tl.int64)
    centre = tl.load(squares_ptr) + tl.load(squares_ptr + count // 2)
    centre = (centre + tl.load(squares_ptr + count - 1)) / 3
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    squares = tl.load(squares_ptr + row, mask=row < N, other=0.0)
    tl.store(norms_ptr + row, squares - centre, mask=row < N)
    if tl.program_id(0) == 0:
        most = tl.zeros((BLOCK,), tl.float64)
        rest = tl.zeros((BLOCK,), tl.float64)
        step = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, count, BLOCK):
            row = first + tl.arange(0, BLOCK)
            squares = tl.load(squares_ptr + row, mask=row < N, other=0.0)
            most = tl.where((squares > most) | (squares != squares), squares, most)
            if STEPS:
                own = tl.load(marks_ptr + 2 * count + row, mask=row < N, other=0.0)
                rest = tl.maximum(rest, own)
                step = tl.maximum(step, tl.load(steps_ptr + row, mask=row < N, other=0.0))
        worst = tl.sum(tl.where(most != most, most, 0.0), 0)  # NaN, which a maximum may swallow
        alike = tl.where(crowded(copies_ptr, marks_ptr + count, count), 1.0, 0.0)
        tl.store(header_ptr + 2, alike.to(tl.float64))
        tl.store(header_ptr + 3, tl.sqrt(tl.max(most, 0)) + worst)
        tl.store(header_ptr + 4, centre)
        tl.store(header_ptr + 5, tl.max(rest, 0))
        tl.store(header_ptr + 6, tl.max(step, 0))


@dataclass(frozen=True)
class Operands:
    """What `prepare` makes of N references of dimension d; all on their device."""

    header: Tensor
    """(7,) float64: unit; ‖x0 − (origin + unit · y)‖/unit at most; whether many references are
    equal; max ‖y‖; a number amid the ‖y‖², which what follows of them is relative to; of what
    digits leave of a y the norm at most, and their largest step, 0 where y is one digit.
    """
    origin: Tensor
    """(d,) float64"""
    mean: Tensor
    """(d,) float64: of a sample of the y"""
    norms: Tensor
    """(N,) float64"""
    parts: Tensor
    """(parts, N, width), of which two passes read two at most"""
    digits: Tensor
    """(digits, N, width) int8"""
    steps: Tensor
    """(N,) float64, none where y is one digit"""

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def of(self, references: slice) -> Operands:
        return replace(
            self,
            norms=self.norms[references],
            parts=self.parts[:, references],
            digits=self.digits[:, references],
            steps=self.steps[references],
        )


@dataclass(frozen=True)
class Split:
    """Rows as the tensor cores read them; see split_kernel."""

    parts: Tensor
    """(parts, rows, width)"""
    digits: Tensor
    """(digits, rows, width) int8"""
    steps: Tensor
    """(rows,) float64, of three digits"""
    norms: Tensor
    """(rows,) float64 ‖y‖²"""
    marks: Tensor
    """(3, rows) float64"""


def split(
    values: Tensor,
    table: Tensor,
    operands: Operands,
    parts: int,
    digits: int,
    copies: Tensor | None = None,
    cotangents: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Split:
    """Of queries (rows, d), of the references that the operands are being made of, whose copies are
    counted, or of cotangents with x, g_m and g·v.
    """
    rows, d = values.shape
    empty = functools.partial(torch.empty, dtype=torch.float64, device=values.device)
    out = Split(
        empty(parts, rows, padded(d), dtype=PART),
        empty(digits, rows, padded(d), dtype=torch.int8),
        empty(rows if digits > 1 else 0),
        empty(rows),
        empty(3, rows),
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
        out.digits,
        out.steps,
        out.norms,
        out.marks,
        out.norms if copies is None else copies,
        0 if copies is None else len(copies) // 2 - 1,
        rows,
        d,
        padded(d),
        CODES=values.dtype == torch.uint8,
        REFERENCES=copies is not None,
        COTANGENTS=cotangents is not None,
        PARTS=parts,
        DIGITS=digits,
        **(sizes | {"BLOCK_D": block}),
    )
    return out


def reference_parts(dtype: torch.dtype, d: int) -> int:
    """Codes are exact in one part, two do for two passes, and the one pass reads three."""
    return 1 if dtype == torch.uint8 else 3 if d <= FUSED_MAX_DIM else 2


def padded(d: int) -> int:
    return triton.cdiv(d, DIM_MULTIPLE) * DIM_MULTIPLE


def bytes_per_reference(d: int) -> int:
    """Of the operands of float32 references, with what making them takes."""
    return (2 * reference_parts(torch.float32, d) + 3) * padded(d) + 80


def prepare(values: Tensor, table: Tensor) -> Operands:
    """Operands of values (N, d) float32, or uint8 codes into table."""
    count, d = values.shape
    codes = values.dtype == torch.uint8
    header, origin, mean = (
        torch.empty(n, dtype=torch.float64, device=values.device) for n in (7, d, d)
    )
    norms = torch.empty(count, dtype=torch.float64, device=values.device)
    sizes = {"GROUP": 16, "BLOCK_D": min(256, triton.next_power_of_2(d))}
    origin_kernel[triton.cdiv(d, sizes["BLOCK_D"]),](
        values, table, header, origin, mean, count, d, CODES=codes, **sizes
    )
    found = Operands(header, origin, mean, norms, norms, norms, norms)
    parts, digits = reference_parts(values.dtype, d), 1 if codes else 3
    copies = room_for_copies(count, values.device)
    rows = split(values, table, found, parts, digits, copies)
    summarise_kernel[triton.cdiv(count, 1024),](
        *(rows.norms, rows.marks, copies, rows.steps, header, norms, count),
        STEPS=digits > 1,
        BLOCK=1024,
    )
    return replace(found, parts=rows.parts, digits=rows.digits, steps=rows.steps)
