# SPDX-License-Identifier: Apache-2.0
"""Do the two passes of the CUDA backend hold at the edges of their tiles, in all their variants?"""

from __future__ import annotations

import math
import os

import pytest
import torch
from oracle import Truth, assert_gradients, assert_log_mass, differentiate, solve
from torch import Tensor

from pfgm_kernels.backends import cuda
from pfgm_kernels.outputs import Output
from pfgm_kernels.rows import Rows, Stored

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = cuda.unsupported_reason(DEVICE)
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"cuda: {REASON}"),
    pytest.mark.usefixtures("poison"),
]

# d, B, N, codes, D: tiles are 128 queries by 128 references or columns, 32 terms at a time, and
# references are weighed 256 at a time. Floats have three parts where d ≤ 128, queries with codes
# then, too.
SHAPES = [
    (33, 1, 1, False, 1),
    (33, 2, 257, False, math.inf),
    (64, 127, 128, False, 1),
    (65, 129, 129, False, 1),
    (128, 3, 1025, False, 3),
    (129, 66, 257, False, math.inf),
    (192, 128, 127, False, 1),
    (64, 5, 256, True, math.inf),
    (127, 130, 130, True, 1),
    (193, 33, 513, True, 1),
]
TOLERANCE = 1e-6  # stricter than the contract for normal data, 5e-6
EXACT = 1e-9  # where products take no part


def problem(d: int, B: int, N: int, codes: bool, D: float = 1) -> tuple[Tensor, ...]:
    """x, t, values, table: noise, of whose references many share the weight of a query."""
    generator = torch.Generator().manual_seed(d * B + N)
    if codes:
        values = torch.randint(0, 256, (N, d), generator=generator, dtype=torch.uint8)
        table, deviation = torch.linspace(-1, 1, 256), 2 / math.sqrt(12)
    else:
        values, table, deviation = torch.randn(N, d, generator=generator), torch.empty(0), 1.0
    x = deviation * torch.randn(B, d, generator=generator)
    k = 1 if math.isinf(D) else d + D
    t = deviation * math.sqrt(k * math.sqrt(2 * d)) * torch.linspace(1, 2, B).double()
    return x, t, values, table


