# SPDX-License-Identifier: Apache-2.0
"""Do the CUDA backend's direct differences, in float32 and in float64, hold at the edges of their
tiles, in all their variants?
"""

from __future__ import annotations

import math

import pytest
import torch
from oracle import Truth, assert_log_mass, differentiate, solve
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

SINGLE, DOUBLE = 3e-7, 1e-11  # both far inside the contract

# d, B, N, D, codes. Kernels are made for 2, 4, 8, 16, 24 and 32 columns. A block has 512, 256 or
# 128 queries; where there are fewer, up to 32 lanes share one. References come in tiles of 128, in
# chunks of 32, in runs of 16, in parts of four tiles at least.
SINGLE_SHAPES = [
    (1, 1, 1, 1, False),
    (2, 1, 1025, 0, False),
    (2, 513, 33, 1, False),
    (3, 17, 600, 37, False),  # the highest power of the forward pass
    (3, 5, 513, 38, False),  # and beyond it
    (4, 255, 129, 2.5, False),
    (4, 9, 140, 1, True),
    (5, 257, 31, 1, False),
    (8, 63, 127, math.inf, False),
    (9, 33, 128, 3, False),
    (16, 129, 257, 1, False),
    (17, 2, 2000, math.inf, False),
    (23, 127, 17, 1, True),
    (24, 4, 385, 0.5, False),
    (25, 3, 511, 1, False),
    (32, 130, 130, 1, False),
    (32, 7, 300, math.inf, True),
]
# References are looked for 1,024 at a time and weighed 256 at a time, by 1, 4 or 32 lanes each; a
# thread has one column of up to 128, or several; few queries are done in several parts, and of many
# a block does several (on the emulator of more than 64).
DOUBLE_SHAPES = [
    (1, 1, 1, 1, "float64"),
    (1, 2, 2049, 0, "float32"),
    (3, 17, 255, 1, "float64"),
    (2, 130, 40, 1, "float32"),
    (8, 3, 1025, math.inf, "float64"),
    (9, 1, 3100, 2.5, "uint8"),
    (32, 40, 257, 1, "float32"),
    (33, 5, 256, math.inf, "float32"),
    (128, 2, 1024, 1, "uint8"),
    (129, 15, 300, 1, "float64"),
    (257, 4, 1100, 1e4, "float64"),
    (600, 3, 70, 1, "float32"),
    (600_000, 2, 2, 1, "float32"),  # no memory for more than one part of one query
]


