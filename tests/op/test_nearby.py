# SPDX-License-Identifier: Apache-2.0
"""With a sketch beside files, are results those of all references, and read are the near ones?"""

from __future__ import annotations

import errno
import math
import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import seeded
from groups import part, run
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_displacement, assert_gradients, assert_log_mass, differentiate, solve
from stored import results
from torch import Tensor

from pfgm_kernels import ReferenceSet, divergence, nearby, poisson_displacement, poisson_field
from pfgm_kernels.backends import _sketch
from pfgm_kernels.backends._sketch import Sketch
from pfgm_kernels.on_disk import OnDisk

COUNT, DIM = 1100, 60
DTYPES = (torch.uint8, torch.float16, torch.float64)
WHERE = {"one": (-2, 1), "near": (-2, 6), "mixed": (2, 6)}
"""Up to which power of ten queries are from the references, and how many there are."""
SMALL = {"LEAST_DIM": 1, "LEAST_COUNT": 1, "MOST_BYTES": 1.0, "COLUMNS": (4, 16)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(_sketch, name, value)


def near_a_plane() -> Tensor:
    """References in ten dimensions, more or less, from -1 to 1."""
    generator = seeded(1)
    plane = torch.randn(10, DIM, generator=generator) * torch.logspace(0, -1, 10)[:, None]
    points = torch.randn(COUNT, 10, generator=generator) @ plane
    points += 0.02 * torch.randn(COUNT, DIM, generator=generator)
    return points / points.abs().max()


def stored(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What is in files, and what that stands for (COUNT, DIM)."""
    x0 = near_a_plane()
    rows = ((x0 + 1) * 127.5).round().byte() if dtype == torch.uint8 else x0.to(dtype)
    exact = (rows.double() / 127.5 - 1).float() if dtype == torch.uint8 else rows
    return rows.view(-1, 3, DIM // 3), exact


def saved(folder: Path, dtype: torch.dtype) -> tuple[list[Path], Tensor]:
    """Three files, and what they stand for."""
    rows, exact = stored(dtype)
    paths = [folder / f"{i}.npy" for i in range(3)]
    for path, some in zip(paths, rows.split([300, 1, COUNT - 301]), strict=True):
        np.save(path, some.numpy())
    return paths, exact


def queries(x0: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    generator = seeded(2)
    x = x0[torch.randint(len(x0), (len(scales),), generator=generator)].double()
    x += scales[:, None] * torch.randn(x.shape, generator=generator) / math.sqrt(DIM)
    t = scales * torch.rand(len(scales), generator=generator) + 1e-6
    dtype = torch.promote_types(x0.dtype, torch.float32)
    return x.to(dtype).view(-1, 3, DIM // 3), t.to(dtype)


@pytest.fixture
def read(monkeypatch) -> list[int]:
    return counting(monkeypatch)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each look into the files took."""
    rows: list[int] = []
    reading = OnDisk.read
    monkeypatch.setattr(
        OnDisk, "read", lambda self, at, out: rows.append(len(out)) or reading(self, at, out)
    )
    return rows


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("D", [1.0, 128.0, math.inf])
def test_near_and_far_queries(dtype, backend, D, tmp_path):
    paths, x0 = saved(tmp_path, dtype)
    exact = 1e-10 if dtype == torch.float64 else 1e-6
    files = ReferenceSet.from_files(paths, sketch=tmp_path / "sketch.npz", backend=backend)
    x, t = queries(x0, torch.logspace(-4, 2, 30))
    x, t = x.requires_grad_(), t.requires_grad_()
    near = files.own.near.find(x.detach(), t.detach(), DIM + D, 1 << 26, None).queries
    assert 3 < len(near) < 28
    v, log_mass = poisson_displacement(x, t, files, D=D)
    flat = x.detach().flatten(1)
    expected = solve(flat, t.detach(), x0, D)
    assert_displacement(v.detach().flatten(1), expected, exact)
    assert_log_mass(log_mass.detach(), expected)
    g_v, g_m = torch.randn(x.shape, generator=seeded(3)), torch.randn(30, generator=seeded(4))
    g_v, g_m = g_v.to(x.dtype), g_m.double()
    dx, dt = torch.autograd.grad([v, log_mass], [x, t], [g_v, g_m])
    truth = differentiate(expected, flat, x0, g_v.flatten(1), g_m, D)
    assert_gradients(truth, dx.flatten(1), dt)


def test_only_what_is_near_is_read(tmp_path, read):
    paths, x0 = saved(tmp_path, torch.float32)
    files = ReferenceSet.from_files(paths, sketch=tmp_path / "sketch.npz")
    x, t = queries(x0, torch.full((5,), 1e-3))
    read.clear()
    poisson_field(x.requires_grad_(), t, files).sum().backward()
    assert 0 < sum(read) < COUNT / 5
    read.clear()
    poisson_field(x.detach() + 100, t, files)
    assert COUNT <= sum(read) <= COUNT + 5  # and the anchors


def test_what_is_derived_in_other_ways(tmp_path):
    paths, x0 = saved(tmp_path, torch.float32)
    files = ReferenceSet.from_files(paths, sketch=tmp_path / "sketch.npz")
    memory = ReferenceSet(x0.view(-1, 3, DIM // 3))
    x, t = queries(x0, torch.logspace(-4, 2, 30))
    tangent = torch.randn(x.shape, generator=seeded(5))

    def moved(references: ReferenceSet) -> Tensor:
        return torch.func.jvp(lambda x: poisson_field(x, t, references), (x,), (tangent,))[1]

    torch.testing.assert_close(moved(files), moved(memory), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        divergence(x, t, files), divergence(x, t, memory), rtol=1e-5, atol=1e-5
    )


def test_classes_and_their_order(tmp_path, read):
    paths, x0 = saved(tmp_path, torch.float32)
    labels = torch.arange(COUNT) % 3
    kept = tmp_path / "sketch.npz"
    files = ReferenceSet.from_files(paths, sketch=kept, labels=labels)
    x, t = queries(x0, torch.logspace(-4, 0, 12))
    wanted = torch.arange(12) % 3
    v, _ = poisson_displacement(x, t, files)
    assert_displacement(v.flatten(1), solve(x.flatten(1), t, x0), 1e-6)
    v, _ = poisson_displacement(x, t, files, labels=wanted)
    for label in range(3):
        here = wanted == label
        expected = solve(x[here].flatten(1), t[here], x0[labels == label])
        assert_displacement(v[here].flatten(1), expected, 1e-6)
    read.clear()
    poisson_field(*queries(x0, torch.full((5,), 1e-3)), files)
    assert 0 < sum(read) < COUNT / 5
    ReferenceSet.from_files(paths, sketch=kept)  # the file is of the references, as they lie


def test_it_is_kept(tmp_path, monkeypatch):
    paths, x0 = saved(tmp_path, torch.float32)
    kept = tmp_path / "folder" / "sketch.npz"
    x, t = queries(x0, torch.full((5,), 1e-2))
    expected = poisson_field(x, t, ReferenceSet.from_files(paths, sketch=kept))
    monkeypatch.setattr(nearby, "_make", None)
    again = ReferenceSet.from_files(paths, sketch=str(kept))
    assert torch.equal(poisson_field(x, t, again), expected)
    assert torch.equal(poisson_field(x, t, again.to("cpu")), expected)


def of_each_rank(folder: Path, rank: int, world: int, queries_of: str) -> dict:
    """Results of parts with sketches and of parts without, and how many rows each read."""
    for name, value in SMALL.items():
        setattr(_sketch, name, value)
    read, found = counting(pytest.MonkeyPatch()), {}
    for dtype in DTYPES:
        rows, x0 = stored(dtype)
        path = folder / f"{dtype}-{rank}.npy"
        np.save(path, part(rows, rank, world).numpy())
        options = {"group": dist.group.WORLD, "queries": queries_of}
        sets = (
            ReferenceSet.from_files(path, **options),
            ReferenceSet.from_files(path, sketch=path.with_suffix(".npz"), **options),
        )
        for where, (farthest, count) in WHERE.items():
            x, t = queries(x0, torch.logspace(-4, farthest, count))
            for D in (1.0, math.inf):
                for sketch, references in enumerate(sets):
                    read.clear()
                    values = results(x, t, references, D)
                    found[where, dtype, D, sketch] = values | {"read": sum(read)}
    with pytest.raises(ValueError, match="expect one set with a sketch or without, got False on r"):
        ReferenceSet.from_files(path, sketch=path.with_suffix(".npz") if rank else None, **options)
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize("queries_of", ["local", "replicated"])
def test_each_rank_of_a_group_has_its_own(tmp_path, queries_of):
    for found in run(tmp_path, 2, of_each_rank, queries_of):
        for where, dtype, D in product(WHERE, DTYPES, (1.0, math.inf)):
            plain, sketched = (found[where, dtype, D, sketch] for sketch in (0, 1))
            whole, read = plain.pop("read"), sketched.pop("read")
            assert read >= whole if where == "mixed" else read < whole / 4
            exact = 1e-10 if dtype == torch.float64 else 1e-6
            for each, expected in zip(sketched.values(), plain.values(), strict=True):
                for got, wanted in zip(each, expected, strict=True):
                    gap, size = (
                        (a.reshape(len(a), -1)).norm(dim=1) for a in (got - wanted, wanted)
                    )
                    assert (gap <= exact * (1 + size)).all()


def test_that_of_other_files_is_refused(tmp_path):
    paths, _ = saved(tmp_path, torch.uint8)
    kept = tmp_path / "sketch.npz"
    ReferenceSet.from_files(paths, sketch=kept)
    message = "sketch of other references than these, or of these before they were changed"
    for other in (paths[:2], paths[::-1]):
        with pytest.raises(ValueError, match=message):
            ReferenceSet.from_files(other, sketch=kept)
    with pytest.raises(ValueError, match=message):
        ReferenceSet.from_files(paths, 0.0, 1.0, sketch=kept)
    os.utime(paths[1], ns=(1, 1))
    with pytest.raises(ValueError, match=message):
        ReferenceSet.from_files(paths, sketch=kept)


def test_a_damaged_one_is_named(tmp_path):
    paths, _ = saved(tmp_path, torch.float32)
    kept = tmp_path / "sketch.npz"
    ReferenceSet.from_files(paths, sketch=kept)
    whole = kept.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\x80\x04N.", paths[1].read_bytes()):
        kept.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged file .*sketch\.npz: expected a sketch"):
            ReferenceSet.from_files(paths, sketch=kept)


def test_references_that_are_not_finite_have_none(tmp_path):
    paths, _ = saved(tmp_path, torch.float32)
    rows = np.load(paths[2])
    rows[99, 0] = math.nan
    np.save(paths[2], rows)
    with pytest.raises(ValueError, match="references in files are finite, got NaN or Inf among"):
        ReferenceSet.from_files(paths, sketch=tmp_path / "sketch.npz")
    assert not (tmp_path / "sketch.npz").exists()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    paths, _ = saved(tmp_path, torch.float32)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*sketch\.npz"):
        ReferenceSet.from_files(paths, sketch=tmp_path / "kept" / "sketch.npz")
    assert not list((tmp_path / "kept").iterdir())


def test_white_references_have_none(tmp_path, read, monkeypatch):
    monkeypatch.setattr(_sketch, "LEAST_SHARE", 0.3)
    np.save(tmp_path / "white.npy", torch.randn(COUNT, DIM, generator=seeded()).numpy())
    files = ReferenceSet.from_files(tmp_path / "white.npy", sketch=tmp_path / "sketch.npz")
    read.clear()
    poisson_field(files[:5].values, 1e-3, files)
    assert sum(read) >= COUNT


@given(st.integers(0, 1 << 30))
def test_no_reference_of_weight_is_lost(seed):
    """The bound for any basis, beside the distances themselves."""
    random = np.random.default_rng(seed)
    generator = seeded(seed)
    d, count, q = 30, 80, int(random.integers(1, 15)) * 2
    x0 = torch.randn(count, d, generator=generator) * torch.logspace(0, -random.uniform(0, 4), d)
    x0 *= 2 * torch.rand(count, 1, generator=generator)
    x0 += random.choice([0.0, 100.0]) * (1 - torch.arange(count)[:, None] % 2 * 2)
    noise = random.choice([0.01, 1.0, 30.0]) * torch.randn(20, d, generator=generator)
    x = torch.cat([x0[:20] + noise, (x0[:20] + x0[20:40]) / 2]).double()
    normal = torch.randn(d, q, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(normal)[0].T.contiguous()
    grid = torch.cat([torch.tensor([0.5, -1.0, 0.0, 0.0]), x0.mean(0)]).double()
    norms = ((x0.double() - grid[4:]) / 0.5).square().sum(1)
    (level,) = _sketch.in_basis(x0, torch.empty(0), norms, grid, basis, [q])
    shifted = (x - grid[4:]) / 0.5
    squared = shifted.square().sum(1)
    bounds = nearby._Bounds(level, norms, shifted, squared, 1 << int(random.integers(10, 20)))
    least = -torch.cat([minus for _, minus in bounds.least()], 1)
    exact = (x[:, None] - x0.double()).square().sum(2) / 0.25 - squared[:, None]
    assert (least <= exact).all()
    assert isinstance(level, Sketch)
    near = exact.kthvalue(3).values
    for b, found in enumerate(bounds.within(near)):
        assert found is not None
        assert set((exact[b] <= near[b]).nonzero().flatten().tolist()) <= set(found.tolist())
