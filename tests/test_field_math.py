# SPDX-License-Identifier: Apache-2.0
"""Are the CUDA kernels right? Here they run on the CPU, through the backend that launches them.

g++ compiles csrc/cuda against a shim of the CUDA runtime (tests/cpp/shim), with the address and
undefined-behaviour sanitizers; rsqrt, log1p and exp are those of the C library. The memory of a
GPU, its mathematical functions and its speed are not tested. The kernels compute in float64: they
are held to its contract for float32 input, too.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, build, normal, seeded, truth
from oracle import FLOAT64, Truth, assert_displacement, assert_log_mass, solve
from torch import Tensor

from pfgm_kernels import ReferenceSet
from pfgm_kernels.backends import _native, cuda

SOURCE = Path(__file__).parent / "cpp" / "field_math.cpp"
SMALL = [name for name in CASES if build(name).d <= cuda.MAX_DIM]
NO_TABLE = torch.empty(0)


@pytest.fixture(scope="session")
def executable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels as a program that turns a case file into a result file."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the kernels for the CPU")
    program = tmp_path_factory.mktemp("cuda") / "field_math"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += [f"-I{SOURCE.parent / 'shim'}", "-o", str(program), str(SOURCE)]
    subprocess.run([compiler, *flags], check=True)
    return program


@pytest.fixture(autouse=True)
def emulation(executable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cuda backend launches the program instead of a kernel."""
    case, result = tmp_path / "case", tmp_path / "result"

    def launch(entry: str, **p: Any) -> None:
        assert entry == "field_forward_cuda"
        types = ["float32", "float64", "uint8"]
        header = [p[name] for name in ("batch", "count", "dim")]
        header += [types.index(p["value_type"]), p["num_splits"]]
        scalars = [torch.tensor(header), torch.tensor([p["half_k"]], dtype=torch.float64)]
        arrays = [*scalars, p["x"], p["t"], p["values"], p["table"]]
        case.write_bytes(b"".join(a.numpy().tobytes() for a in arrays))
        run = subprocess.run([executable, case, result], capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(run.stderr)
        data = result.read_bytes()
        outputs = [p["displacement"][0], p["log_mass"], p["anchor_log_weight"], p["anchor"][0]]
        for output in outputs:
            part, data = data[: output.nbytes], data[output.nbytes :]
            if part:
                output.copy_(torch.frombuffer(bytearray(part), dtype=output.dtype).view_as(output))
        assert not data

    monkeypatch.setattr(_native, "launch", launch)


def check(case: Case, expected: Truth) -> None:
    """The case's values, and the anchor with its weight."""
    k = case.d + case.D
    t = case.t.double()
    v, log_mass, anchor, anchor_log_weight = cuda.forward(case.x, t, case.x0, NO_TABLE, [], k)
    assert_displacement(v, expected, FLOAT64)
    assert_log_mass(log_mass, expected)
    rows = torch.arange(len(v))
    assert torch.equal(expected.distances[rows, anchor], expected.distances.amin(1))
    weight = expected.weights[rows, anchor]
    assert torch.allclose(anchor_log_weight.exp(), weight, rtol=1e-10, atol=0)


@pytest.mark.parametrize("min_split", [1, 256])
@pytest.mark.parametrize("name", SMALL)
def test_every_named_case(name: str, min_split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MIN_SPLIT", min_split)
    monkeypatch.setattr(cuda, "BLOCKS", 8)
    check(build(name), truth(name))


@pytest.mark.parametrize("D", [1, 0.5])
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32])
def test_every_kernel(d: int, D: float) -> None:
    case = normal(d, 2 * cuda.MIN_SPLIT + 45, 3, D)
    check(case, case.truth())


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8, 9, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("count", [1, 31, 259])
def test_every_share_of_a_warp(batch: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MIN_SPLIT", 130)
    case = normal(2, count, batch, dense=False)
    check(case, case.truth())


@pytest.mark.parametrize("D", [0, 0.3, 2.5, 128, 1e6, math.inf])
@pytest.mark.parametrize("t", [1e-5, 1e-2, 1e4])
def test_extremes_of_t_far_from_the_origin(t: float, D: float) -> None:
    """Clusters at offset 1000 on float32's grid, with queries on, near and off the points."""
    generator = seeded(3)
    x0 = 1000 + (1e-3 * torch.randn(200, 3, generator=generator)).float()
    x = x0[:12] + torch.linspace(0, 1e-2, 12)[:, None]
    case = Case(x, torch.full((12,), t), x0, D)
    check(case, case.truth())


@pytest.mark.parametrize("D", [0.3, 1, 128])
def test_many_equal_references_against_one_near(D: float) -> None:
    """The rounding errors of equal references do not average out."""
    count = 3000
    ratio = (2 * count) ** (2 / (1 + D))  # of s: the crowd weighs half of the one
    x0 = torch.full((count, 1), math.sqrt(2 * ratio - 1))
    x0[1234] = 1.0
    case = Case(torch.zeros(128, 1), torch.ones(128), x0, D)  # a thread per query
    expected = case.truth()
    assert 0.6 < expected.weights[0, 1234] < 0.7
    check(case, expected)


@pytest.mark.parametrize("scale", [1e-25, 1e30])
def test_distances_whose_squares_no_float32_holds(scale: float) -> None:
    case = normal(3, 50, 4)
    case = Case(case.x * scale, torch.zeros(4), case.x0 * scale, D=1)
    check(case, case.truth())


def test_every_storage() -> None:
    images = torch.randint(0, 256, (300, 9), dtype=torch.uint8, generator=seeded())
    references = ReferenceSet.from_images(images)
    x0 = references.table[images.int()]
    x = x0[:7] + 0.5
    t = torch.full((7,), 0.7, dtype=torch.float64)
    decoded = cuda.forward(x, t, x0, NO_TABLE, [], 10)
    coded = cuda.forward(x, t, images, references.table, [], 10)
    assert all(map(torch.equal, decoded, coded))
    check(Case(x.double(), t, x0), solve(x, t, x0))
    fine = 1000 + 1e-9 * torch.randn(300, 9, dtype=torch.float64, generator=seeded())
    case = Case(fine[:7] + 1e-9, 1e-9 * t, fine)
    check(case, case.truth())


def outputs(x: Tensor, t: Tensor, x0: Tensor, D: float) -> tuple[Tensor, Tensor, Tensor]:
    v, log_mass, anchor, anchor_log_weight = cuda.forward(x, t, x0, NO_TABLE, [], x.shape[1] + D)
    assert ((anchor >= 0) & (anchor < len(x0))).all()
    return v, log_mass, anchor_log_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [1, math.inf])
