# SPDX-License-Identifier: Apache-2.0
"""Do the parts of the Triton backend keep what its two passes rely on?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import build, truth
from contracted import contracted
from oracle import assert_displacement, assert_log_mass, float32_contract, solve

from pfgm_kernels import ReferenceSet, poisson_displacement, proof
from pfgm_kernels.backends import triton as backend
from pfgm_kernels.flow import perturb
from pfgm_kernels.problems import Family, problems

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = backend.unsupported_reason(DEVICE)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

if REASON is None:
    import triton
    import triton.language as tl

    from pfgm_kernels.backends.triton import call, fused, maths, operands, products
    from pfgm_kernels.backends.triton.call import Call, Screen, compare, distances
    from pfgm_kernels.backends.triton.configurations import INTERPRETED
    from pfgm_kernels.backends.triton.forward_pass import empty_outputs
    from pfgm_kernels.backends.triton.launch import Kernel

    @triton.jit
    def apply_kernel(v_ptr, out_ptr, N, WHICH: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        v = tl.load(v_ptr + i, mask=i < N, other=0.0)
        if WHICH == "log1p":
            out = maths.log1p_float(v)
        elif WHICH == "contract":
            out = v * v - (1.0 + 2.0**-11)
        else:
            out = maths.round_to_bfloat16(v)
        tl.store(out_ptr + i, out, mask=i < N)

    def apply(which: str, v: torch.Tensor) -> torch.Tensor:
        v = v.to(DEVICE)
        out = torch.full_like(v, math.nan)
        apply_kernel[1,](v, out, len(v), WHICH=which, BLOCK=triton.next_power_of_2(len(v)))
        return out.cpu()


def test_log1p_is_good_to_two_units_in_the_last_place(generator):
    scales = 10 ** torch.linspace(-9, 29, 4000, dtype=torch.float64)
    u = (scales * (1 + torch.rand(4000, generator=generator))).float()
    small = -(2 ** -torch.linspace(1, 24, 90)).float()
    u = torch.cat([u, small, torch.zeros(1)])
    exact = u.double().log1p()
    error = (apply("log1p", u).double() - exact).abs()
    assert (error <= 2 * 2**-24 * exact.abs() + 1e-45).all(), (error / exact.abs()).max()


def test_rounding_to_bfloat16_is_torchs(generator):
    v = torch.randn(4000, generator=generator) * 10 ** torch.randint(-30, 30, (4000,)).float()
    ties = torch.arange(1, 64) / 2**8 + 1  # half of them lie midway between two bfloat16
    v = torch.cat([v, ties, -ties, torch.tensor([0.0, math.inf, -math.inf, math.nan])])
    assert torch.equal(apply("round", v).nan_to_num(7), v.bfloat16().float().nan_to_num(7))


@pytest.mark.parametrize(("count", "d"), [(5, 33), (130, 64), (3, 1100)])
def test_parts_hold_the_values(count, d, generator):
    """Two parts of floats hold 16 bits, one of 8-bit codes all of them; the padding is zero."""
    x0 = 100 + torch.randn(count, d, generator=generator).to(DEVICE)
    found = operands.prepare(x0, x0.new_empty(0))
    y = x0.double() - found.origin
    parts = found.parts.double()
    assert (parts[:2].sum(0)[:, :d] - y).abs().le(2**-17 * y.abs()).all()
    assert (parts[:, :, d:] == 0).all()
    squares = y.square().sum(1)
    assert (found.norms + found.header[4] - squares).abs().max() <= 1e-6 * squares.max()

    references = ReferenceSet.from_images(
        torch.randint(256, (count, d), generator=generator, dtype=torch.uint8).to(DEVICE), 2.0, 3.0
    )
    found = operands.prepare(references.values, references.table)
    decoded = found.origin + found.header[0] * found.parts[0, :, :d].double()
    exact = references.table.double()[references.values.long()]
    distance = (decoded - exact).norm(dim=1).max()
    assert distance <= found.header[1] * found.header[0] * (1 + 1e-9)
    assert found.header[1] < 1e-4 * d**0.5


@pytest.mark.parametrize("copies", [7, 8])
def test_crowds_of_equal_references_are_seen(copies, generator):
    """Each is counted, whichever names look for a slot between it and the next."""
    x0 = torch.randn(4, 2500, 40, generator=generator)
    for each in x0:
        rows = torch.randperm(2500, generator=generator)
        each[rows[:copies]] = each[rows[-1]].clone()
        prepared = operands.prepare(each.to(DEVICE), each.new_empty(0))
        assert bool(prepared.header[2]) == (copies >= 8)


def test_references_too_near_each_other_for_float_are_a_crowd():
    """Whose products round alike, though none equals another."""
    x0 = build("two clusters d=257 D=128 width=0.001").x0
    assert len(x0.unique(dim=0)) == len(x0)
    assert bool(operands.prepare(x0.to(DEVICE), x0.new_empty(0)).header[2])


def screen_of(x, t, x0, k):
    call = Call(x, t.double(), x0, x0.new_empty(0), k)
    prepared = operands.prepare(x0, call.table)
    return Screen.make(call, prepared, anchor=call.rows(0, torch.int64))


def test_the_error_of_the_products_is_within_its_bound(generator):
    """Each r_j, known to certain bounds, leaves out no reference that could carry weight."""
    d = 300
    x0 = torch.randn(400, d, generator=generator)
    x = x0[:40] + torch.logspace(-3, 1, 40)[:, None] * torch.randn(40, d, generator=generator)
    t = torch.logspace(-3, 1.5, 40)
    x, t, x0 = x.to(DEVICE), t.to(DEVICE), x0.to(DEVICE)
    screen = screen_of(x, t, x0, d + 1.0)
    weights = solve(x.cpu(), t.cpu(), x0.cpu()).weights
    heaviest = weights.max(1, keepdim=True).values
    counts = weights > heaviest * math.exp(-16) / len(x0)
    last = torch.maximum(screen.limit, screen.cut)[:, None]
    taken = (screen.r <= last).cpu()
    assert (taken | ~counts).all()
    assert (taken.sum(1) <= counts.sum(1) + 3).float().mean() > 0.5  # and hardly more than those


def test_one_pass_serves_nearly_all_queries(generator):
    x0 = torch.randn(600, 40, generator=generator)
    x = 0.2 * torch.randn(70, 40, generator=generator)  # tensor cores cut little of x·y
    call = Call(
        x.to(DEVICE), torch.ones(70).double().to(DEVICE), x0.to(DEVICE), x0.new_empty(0), 41.0
    )
    prepared = operands.prepare(call.values, call.table)
    _, left = fused.fused_forward(call, prepared, empty_outputs(call))
    assert left.sum() <= 7


@pytest.mark.parametrize("eight_bit", [False, True])
def test_flat_rows_of_images_take_the_dense_path_and_others_do_not(eight_bit, generator):
    images = torch.randint(256, (700, 3, 12, 12), generator=generator, dtype=torch.uint8)
    smooth = images.float().cumsum(2).cumsum(3)
    images = (255 * (smooth - smooth.amin()) / (smooth.amax() - smooth.amin())).to(torch.uint8)
    references = ReferenceSet.from_images(images)
    x0 = references.table[references.values.long()]
    x, t = perturb(x0[:24], M=1, restrict_M=False, generator=generator)
    x[12:] += 25 * torch.randn(12, x.shape[1], generator=generator) / math.sqrt(x.shape[1]) * 12
    t[12:] = 40.0
    truth = solve(x, t, x0)
    values = references.values if eight_bit else x0
    table = references.table if eight_bit else x0.new_empty(0)
    call = Call(
        x.to(DEVICE), t.double().to(DEVICE), values.to(DEVICE), table.to(DEVICE), x.shape[1] + 1.0
    )
    prepared = operands.prepare(call.values, call.table)
    assert len(prepared.parts) == (1 if eight_bit else 2)
    screen = Screen.make(call, prepared, anchor=call.rows(0, torch.int64))
    dense = (screen.cut != -math.inf).cpu()
    assert not dense[:12].any()
    assert dense[12:].all()
    assert (truth.effective_sample_size[12:] > 64).all()
    x0_set = ReferenceSet.from_images(images.to(DEVICE)) if eight_bit else x0.to(DEVICE)
    v, log_mass = poisson_displacement(
        x.to(DEVICE) if not eight_bit else x.to(DEVICE).view(24, 3, 12, 12),
        t.to(DEVICE),
        x0_set,
        backend="triton",
    )
    error = (v.cpu().double().flatten(1) - truth.v).norm(dim=1)
    assert (error <= 1e-6 * (truth.weights * truth.distances).sum(1)).all()
    assert (log_mass.cpu() - truth.log_mass).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("d", "eight_bit"),
    [(70, False), (70, True), pytest.param(140_000, False, marks=pytest.mark.exhaustive)],
)
def test_distances_of_digits(d, eight_bit, generator):
    """To what the digits leave and one rounding to float32; sums of 140,000 products of 127 and 127
    do not fit 32 bits.
    """
    x = 127 + 0.01 * torch.randn(3, d, generator=generator)
    values, table = torch.full((40, d), 255), torch.arange(256.0)
    values[1:, ::9] = torch.randint(256, (39, d), generator=generator)[:, ::9]
    values = values.byte() if eight_bit else values.float()
    table = (table - 128).to(DEVICE) if eight_bit else x.new_empty(0)
    x0 = values.double() - 128 if eight_bit else values.double()
    call = Call(x.to(DEVICE), torch.ones(3), values.to(DEVICE), table, d + 1.0)
    prepared = operands.prepare(call.values, call.table)
    queries = operands.split(call.x, call.table, prepared, 0, 3)
    r, minima = distances(call, prepared, queries, None)
    offset = queries.norms + prepared.header[4] - 2 * queries.marks[0]
    found = (r.double() + offset[:, None]).cpu()
    exact = (x.double()[:, None] - x0).square().sum(2)
    size = (x.double() - prepared.origin.cpu()).norm(dim=1, keepdim=True) + (
        x0 - prepared.origin.cpu()
    ).norm(dim=1)
    assert ((found - exact).abs() <= (6e-8 + 6e-7 / d**0.5) * size**2).all()
    assert torch.equal(minima.cpu(), r.cpu().amin(1, keepdim=True))


def test_products_of_parts_are_nearly_float32(generator):
    a = torch.randn(3, 70, generator=generator, dtype=torch.float64)
    x0 = torch.randn(200, 70, generator=generator)
    call = Call(a.float().to(DEVICE), torch.ones(3), x0.to(DEVICE), x0.new_empty(0), 71.0)
    prepared = operands.prepare(call.values, call.table)
    given = call.x, call.t, call.t
    parts = operands.split(a.to(DEVICE), call.table, prepared, 2, 0, cotangents=given).parts
    out = compare(call, prepared, parts)
    y = (x0.to(DEVICE).double() - prepared.origin).cpu()
    error = (out.cpu().double() - a @ y.T).abs()
    assert (error <= 3 * 2**-18 * (a.abs() @ y.abs().T)).all()


@pytest.mark.parametrize("d", [40, 300])
def test_parts_have_the_digits_of_bfloat16(generator, d, monkeypatch):
    """Triton's own interpreter has them held in float32, which would keep more."""
    monkeypatch.setattr(operands, "PART", torch.float32)
    values = torch.randn(70, d, generator=generator).to(DEVICE)
    parts = operands.prepare(values, values.new_empty(0)).parts
    assert torch.equal(parts.float(), parts.bfloat16().float())


