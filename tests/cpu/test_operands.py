# SPDX-License-Identifier: Apache-2.0
"""Are the operands that the CPU kernels prepare what csrc/cpu/common/operands.h says?"""

from __future__ import annotations

import math

import pytest
import torch
from cases import seeded
from oracle import assert_displacement, assert_log_mass, float32_contract, solve
from torch import Tensor

from pfgm_kernels.backends import cpu

pytest.importorskip("pfgm_kernels._C", reason="the extension is not built")
pytestmark = pytest.mark.usefixtures("poison")

NO_TABLE = torch.empty(0)
STEP = 1 / 40  # no power of two: float32 rounds the grid's values
D = 100  # two spans of 64 columns; of 300 references the sample reads a quarter of the values


def prepare(values: Tensor, table: Tensor = NO_TABLE) -> tuple[Tensor, Tensor, Tensor | None]:
    """Norms (N,), the grid (4 + d,) and codes (N, d), or None."""
    norms, grid, *codes = cpu.prepare(values, table, values.numel())
    return norms, grid, codes[0] if codes else None


def copies(values: Tensor, table: Tensor = NO_TABLE) -> float:
    """How many references are copies of one, at most; infinity: all are alike."""
    return prepare(values, table)[1][2].item()


def on_a_grid(steps: int, offset: float = 0.0, step: float = STEP) -> Tensor:
    """(300, 100) of which every value of the grid is in the sample."""
    codes = torch.randint(0, steps + 1, (300, D), generator=seeded(steps))
    return (offset + step * codes.double()).float()


def check(values: Tensor, table: Tensor = NO_TABLE) -> bool:
    """That y = (x0 − origin)/unit is what norms and codes say; returns whether there are codes."""
    norms, grid, codes = prepare(values, table)
    unit, deviation, _, zero = grid[:4].tolist()
    origin = grid[4:]
    if len(table):
        codes, values = (values if deviation >= 0 else None), table[values.long()]
    if codes is None:
        assert (unit, deviation) == (1, -1)
        assert torch.equal(origin, origin.float().double())
        y = (values - origin).float().double()
        torch.testing.assert_close(norms, y.square().sum(1), rtol=1e-11, atol=0)
        return False
    origin_codes = ((origin - zero) / unit).round()
    # A point of the grid, but for what rounding moves the values by on average.
    rounding = values.abs().max().item() * 2**-24
    torch.testing.assert_close(zero + unit * origin_codes, origin, rtol=0, atol=1e-12 + rounding)
    y = codes - origin_codes
    assert torch.equal(norms, y.square().sum(1))
    off = ((values - origin) / unit - y).norm(dim=1)
    assert (off <= deviation).all()
    # What is off the grid is a rounding, beside the range.
    assert deviation <= 255 * math.sqrt(values.shape[1]) * 2**-20
    return True


@pytest.mark.parametrize("offset", [0.0, -3.0])
@pytest.mark.parametrize(
    ("steps", "step"), [(1, 1.0), (2, 0.5), (100, STEP), (254, STEP), (255, STEP)]
)
def test_a_grid(steps, step, offset):
    assert check(on_a_grid(steps, offset, step))


def test_more_steps_than_codes():
    assert not check(on_a_grid(256))
    assert not check(on_a_grid(257))


@pytest.mark.parametrize("row", [1, 299])
@pytest.mark.parametrize("column", [0, 63, 64, 99])
@pytest.mark.parametrize(
    ("position", "coded"),
    [(-155, True), (255, True), (-156, False), (256, False), (-400, False), (10.5, False)],
)
def test_one_value_elsewhere(row, column, position, coded):
    """Beside 101 codes, which get the middle of 256; there is room for 256 wherever they lie."""
    values = on_a_grid(100, -1.25)
    values[row, column] = -1.25 + STEP * position
    assert check(values) is coded


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("row", [0, 1, 299])
def test_a_value_that_is_not_finite(value, row):
    for values in (on_a_grid(100), torch.randn(300, D, generator=seeded())):
        values[row, 7] = value
        norms, grid, codes = prepare(values)
        assert codes is None
        assert grid[1] == -1
        assert norms[row].isnan()


def test_a_grid_that_is_not_fine_enough_for_float32():
    """Far from zero the values are off it by more than a rounding of their range."""
    assert not check(on_a_grid(100, 1000.0))


def test_equal_values():
    assert not check(torch.full((300, D), 0.3))


@pytest.mark.parametrize("shape", [(1, 257), (1100, 25), (65, 4_200), (3, 100_000)])
def test_shapes(shape):
    """Norms of many columns exceed what 32 bits hold."""
    codes = torch.tensor([0, 0, 255], dtype=torch.uint8)[torch.arange(shape[0]) % 3]
    assert check(codes[:, None].expand(shape).contiguous(), torch.arange(256).float())
    check(torch.randn(shape, generator=seeded()))