@pytest.mark.parametrize("min_split", [7, 100])
def test_not_finite(
    dtype: torch.dtype, D: float, min_split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "MIN_SPLIT", min_split)
    x0 = torch.randn(40, 3, dtype=dtype, generator=seeded())
    x, t = torch.zeros(7, 3, dtype=dtype), torch.full((7,), 0.5, dtype=torch.float64)
    expected = outputs(x, t, x0, D)
    x[1, 2], x[2, 0], x[3, 1] = math.nan, math.inf, -math.inf
    t[4], t[5] = math.nan, math.inf
    for output, unharmed in zip(outputs(x, t, x0, D), expected, strict=True):
        assert output[1:6].isnan().all()
        assert torch.equal(output[[0, 6]], unharmed[[0, 6]])
    for value in (math.nan, math.inf, -math.inf):
        for row in (0, 17, 39):
            spoilt = x0.clone()
            spoilt[row, 1] = value
            assert all(output.isnan().all() for output in outputs(x, t, spoilt, D))


@pytest.mark.parametrize("min_split", [7, 100])
def test_singular_point(min_split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MIN_SPLIT", min_split)
    x0 = torch.randn(40, 3, generator=seeded())
    x0[7] = x0[33] = x0[3]
    x, t = x0[[3, 5]].clone(), torch.zeros(2, dtype=torch.float64)
    v, log_mass, anchor_log_weight = outputs(x, t, x0, 1)
    assert (v == 0).all()
    assert (log_mass == math.inf).all()
    assert anchor_log_weight.tolist() == [-math.log(3), 0]
    assert all(output.isnan().all() for output in outputs(x, t, x0, math.inf))


def test_no_queries() -> None:
    empty = torch.empty(0, 3)
    v, log_mass, anchor_log_weight = outputs(empty, torch.empty(0).double(), torch.ones(5, 3), 1)
    assert v.shape == (0, 3)
    assert log_mass.shape == anchor_log_weight.shape == (0,)


def test_sizes_out_of_range_are_refused() -> None:
    t = torch.ones(1).double()
    with pytest.raises(RuntimeError, match="dimension out of range"):
        cuda.forward(torch.ones(1, 33), t, torch.ones(5, 33), NO_TABLE, [], 34)
    with pytest.raises(RuntimeError, match="sizes out of range"):
        cuda.forward(torch.ones(1, 3), t, torch.ones(5, 3), NO_TABLE, [], -1)
