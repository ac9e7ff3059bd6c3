# SPDX-License-Identifier: Apache-2.0
"""Are references in files the references that they hold?"""

from __future__ import annotations

import copy
import errno
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, build, seeded, truth
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
    poisson_displacement,
    poisson_field,
)
from pfgm_kernels.flow import FieldLoss, constants
from pfgm_kernels.memory import PeakMemory
from pfgm_kernels.on_disk import OnDisk

SMALL = 1 << 20  # a workspace that cuts what is here into many chunks


def saved(folder: Path, rows: Tensor, *cuts: int) -> Path:
    """A folder of files, each of the rows between two cuts."""
    folder.mkdir(exist_ok=True)
    for i, part in enumerate(rows.tensor_split(cuts)):
        np.save(folder / f"{i:03d}.npy", part.numpy())
    return folder


def cut_in_three(folder: Path, rows: Tensor) -> Path:
    count = len(rows)
    return saved(folder, rows, *(cut for cut in (count // 3, count // 3 + 1) if 0 < cut < count))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_named_cases(backend, name, dtype, tmp_path):
    case = build(name)
    x, t = case.x.to(dtype, copy=True).requires_grad_(), (case.t + 0.0).requires_grad_()
    folder = cut_in_three(tmp_path / "files", case.x0.to(dtype))
    files = ReferenceSet.from_files(folder, workspace=SMALL, backend=backend.name)
    v, log_mass = backend.displacement(x, t, files, D=case.D)
    contract = float32_contract(backend.name, case.named)
    assert_displacement(v.detach(), truth(name), FLOAT64 if dtype == torch.float64 else contract)
    assert_log_mass(log_mass.detach(), truth(name))
    g_v = torch.randn(case.x.shape, generator=seeded(1))
    g_m = torch.randn(len(case.x), dtype=torch.float64, generator=seeded(2))
    dx, dt = torch.autograd.grad([v, log_mass], [x, t], [g_v.to(dtype), g_m])
    expected = differentiate(truth(name), case.x, case.x0, g_v, g_m, case.D)
    assert_gradients(expected, dx, dt)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("D", [1.0, 64.0, math.inf])
def test_every_function_of_every_dtype(backend, dtype, D, tmp_path):
    rows, exact, x, t = problem(dtype)
    folder = cut_in_three(tmp_path / "files", rows)
    device = backend.device
    files = ReferenceSet.from_files(folder, workspace=SMALL, backend=backend.name, device=device)
    assert (len(files), files.event_shape, files.nbytes) == (301, (50,), files.table.nbytes)
    expected = results(x, t, ReferenceSet(exact, backend="eager"), D)
    assert_alike(results(x.to(device), t.to(device), files, D), expected, t)


def test_each_sweep_reads_each_row_once(tmp_path, monkeypatch):
    """Of chunks, files and queries of which none is a multiple of another."""
    rows = torch.randn(5003, 77, generator=seeded())
    folder = saved(tmp_path / "files", rows, 1000, 1001, 1030, 4999)
    x, t = torch.randn(450, 77, generator=seeded(1)).requires_grad_(), 0.3
    files = ReferenceSet.from_files(sorted(folder.iterdir()), workspace=1 << 22)
    read: list[int] = []
    reading = OnDisk.read_slice
    monkeypatch.setattr(
        OnDisk,
        "read_slice",
        lambda self, part, out: read.append(part.stop - part.start) or reading(self, part, out),
    )
    v, log_mass = poisson_displacement(x, t, files)
    assert sum(read) == 5003
    assert len(read) > 3
    v.sum().backward()
    assert sum(read) == 2 * 5003
    truth = solve(x.detach(), t, rows)
    assert_displacement(v.detach(), truth, 1e-6)
    assert_log_mass(log_mass.detach(), truth)


@pytest.mark.parametrize("grouped", [True, False])
def test_classes(backend, grouped, tmp_path):
    rows, exact, x, _ = problem(torch.uint8)
    labels = torch.arange(301) % 5
    labels = labels.sort().values if grouped else labels
    wanted = torch.tensor([0, 4, 2, 0, 3] * 4)
    folder = cut_in_three(tmp_path / "files", rows)
    files = ReferenceSet.from_files(folder, labels=labels, workspace=SMALL, backend=backend.name)
    v, log_mass = backend.displacement(x, 1.0, files, labels=wanted)
    for label in (0, 2, 3, 4):
        truth = solve(x[wanted == label], 1.0, exact[labels == label])
        assert_displacement(v[wanted == label], truth, float32_contract(backend.name))
        assert_log_mass(log_mass[wanted == label], truth)
    assert files.labels is not None
    assert torch.equal(files[files.labels == 3].values, rows[labels == 3])


def test_memory_stays_within_the_workspace(tmp_path):
    folder = saved(tmp_path / "files", torch.randn(40_000, 1000, generator=seeded()), 17_000)
    files = ReferenceSet.from_files(folder, workspace=32 << 20)
    x = torch.randn(200, 1000, generator=seeded(1)).requires_grad_()
    poisson_field(x[:2], 1.0, files)
    with PeakMemory() as peak:
        poisson_field(x, 1.0, files).sum().backward()
    if peak.extra_bytes is None:
        pytest.skip(peak.reason)
    assert peak.extra_bytes < 64 << 20


def test_subsets_copies_and_losses(tmp_path):
    rows = torch.randn(90, 30, generator=seeded())
    x, t = torch.randn(9, 30, generator=seeded(1)), 0.7
    files = ReferenceSet.from_files(saved(tmp_path / "files", rows, 7, 20))
    for index in (
        slice(3, 50),
        slice(0, 90, 4),
        torch.tensor([80, 3, 3, 7]),
        torch.arange(90) > 70,
    ):
        assert torch.equal(files[index].values, rows[index])
    with pytest.raises(IndexError):
        files[torch.tensor([90])]
    for other in (copy.deepcopy(files), pickle.loads(pickle.dumps(files)), files.cpu()):
        assert torch.equal(poisson_field(x, t, other), poisson_field(x, t, files))
    assert constants(files) == constants(rows)
    assert files.nbytes == 0
    assert "in files" in repr(files)
    loss = FieldLoss(files)(lambda x, t: x.new_zeros(len(x), 31), rows[:8])
    assert loss > 0


def test_other_files_are_refused(tmp_path):
    good = np.zeros((3, 4), np.float32)
    np.save(tmp_path / "a.npy", good)
    for name, array in (
        ("event", np.zeros((3, 5), np.float32)),
        ("dtype", np.zeros((3, 4), np.float64)),
        ("kind", np.zeros((3, 4), np.int64)),
        ("big-endian", np.zeros((3, 4), ">f4")),
        ("fortran", np.asfortranarray(np.ones((3, 4), np.float32))),
        ("empty", np.zeros((0, 4), np.float32)),
        ("pickle", np.array([{}, None])),
    ):
        path = tmp_path / f"{name}.bin"
        with open(path, "wb") as file:
            np.save(file, array)
        with pytest.raises((ValueError, TypeError), match=f"{name}.bin"):
            ReferenceSet.from_files([tmp_path / "a.npy", path])
    whole = (tmp_path / "a.npy").read_bytes()
    for name, content in (("cut", whole[:-1]), ("none", b""), ("text", b"0, 1, 2")):
        (tmp_path / f"{name}.bin").write_bytes(content)
        with pytest.raises(ValueError, match=f"damaged file .*{name}.bin"):
            ReferenceSet.from_files(tmp_path / f"{name}.bin")
    with pytest.raises(FileNotFoundError, match=r"nothing.npy; it does not exist"):
        ReferenceSet.from_files(tmp_path / "nothing.npy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected .npy files in the folder"):
        ReferenceSet.from_files(tmp_path / "empty")
    with pytest.raises(ValueError, match="at least one file"):
        ReferenceSet.from_files([])


@pytest.mark.parametrize("how", ["cut", "longer", "touched", "gone", "nan"])
def test_a_file_that_changes_is_an_error(tmp_path, how):
    x, t = torch.randn(9, 40, generator=seeded(1)), 0.7
    folder = saved(tmp_path / "files", torch.randn(300, 40, generator=seeded()), 100)
    path = folder / "001.npy"
    whole, files = path.read_bytes(), None
    if how == "nan":
        path.write_bytes(whole[:-4] + np.float32("nan").tobytes())
    files = ReferenceSet.from_files(folder)
    if how == "cut":
        os.truncate(path, len(whole) - 1000)
    elif how == "longer":
        path.write_bytes(whole + b"0")
    elif how == "touched":
        path.write_bytes(whole)
        os.utime(path, ns=(1, 1))
    elif how == "gone":
        path.unlink()
    match = "from 0 to 300" if how == "nan" else "001.npy"
    for _ in range(2):
        with pytest.raises((ValueError, OSError), match=match):
            poisson_field(x, t, files)


@pytest.mark.parametrize("how", ["cut", "touched", "disk", "pipe"])
def test_a_fault_in_the_middle_of_a_read(tmp_path, monkeypatch, how):
    """Of the second of three chunks."""
    x, t = torch.randn(9, 400, generator=seeded(1)), 0.7
    folder = saved(tmp_path / "files", torch.randn(300, 400, generator=seeded()))
    path, read, count = folder / "000.npy", os.preadv, 0
    files = ReferenceSet.from_files(folder, workspace=SMALL)

    def preadv(file, buffers, offset):
        nonlocal count
        count += 1
        if count == 2:
            if how == "cut":
                os.truncate(path, offset)
            elif how == "touched":
                os.utime(path, ns=(1, 1))
            elif how == "disk":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            elif how == "pipe":
                path.unlink()
                os.mkfifo(path)
        return read(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises((ValueError, OSError), match=r"000.npy"):
        poisson_field(x, t, files)
    assert count in (2, 3)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(ValueError, match=r"pipe.npy: expected a regular file"):
        ReferenceSet.from_files(tmp_path)


def test_compiled_functions_take_none(tmp_path):
    x = torch.randn(30, 40, generator=seeded())
    files = ReferenceSet.from_files(saved(tmp_path / "files", x))
    compiled = torch.compile(
        lambda x: poisson_field(x, 1.0, files), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="expects references in memory"):
        compiled(x)