def problem(
    d: int, B: int, N: int, D: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, t, values, table: noise, of whose references many share the weight of a query."""
    generator = torch.Generator().manual_seed(1000 * d + B + N)
    table, deviation = torch.empty(0), 1.0
    values = torch.randn(N, d, generator=generator, dtype=torch.float64).to(dtype)
    if dtype == torch.uint8:
        values = torch.randint(0, 256, (N, d), generator=generator, dtype=torch.uint8)
        table, deviation = torch.linspace(-1, 1, 256), 2 / math.sqrt(12)
    x = deviation * torch.randn(B, d, generator=generator)
    k = 1 if math.isinf(D) else d + D
    t = deviation * math.sqrt(k * math.sqrt(2 * d)) * torch.linspace(0.5, 2, B).double()
    return x, t, values, table


def decoded(values: Tensor, table: Tensor) -> Tensor:
    return table[values.long()] if values.dtype == torch.uint8 else values


def forward(x: Tensor, t: Tensor, values: Tensor, table: Tensor, D: float) -> tuple[Tensor, ...]:
    x, t, values, table = (a.to(DEVICE) for a in (x, t, values, table))
    operands = cuda.prepare(values, table, 1 << 28)
    return tuple(a.cpu() for a in cuda.forward(x, t, values, table, operands, x.shape[1] + D))


def backward(
    x: Tensor, t: Tensor, values: Tensor, table: Tensor, D: float, g: Tensor, g_m: Tensor
) -> tuple[Tensor, ...]:
    """dx, dt, and the references' gradient but for codes."""
    x, t, values, table, g, g_m = (a.to(DEVICE) for a in (x, t, values, table, g, g_m))
    operands = cuda.prepare(values, table, 1 << 28)
    v, _, anchor, log_weight = cuda.forward(x, t, values, table, operands, x.shape[1] + D)
    stored = Stored(values, table, anchor)
    residual = (v - (stored.decode() - x)).to(x.dtype)
    rows = Rows(x, t, residual, stored, log_weight, x.shape[1] + D)
    results: list[Tensor] = []
    # With and without gradients of the references other kernels run.
    for values_grad in sorted({False, values.dtype != torch.uint8}):
        cotangents = cuda.begin(rows, Output("displacement", 0.0, 1.0), g.to(x.dtype), g_m)
        dvalues = cuda.backward(rows, values, table, operands, cotangents, values_grad)
        if not (values_grad and x.dtype == torch.float32):
            results = [cotangents.dx, cotangents.dt]
    return tuple(a.cpu() for a in (*results, dvalues) if a is not None)


def assert_values(out: tuple[Tensor, ...], truth: Truth, tolerance: float) -> None:
    v, log_mass, anchor, anchor_log_weight = out
    scale = (truth.term_weights(tolerance) * truth.distances).sum(1)
    assert ((v - truth.v).norm(dim=1) <= tolerance * scale).all()
    assert_log_mass(log_mass, truth)
    log_weights = truth.weights.gather(1, anchor[:, None])[:, 0].log()
    torch.testing.assert_close(anchor_log_weight, log_weights, rtol=tolerance, atol=tolerance)
    assert torch.equal(truth.distances.gather(1, anchor[:, None])[:, 0], truth.distances.amin(1))


def assert_gradients(problem: tuple[Tensor, ...], D: float, tolerance: float) -> None:
    x, t, values, table = problem
    generator = torch.Generator().manual_seed(len(x))
    g = torch.randn(*x.shape, generator=generator).double()
    g_m = torch.randn(len(x), generator=generator, dtype=torch.float64)
    x0 = decoded(values, table)
    truth = differentiate(solve(x, t, x0, D), x, x0, g, g_m, D)
    dx, dt, *dvalues = backward(*problem, D, g, g_m)
    assert ((dx - truth.dx).norm(dim=1) <= tolerance * truth.dx_terms.norm(dim=1)).all()
    assert ((dt - truth.dt).abs() <= tolerance * truth.dt_terms).all()
    for dx0 in dvalues:
        assert dx0.dtype == values.dtype
        rounding = 2.0**-23 if dx0.dtype == torch.float32 else 0.0
        allowed = tolerance * truth.dx0_terms.norm(dim=1) + rounding * truth.dx0.norm(dim=1)
        assert ((dx0 - truth.dx0).norm(dim=1) <= allowed).all()


@pytest.mark.parametrize(("d", "B", "N", "D", "codes"), SINGLE_SHAPES)
def test_in_single_precision(d, B, N, D, codes):
    problem_ = problem(d, B, N, D, torch.uint8 if codes else torch.float32)
    truth = solve(problem_[0], problem_[1], decoded(*problem_[2:]), D)
    out = forward(*problem_, D)
    assert_values(out, truth, SINGLE)
    if N > 100:
        assert ((out[0] - truth.v).norm(dim=1) > DOUBLE * truth.v.norm(dim=1)).any()
    assert_gradients(problem_, D, 1e-6)


@pytest.mark.parametrize(("d", "B", "N", "D", "dtype"), DOUBLE_SHAPES)
def test_in_double_precision(d, B, N, D, dtype):
    x, t, values, table = problem(d, B, N, D, getattr(torch, dtype))
    x = x.double() + 1e-9
    assert_values(forward(x, t, values, table, D), solve(x, t, decoded(values, table), D), DOUBLE)
    assert_gradients((x, t, values, table), D, DOUBLE)


def test_ranges_of_references():
    """Some have none: what a block takes next must not run ahead of it."""
    x, t, values, table = (a.to(DEVICE) for a in problem(9, 120, 2500, 1, torch.float32))
    x = x.double()
    query = torch.arange(120, device=DEVICE)
    sizes = query % 4
    ranges = torch.stack([15 * query, 15 * query + torch.where(sizes > 1, 50 * sizes, sizes)], 1)
    operands = cuda.prepare(values, table, 1 << 28)
    outputs = cuda.forward(x, t, values, table, operands, 10.0, ranges=ranges)
    for b, (start, end) in enumerate(ranges.tolist()):
        if start == end:
            assert outputs[0][b].eq(0).all()
            assert outputs[1][b] == -math.inf
            continue
        truth = solve(x[b : b + 1].cpu(), t[b : b + 1].cpu(), values[start:end].cpu())
        v, log_mass, anchor, log_weight = (out[b : b + 1].cpu() for out in outputs)
        assert_values((v, log_mass, anchor - start, log_weight), truth, DOUBLE)


def is_exact(x: Tensor, t: Tensor, values: Tensor, D: float) -> bool:
    """Whether the queries were left to float64."""
    truth = solve(x, t, values, D)
    v, log_mass = forward(x, t, values, torch.empty(0), D)[:2]
    assert_log_mass(log_mass, truth)
    scale = (truth.term_weights(DOUBLE) * truth.distances).sum(1)
    return bool(((v - truth.v).norm(dim=1) <= DOUBLE * scale).all())


@pytest.mark.parametrize(("offset", "scale", "D"), [(1000, 0.01, math.inf), (0, 1e-30, 1)])
def test_what_single_precision_does_not_hold_is_exact(offset, scale, D):
    x, t, values, _ = problem(3, 21, 2500, D, torch.float32)
    assert not is_exact(x, t, values, D)
    x = values[:21] + offset
    assert is_exact(x, scale * t, values, D)


def test_a_crowd_is_exact():
    """Equal references err alike: what would do for others does not for them."""
    x, _, values, _ = problem(3, 21, 2500, 20, torch.float32)
    half_k, reach = 23 / 2, 6.5  # reach is half_k ‖x − x0‖²/s of the nearest reference
    for crowd in (False, True):
        if crowd:
            values[4:] = values[0]
        nearest = torch.cdist(x.double(), values.double()).amin(1)
        assert is_exact(x, nearest * math.sqrt(half_k / reach - 1), values, 20) == crowd


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_of_equal_references_is_the_anchor(dtype):
    x, t, values, table = problem(5, 3, 1, 1, dtype)
    x = x.to(dtype)
    assert forward(x, t, values.expand(3000, -1).contiguous(), table, 1)[2].eq(0).all()


def test_results_are_the_same_every_time():
    for d, dtype in ((3, torch.float32), (40, torch.float64)):
        x, t, values, table = problem(d, 7, 1100, 1, dtype)
        g, g_m = torch.ones_like(x).double(), torch.ones_like(t)
        arguments = x.to(dtype), t, values, table, 1
        for first, again in zip(forward(*arguments), forward(*arguments), strict=True):
            assert torch.equal(first, again)
        first, again = (backward(*arguments, g, g_m) for _ in range(2))
        assert all(map(torch.equal, first, again))
