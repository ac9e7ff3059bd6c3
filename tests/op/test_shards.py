# SPDX-License-Identifier: Apache-2.0
"""Are references of which each process holds a part those that one process would hold?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import CASES, build, seeded, truth
from groups import SMALL, part, run
from oracle import (
    FLOAT64,
    assert_displacement,
    assert_gradients,
    assert_log_mass,
    differentiate,
    float32_contract,
    solve,
)
from stored import assert_alike, problem, results
from torch import Tensor

from pfgm_kernels import (
    ReferenceSet,
    divergence,
    log_density,
    poisson_displacement,
    poisson_field,
)
from pfgm_kernels.flow import FieldLoss, constants


def named_cases(
    folder: Path, rank: int, world: int, kind: str, backend: str, dtype: torch.dtype
) -> dict:
    found = {}
    for name in CASES:
        case = build(name)
        if len(case.x0) < world:
            continue
        x, t = case.x.to(dtype, copy=True).requires_grad_(), (case.t + 0.0).requires_grad_()
        x0, options = case.x0.to(dtype), {"workspace": SMALL, "backend": backend}
        options["group"] = dist.group.WORLD
        references = references_of(folder, x0, rank, world, kind, **options)
        assert len(references) == len(x0)
        v, log_mass = poisson_displacement(x, t, references, D=case.D)
        g_v, g_m = cotangents(name)
        dx, dt = torch.autograd.grad([v, log_mass], [x, t], [g_v.to(dtype), g_m])
        found[name] = [v.detach(), log_mass.detach(), dx, dt]
    return found


def cotangents(name: str) -> tuple[Tensor, Tensor]:
    case = build(name)
    g_v = torch.randn(case.x.shape, generator=seeded(1))
    return g_v, torch.randn(len(case.x), dtype=torch.float64, generator=seeded(2))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("world", "kind", "name", "dtype"),
    [
        (1, "memory", "cpu", torch.float32),
        (1, "files", "eager", torch.float64),
        (2, "memory", "eager", torch.float32),
        (2, "files", "cpu", torch.float32),
        (2, "memory", "cpu", torch.float64),
        (4, "memory", "cpu", torch.float32),
        (4, "files", "eager", torch.float32),
    ],
)
def test_named_cases(tmp_path, world, kind, name, dtype):
    ranks = run(tmp_path, world, named_cases, kind, name, dtype)
    assert len(ranks[0]) > 100
    for case_name, (v, log_mass, dx, dt) in ranks[0].items():
        case, expected = build(case_name), truth(case_name)
        for other in ranks[1:]:
            assert all(map(torch.equal, other[case_name], ranks[0][case_name]))
        contract = float32_contract(name, case.named)
        assert_displacement(v, expected, FLOAT64 if dtype == torch.float64 else contract)
        assert_log_mass(log_mass, expected)
        gradients = differentiate(expected, case.x, case.x0, *cotangents(case_name), case.D)
        assert_gradients(gradients, dx, dt)


def references_of(
    folder: Path, rows: Tensor, rank: int, world: int, kind: str, **options: Any
) -> ReferenceSet:
    mine = part(rows, rank, world)
    if kind == "files":
        np.save(folder / f"part-{rank}.npy", mine.numpy())
        return ReferenceSet.from_files(folder / f"part-{rank}.npy", **options)
    make = ReferenceSet.from_images if rows.dtype == torch.uint8 else ReferenceSet
    return make(mine, **options)


def every_function(folder: Path, rank: int, world: int, kind: str, queries: str) -> dict:
    found = {}
    for dtype in (torch.uint8, torch.float16, torch.float32):
        rows, _, x, t = problem(dtype)
        options = {"group": dist.group.WORLD, "queries": queries, "workspace": SMALL}
        references = references_of(folder, rows, rank, world, kind, **options)
        if queries == "local":
            mine = [slice(0, 13), slice(13, 20), slice(0, 0)][rank]
            x, t = x[mine], t[mine]
        for D in (1.0, 64.0, math.inf):
            found[f"{dtype} {D}"] = results(x, t, references, D)
    return found


def joined(ranks: list[dict[str, list[Tensor]]]) -> dict[str, list[Tensor]]:
    """The rows of one rank after another."""
    parts = {name: zip(*(rank[name] for rank in ranks), strict=True) for name in ranks[0]}
    return {name: [torch.cat(each) for each in found] for name, found in parts.items()}


@pytest.mark.parametrize("kind", ["memory", "files"])
@pytest.mark.parametrize("queries", ["replicated", "local"])
def test_every_function_of_every_dtype(tmp_path, kind, queries):
    ranks = run(tmp_path, 2, every_function, kind, queries)
    for dtype in (torch.uint8, torch.float16, torch.float32):
        _, exact, x, t = problem(dtype)
        for D in (1.0, 64.0, math.inf):
            expected = results(x, t, ReferenceSet(exact), D)
            found = [rank[f"{dtype} {D}"] for rank in ranks]
            if queries == "local":
                found = [joined(found)]
            for each in found:
                assert_alike(each, expected, t)


def classes(folder: Path, rank: int, world: int, queries: str) -> dict:
    rows, _, x, _ = problem(torch.uint8)
    labels = part(torch.arange(301) // 61, rank, world)  # no rank has all of them
    references = ReferenceSet.from_images(
        part(rows, rank, world), labels=labels, group=dist.group.WORLD, queries=queries
    )
    wanted = torch.tensor([0, 4, 2, 0, 3] * 4)
    if queries == "local":
        mine = [slice(0, 13), slice(13, 20), slice(0, 0)][rank]
        x, wanted = x[mine], wanted[mine]
    xs = x.clone().requires_grad_()
    v, log_mass = poisson_displacement(xs, 1.0, references, labels=wanted)
    dx = torch.autograd.grad(v.square().sum(), xs)[0]
    density = log_density(x, 1.0, references, labels=wanted)
    spread = divergence(x, 1.0, references, labels=wanted)
    if len(x):
        with pytest.raises(ValueError, match="labels expects classes of 0 … 4"):
            poisson_field(x, 1.0, references, labels=5)
    return {"found": [v.detach(), log_mass.detach(), dx, density, spread]}


@pytest.mark.parametrize(("world", "queries"), [(2, "replicated"), (3, "local")])
def test_classes(tmp_path, world, queries):
    _, exact, x, _ = problem(torch.uint8)
    labels, wanted = torch.arange(301) // 61, torch.tensor([0, 4, 2, 0, 3] * 4)
    ranks = run(tmp_path, world, classes, queries)
    ranks = [joined(ranks)] if queries == "local" else ranks
    for rank in ranks:
        v, log_mass, dx, density, spread = rank["found"]
        for label in (0, 2, 3, 4):
            here, of = wanted == label, exact[labels == label]
            expected = solve(x[here], 1.0, of)
            assert_displacement(v[here], expected, 1e-6)
            assert_log_mass(log_mass[here], expected)
            gradients = differentiate(expected, x[here], of, 2 * expected.v, torch.zeros(sum(here)))
            assert_gradients(gradients, dx[here])
            torch.testing.assert_close(density[here], log_density(x[here], 1.0, of))
            torch.testing.assert_close(spread[here], divergence(x[here], 1.0, of))


def what_is_made_of_a_set(folder: Path, rank: int, world: int) -> dict:
    x0 = torch.randn(40, 30, generator=seeded())
    references = ReferenceSet(part(x0, rank, world), group=dist.group.WORLD)
    for call in (lambda: references[:3], lambda: references.to("meta")):
        with pytest.raises(ValueError, match=r"(got those of|references of) a group"):
            call()
    assert "of them here" in repr(references)
    found = constants(references)
    loss = FieldLoss(references)(lambda x, t: x.new_zeros(len(x), 31), x0[:8], generator=seeded())
    return {"loss": loss, "constants": torch.tensor([found.gamma, found.T, found.M])}


def test_constants_and_losses(tmp_path):
    x0 = torch.randn(40, 30, generator=seeded())
    known = constants(x0)
    loss = FieldLoss(x0)(lambda x, t: x.new_zeros(len(x), 31), x0[:8], generator=seeded())
    for rank in run(tmp_path, 2, what_is_made_of_a_set):
        torch.testing.assert_close(rank["constants"], torch.tensor([known.gamma, known.T, known.M]))
        torch.testing.assert_close(rank["loss"], loss)


def disagreements(folder: Path, rank: int, world: int) -> dict:
    x0, group = torch.randn(20, 8, generator=seeded()), dist.group.WORLD
    for mine, sentence in (
        (
            x0 if rank else x0.double(),
            "expect one dtype, got torch.float64 on rank 0 and torch.float32 on rank 1",
        ),
        (x0[:, : 8 - rank], r"expect one event shape, got \(8,\) on rank 0 and \(7,\) on rank 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ReferenceSet(mine, group=group)
    with pytest.raises(ValueError, match="one set with labels or without, got False on rank 0"):
        ReferenceSet(x0, labels=torch.arange(20) if rank else None, group=group)
    with pytest.raises(ValueError, match="queries expects one of replicated, local, got 'all'"):
        ReferenceSet(x0, group=group, queries="all")
    references = ReferenceSet(x0, group=group)
    other = ReferenceSet(x0, group=group, queries="local")
    x = torch.randn(6, 8, generator=seeded())
    for calls, sentence in (
        (lambda: poisson_field(x[rank:], 1.0, references), "number of queries, got 6 on rank 0"),
        (lambda: poisson_field(x, 1.0, references, D=1 + rank), r"d \+ D, got 9.0 on rank 0"),
        (lambda: poisson_field(x + rank, 1.0, references), "one x, got"),
        (lambda: poisson_field(x, 1.0 + rank, references), "one t, got"),
        (lambda: poisson_field(x, 1.0, other if rank else references), "one set of those made"),
        (lambda: (divergence if rank else poisson_field)(x, 1.0, references), "one function, got"),
        (lambda: poisson_field(x.double() if rank else x, 1.0, other), "one kind of arguments"),
        (lambda: poisson_field(x, 1.0, other, D=1 + rank), r"d \+ D, got 9.0 on rank 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            calls()
    return {"sound": poisson_field(x, 1.0, references)}


def test_ranks_that_disagree_are_told(tmp_path):
    x, x0 = torch.randn(6, 8, generator=seeded()), torch.randn(20, 8, generator=seeded())
    for rank in run(tmp_path, 2, disagreements):
        torch.testing.assert_close(rank["sound"], poisson_field(x, 1.0, torch.cat([x0, x0])))


def compiled(folder: Path, rank: int, world: int) -> dict:
    x0 = torch.randn(40, 8, generator=seeded())
    references = ReferenceSet(part(x0, rank, world), group=dist.group.WORLD)

    def run(x: Tensor) -> Tensor:
        return 2 * poisson_field(3 * x, 1.0, references)

    with pytest.raises(Exception, match="call the op outside of it, or leave out fullgraph=True"):
        torch.compile(run, fullgraph=True, backend="eager")(x0)
    torch._dynamo.reset()
    x = x0.clone().requires_grad_()
    found = torch.compile(run, backend="aot_eager")(x)
    return {"found": [found.detach(), *torch.autograd.grad(found.square().sum(), x)]}


@pytest.mark.exhaustive
def test_a_compiled_function_breaks_its_graph(tmp_path):
    """Around the call, or it says what to do; it does not hang."""
    x0 = torch.randn(40, 8, generator=seeded())
    x = x0.clone().requires_grad_()
    expected = 2 * poisson_field(3 * x, 1.0, ReferenceSet(x0))
    expected = [expected.detach(), *torch.autograd.grad(expected.square().sum(), x)]
    for rank in run(tmp_path, 2, compiled):
        torch.testing.assert_close(rank["found"], expected)