@pytest.mark.parametrize(
    ("low", "high", "even"), [(-1, 1, True), (0, 255, True), (1000, 1001, False)]
)
def test_a_table(low, high, even):
    table = (low + (high - low) * torch.arange(256).double() / 255).float()
    codes = torch.randint(0, 256, (300, D), dtype=torch.uint8, generator=seeded())
    assert check(codes, table) is even


@pytest.mark.parametrize("entry", [0, 100, 200, 255])
def test_an_uneven_table(entry):
    table = torch.arange(256).float()
    table[entry] += 0.25
    codes = torch.randint(0, 256, (300, D), dtype=torch.uint8, generator=seeded())
    assert not check(codes, table)


def test_the_origin_lies_amid_the_data():
    for values in (1000 + torch.randn(300, D, generator=seeded()), on_a_grid(100, 5.0)):
        _, grid, _ = prepare(values)
        assert (grid[4:] - values.double().mean(0)).norm() < 0.5 * values.std() * math.sqrt(D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_crowds(dtype):
    """Eight copies among the 1,024 rows that are looked at, wherever they lie."""
    table = torch.arange(256).float() if dtype == torch.uint8 else NO_TABLE
    for count in (40, 3000):
        values = torch.randint(0, 256, (count, D), generator=seeded()).to(dtype)
        assert copies(values, table) == 1
        values[-count // 4 :] = values[-1].clone()
        assert copies(values, table) == math.inf
        values[-count // 4 :, 0] += torch.arange(count - count * 3 // 4).to(dtype)
        # Of 3,000 codes some are equal again, and floats lie off the grid then.
        assert copies(values, table) == (math.inf if count == 3000 else 1)


@pytest.mark.parametrize("count", [3, 5000])
@pytest.mark.parametrize(("values", "alike"), [(3, True), (32, True), (40, False)])
def test_few_values(values, alike, count):
    """Up to 32 among a thousand that are looked at."""
    table = torch.randn(values, generator=seeded())
    drawn = torch.randint(0, values, (count, D), generator=seeded(1))
    assert math.isinf(copies(table[drawn])) == alike


@pytest.mark.parametrize(("apart", "alike"), [(0, True), (1e-7, True), (3e-4, True), (1e-2, False)])
def test_two_that_coincide_among_few(apart, alike):
    values = torch.randn(60, D, generator=seeded())
    assert copies(values) == 1
    values[7] = values[41] * (1 + apart)
    assert math.isinf(copies(values)) == alike


@pytest.mark.parametrize("d", [3, 16, 40, 300])
def test_values_of_an_uneven_table(d):
    """No caller has one so far, but all kernels read any."""
    table = torch.arange(256).float() / 64
    table[7::2] += 0.1
    codes = torch.randint(0, 256, (300, d), dtype=torch.uint8, generator=seeded(d))
    codes[:, d // 2 :] //= 4  # the middles of columns differ
    x0 = table[codes.long()]
    x = x0[:40] + torch.randn(40, d, generator=seeded(1))
    t = math.sqrt(d) * torch.tensor([0.01, 0.3, 1, 3, 10]).double().repeat(8)
    operands = cpu.prepare(codes, table, codes.numel())
    v, log_mass, anchor, _ = cpu.forward(x, t, codes, table, operands, d + 1.0)
    expected = solve(x, t, x0)
    assert_displacement(v, expected, float32_contract("cpu"))
    assert_log_mass(log_mass, expected)
    assert torch.equal(anchor[:2], expected.distances.argmin(1)[:2])


@pytest.mark.parametrize("count", [1000, 70000])  # which are counted in parts
@pytest.mark.parametrize("d", [25, 70])
def test_copies_are_counted(count, d):
    """Wherever they are: what a sample sees of them is another matter."""
    values = torch.randn(count, d, generator=seeded())
    assert copies(values) == 1
    # Of equal norms, about zero; the middle of the two that lie apart is that of a sample.
    assert copies(torch.nn.functional.normalize(torch.cat([values, -values]), dim=1)) == 1
    for seed in range(6):
        rows = torch.randperm(count, generator=seeded(seed))[: 2 + seed]
        assert copies(values.index_copy(0, rows, values[rows[:1]].expand(len(rows), d))) == 2 + seed


def test_what_roundings_tell_apart_counts_as_copies():
    values = torch.randn(8000, 64, generator=seeded())
    values[700:740] = values[700] * (1 + 1e-7 * torch.randn(40, 64, generator=seeded(1)))
    assert 20 <= copies(values) <= 40


def test_rows_along_a_line_are_no_copies():
    values = torch.linspace(-1, 1, 1000)[:, None] * torch.randn(64, generator=seeded())
    assert copies(values) == 1


def test_neighbours_on_a_curve_are_no_crowd():
    """What near ones have in common is the columns that are constant."""
    angle = torch.linspace(0, 6, 1000)
    curve = torch.stack([torch.cos(angle), torch.sin(2 * angle), angle], 1)
    values = torch.cat([curve, torch.full((1000, 37), 0.3)], 1)
    assert copies(values) == 1