@pytest.mark.parametrize("dense", [0, 1, 40, 70])
def test_queries_with_a_cut_stand_side_by_side(generator, dense):
    """In as few blocks as hold them, each with the tiles in which any of its queries has weight."""
    B, tiles, block = 70, 150, 32
    cut = torch.full((B,), -math.inf)
    chosen = torch.randperm(B, generator=generator)[:dense].sort().values
    cut[chosen] = 1.0
    active = (torch.rand(B, tiles, generator=generator) < 0.02).to(torch.int8)
    blocks = -(-B // block)
    order = torch.full((blocks * block,), 7, dtype=torch.int32, device=DEVICE)
    listed = torch.full((blocks, tiles), 7, dtype=torch.int32, device=DEVICE)
    lengths = torch.full((blocks,), 7, dtype=torch.int32, device=DEVICE)
    arguments = cut.to(DEVICE), active.to(DEVICE), order, listed, lengths
    products.list_kernel[blocks,](*arguments, B, tiles, BLOCK_M=block, BLOCK_B=16, GROUP=64)
    assert order[:dense].cpu().tolist() == chosen.tolist()
    assert (order[dense:] == -1).all()
    for i in range(blocks):
        rows = active[chosen[i * block : (i + 1) * block]]
        expected = rows.sum(0).nonzero()[:, 0].tolist()
        assert listed[i, : lengths[i]].cpu().tolist() == expected


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("normal d=16", "left"),
        ("all t d=16", "right"),
        ("D=2.5 d=3", "left"),
        ("normal d=64", "right"),
        ("near-duplicates d=64 distance=1e-05", "left"),
        ("flat d=300 D=inf", "right"),
        ("normal d=784", "left"),
    ],
)
def test_products_may_be_added_unrounded(name, first):
    """Which a compiler may do, or not, wherever a product is an operand of a sum."""
    if not INTERPRETED:
        pytest.skip("a GPU's compiler does as it does")
    case = build(name)
    with contracted(first):
        v, log_mass = poisson_displacement(case.x, case.t, case.x0, D=case.D, backend="triton")
    assert_displacement(v, truth(name), float32_contract("triton", case.named))
    assert_log_mass(log_mass, truth(name))