def run(
    x: Tensor, t: Tensor, values: Tensor, table: Tensor, D: float = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """v and log_mass, and with cotangents of ones dx and dt."""
    x, t, values, table = (a.to(DEVICE) for a in (x, t, values, table))
    k = x.shape[1] + D
    operands = cuda.prepare(values, table, 1 << 28)
    v, log_mass, anchor, anchor_log_weight = cuda.forward(x, t, values, table, operands, k)
    stored = Stored(values, table, anchor)
    rows = Rows(x, t, (v - (stored.decode() - x)).float(), stored, anchor_log_weight, k)
    cotangents = cuda.begin(rows, Output("displacement", 0.0, 1.0), torch.ones_like(x), t**0)
    cuda.backward(rows, values, table, operands, cotangents, False)
    return v.cpu(), log_mass.cpu(), cotangents.dx.cpu(), cotangents.dt.cpu()


def decoded(values: Tensor, table: Tensor) -> Tensor:
    return table[values.long()] if values.dtype == torch.uint8 else values


def errors(v: Tensor, truth: Truth) -> Tensor:
    scale = (truth.term_weights(TOLERANCE) * truth.distances).sum(1)
    return (v - truth.v).norm(dim=1) / scale


@pytest.mark.parametrize(("d", "B", "N", "codes", "D"), SHAPES)
def test_values_and_gradients(d, B, N, codes, D):
    x, t, values, table = problem(d, B, N, codes, D)
    x0 = decoded(values, table)
    truth = solve(x, t, x0, D)
    v, log_mass, dx, dt = run(x, t, values, table, D)
    assert (errors(v, truth) <= TOLERANCE).all()
    assert_log_mass(log_mass, truth)
    gradients = differentiate(truth, x, x0, torch.ones(B, d), torch.ones(B).double(), D)
    assert_gradients(gradients, dx, dt)
    if N > 1:
        assert truth.effective_sample_size.max() > 64
        assert (errors(v, truth) > EXACT).any(), "the products took no part"


@pytest.mark.exhaustive
@pytest.mark.skipif(
    (os.environ.get("PFGM_EMULATION") or "plain") != "plain", reason="a search takes minutes for it"
)
def test_more_groups_than_a_block_lists_at_a_time():
    x, t, values, table = problem(33, 2, 66_000, True)
    operands = cuda.prepare(values.to(DEVICE), table.to(DEVICE), 1 << 28)
    arguments = (a.to(DEVICE) for a in (x, t, values, table))
    v, log_mass, _, _ = cuda.forward(*arguments, operands, 34)
    truth = solve(x, t, decoded(values, table))
    assert (errors(v.cpu(), truth) <= TOLERANCE).all()
    assert_log_mass(log_mass.cpu(), truth)


@pytest.mark.parametrize("name", ["equal references", "far queries", "few candidates"])
def test_what_products_are_not_certain_for_is_exact(name):
    x, t, values, table = problem(100, 9, 400, False)
    if name == "equal references":
        values[100:] = values[0]
    elif name == "far queries":
        x, t = 1e5 * x, 100 * t
    else:
        x, t = values[:9] + x / 100, t / 100
    truth = solve(x, t, values)
    v, log_mass, _, _ = run(x, t, values, table)
    assert (errors(v, truth) <= EXACT).all()
    assert_log_mass(log_mass, truth)


@pytest.mark.parametrize(("d", "scale"), [(70, 1e-12), (200, 1e-12), (70, 1e12), (200, 1e20)])
def test_scale(d, scale):
    x, t, values, table = problem(d, 40, 300, False)
    x, t, values = scale * x, scale * t, scale * values + scale * 100
    x = x + scale * 100
    truth = solve(x, t, values)
    v, log_mass, _, _ = run(x, t, values, table)
    assert (errors(v, truth) <= TOLERANCE).all()
    assert_log_mass(log_mass, truth)


def test_results_are_the_same_every_time():
    arguments = problem(65, 129, 300, False)
    for first, again in zip(run(*arguments), run(*arguments), strict=True):
        assert torch.equal(first, again)


def test_operands_that_cannot_be_copied_in_chunks():
    x, t, values, table = (a.to(DEVICE) for a in problem(33, 2, 3, False))
    operands = cuda.prepare(values, table, 1 << 28)
    shifted = torch.empty(operands[4].numel() + 1, dtype=torch.bfloat16, device=DEVICE)[1:]
    operands[4] = shifted.view(operands[4].shape).copy_(operands[4])
    with pytest.raises(ValueError, match="aligned"):
        cuda.forward(x, t, values, table, operands, 34)


@pytest.mark.parametrize("d", [33, 64, 129])
def test_operands_of_floats(d):
    values = 3 + torch.randn(300, d, generator=torch.Generator().manual_seed(d))
    operands = cuda.prepare(values.to(DEVICE), torch.empty(0, device=DEVICE), 1 << 28)
    header, origin, mean, squares, parts = (a.cpu() for a in operands)
    y = values.double() - origin
    assert header[:3].tolist() == [1, 0, 0]
    assert mean.eq(0).all()
    assert (origin - values.double().mean(0)).abs().max() < 1
    assert parts[:, :, d:].eq(0).all()
    error = (parts[:, :, :d].double().sum(0) - y).abs()
    assert (error <= y.abs() * (2.0**-24 + (0 if len(parts) == 3 else 2.0**-17))).all()
    norms = y.square().sum(1)
    torch.testing.assert_close(header[3], norms.max().sqrt())
    torch.testing.assert_close(squares.double() + header[4], norms, rtol=1e-7, atol=1e-6)


def test_operands_of_codes():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (300, 70), generator=generator, dtype=torch.uint8)
    values[4:12] = values[3]
    table = torch.linspace(-1, 3, 256)
    operands = cuda.prepare(values.to(DEVICE), table.to(DEVICE), 1 << 28)
    header, origin, mean, squares, parts = (a.cpu() for a in operands)
    y = values.double() - 128
    assert parts.shape == (1, 300, 128)
    assert torch.equal(parts[0, :, :70].double(), y)
    restored = origin + header[0] * y - table[values.long()].double()
    assert (restored.norm(dim=1) <= header[1] * header[0] * (1 + 1e-6)).all()
    assert header[2] == 1, "eight references equal another"
    assert torch.equal(squares.double() + header[4], y.square().sum(1).float().double())
    rows = torch.arange(256) * 300 // 256
    torch.testing.assert_close(mean, y[rows].mean(0))


@pytest.mark.parametrize("copies", [7, 8])
def test_each_copy_is_counted(copies):
    """Whichever names look for a slot between it and the next."""
    generator = torch.Generator().manual_seed(copies)
    values = torch.randn(8, 2500, 40, generator=generator)
    for each in values:
        rows = torch.randperm(2500, generator=generator)
        each[rows[:copies]] = each[rows[-1]].clone()
        header, *_ = cuda.prepare(each.to(DEVICE), torch.empty(0, device=DEVICE), 1 << 28)
        assert header[2] == (copies >= 8)