def test_an_unrounded_product_is_told_from_a_rounded_one():
    if not INTERPRETED:
        pytest.skip("a GPU's compiler does as it does")
    v = torch.tensor([1 + 2**-12])
    with contracted("left"):
        assert apply("contract", v).item() == 2**-24
    assert apply("contract", v).item() == 0


def launches(monkeypatch, band: int, name: str) -> list[tuple[Any, dict[str, Any]]]:
    """The grids of all kernels that a problem of the self-check launches, their arguments by name
    and, under "kernel", which it is; on a chip with 132 multiprocessors.
    """
    found, launch = [], Kernel.launch

    def noted(kernel: Kernel, grid: Any, *arguments: Any, **options: Any) -> None:
        launch(kernel, grid, *arguments, **options)
        named = dict(zip(kernel.jit.arg_names, arguments, strict=False))
        found.append((grid, named | {"kernel": kernel.name}))

    monkeypatch.setattr(Kernel, "launch", noted)
    monkeypatch.setattr(call, "multiprocessors", lambda device: 132)
    family = Family(band, False, False)
    problem = problems(family)[name]
    proof._run("triton", problem, family, problem.tensors(family, DEVICE))
    return found


def test_a_list_overflows_in_the_self_check(monkeypatch):
    (counts,) = [
        arguments["counts_ptr"]
        for _, arguments in launches(monkeypatch, 1, "clusters")
        if arguments["kernel"] == "finish_kernel" and "counts_ptr" in arguments
    ]
    listed = counts.amax(0)
    assert (listed > fused.CAP.value).any()
    assert (listed <= fused.CAP.value).any()


@pytest.mark.exhaustive
def test_sums_are_split_in_the_self_check(monkeypatch):
    grids = [
        grid
        for grid, arguments in launches(monkeypatch, 2, "tails")
        if arguments["kernel"] == "sum_kernel"
    ]
    assert max(splits for _, _, splits in grids) >= 3
