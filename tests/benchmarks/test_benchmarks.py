# SPDX-License-Identifier: Apache-2.0
"""Do the benchmarks measure what they say, and refuse to time what is wrong?"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import machine, measure, peers
from benchmarks.measure import DIRECTIONS, race
from benchmarks.peers import RefusedError, composite
from benchmarks.problems import GAMMA, Problem, Shape, synthetic_images
from benchmarks.providers import Provider, ours, providers

CPU = torch.device("cpu")
ALL = providers(CPU)
SHAPES = [Shape(5, 40, 3, "normal"), Shape(40, 60, 48, "synthetic")]
# Compiling takes these seconds for each shape, so one has to do.
COMPILED = ("KeOps", "float32 composite, torch.compile")


def runs() -> Iterator[Any]:
    for shape, provider, direction in itertools.product(SHAPES, ALL, DIRECTIONS):
        compiled = provider.name in COMPILED
        if not compiled or shape == SHAPES[0]:
            marks = [pytest.mark.exhaustive] if compiled else []
            yield pytest.param(shape, provider, direction, marks=marks)


@cache
def problem_of(shape: Shape) -> Problem:
    return shape.problem()


@pytest.fixture(autouse=True)
def short_races(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.0)


def by_name(name: str) -> Provider:
    return next(provider for provider in ALL if provider.name == name)


def exact_field(problem: Problem, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The field of queries x (b, d), t (b,) by float64 direct differences, differentiable."""
    difference = problem.x0.double() - x[:, None]
    s = difference.square().sum(2) + t.square()[:, None]
    weights = torch.softmax(-(x.shape[1] + 1) / 2 * s.log(), 1)
    v = (weights[:, :, None] * difference).sum(1)
    field = torch.cat([v, -t[:, None]], 1)
    return problem.scale * field / (field.norm(dim=1, keepdim=True) + GAMMA)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_rows_are_the_field_and_its_gradients(shape: Shape) -> None:
    problem = problem_of(shape)
    exact = problem.exact
    x = problem.x[exact.rows].double().requires_grad_()
    t = problem.t[exact.rows].double().requires_grad_()
    field = exact_field(problem, x, t)
    dx, dt = torch.autograd.grad(field, (x, t), problem.cotangent[exact.rows].double())
    assert len(exact.rows) == min(shape.B, 24)
    assert exact.rows.unique().numel() == len(exact.rows)
    torch.testing.assert_close(exact.field, field.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exact.dx, dx, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(exact.dt, dt, rtol=1e-10, atol=1e-11)
    assert (exact.kappa >= 1 - 1e-12).all()
    assert exact.forward_error(field.detach()) < 1e-12
    assert exact.forward_error(field.detach() * (1 + 1e-4)) > 0.9e-4 / float(exact.kappa.max())
    assert exact.gradient_error(dx, dt) < 1e-10
    assert exact.gradient_error(dx, dt * float("nan")) == float("inf")


@pytest.mark.parametrize(("shape", "provider", "direction"), [*runs()], ids=str)
def test_every_provider_agrees_with_the_exact_rows(
    shape: Shape, provider: Provider, direction: str
) -> None:
    (result,) = race(problem_of(shape), direction, [provider])
    if result.status == "refused" and not provider.ours:
        pytest.skip(result.note)
    assert result.status == "timed", result
    # On these shapes plain float32 is good to 1e-4; the tolerance is there for harder ones.
    assert result.error is not None
    assert result.error <= min(result.tolerance, 1e-4)
    assert len(result.seconds) == measure.MIN_ROUNDS
    assert all(seconds > 0 for seconds in result.seconds)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wrong_provider_is_not_timed(direction: str) -> None:
    calls = []

    def prepare(problem: Problem, gradient: bool) -> Any:
        right = composite(torch.float64)(problem, gradient)

        def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            calls.append(len(x))
            return right(x, t) * (1 + 1e-3)

        return field

    wrong = Provider("wrong", prepare, (1e-6, 1e-5), ours=True)
    right = by_name("float64 composite")
    rejected, timed = race(problem_of(SHAPES[0]), direction, [wrong, right])
    assert rejected.status == "wrong"
    assert rejected.error is not None
    assert 1e-5 < rejected.error < 1e-2
    assert rejected.seconds == []
    assert calls == [1, SHAPES[0].B]
    assert timed.status == "timed"


def test_a_provider_that_cannot_run_is_refused_with_the_reason() -> None:
    def unable(problem: Problem, gradient: bool) -> Any:
        raise RefusedError("it has no arms")

    greedy = dataclasses.replace(by_name("published formula"), temporaries=lambda *_: 1 << 60)
    first, second = race(
        problem_of(SHAPES[0]), "forward", [Provider("unable", unable, (1e-6, 1e-5)), greedy]
    )
    assert (first.status, first.note, first.seconds) == ("refused", "it has no arms", [])
    assert second.status == "refused"
    assert "out of memory" in second.note


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_provider_that_takes_too_much_at_once_runs_on_the_checked_queries(
    direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(SHAPES[1])
    published = by_name("published formula")
    assert published.temporaries is not None
    per_query = published.temporaries(problem, direction == "gradient")
    monkeypatch.setattr(measure, "WHOLE_BYTES", 7 * per_query)
    sizes, clock = [], iter(range(10_000))

    def prepare(problem: Problem, gradient: bool) -> Any:
        right = published.prepare(problem, gradient)
        return lambda x, t: sizes.append(len(x)) or right(x, t)

    # Each reading of the clock is 0.1 s after the last, so each call takes 0.1 s.
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock) / 10)
    (result,) = race(problem, direction, [dataclasses.replace(published, prepare=prepare)])
    trial = 2 * [1] * min(24, torch.get_num_threads())
    assert sizes[: len(trial) + 5] == [*trial, 1, 7, 7, 7, 3]
    assert result.queries == 24
    assert result.seconds == [pytest.approx(0.1 * 40 / 24)] * 3
    assert "24 of 40 queries, scaled" in result.note


@pytest.mark.parametrize(("seconds", "queries"), [(0.01, 40), (1.0, 24), (100.0, 0)])
def test_a_provider_that_takes_too_long_runs_on_fewer_queries_or_is_refused(
    seconds: float, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_call, clock = seconds * torch.get_num_threads() / 10, iter(range(10_000))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock) * per_call)
    (result,) = race(problem_of(SHAPES[1]), "forward", [by_name("published formula")])
    assert result.queries == queries
    assert result.status == ("timed" if queries else "refused")
    if not queries:
        assert result.note == "too slow: about 400 s a call"


def test_composites_in_pieces_are_the_composite(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(SHAPES[0])
    whole = composite(torch.float64)(problem, False)(problem.x, problem.t)
    monkeypatch.setattr(peers, "CACHED", 2 * SHAPES[0].N)
    sizes = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **o: sizes.append(len(a[1])) or addmm(*a, **o))
    pieces = composite(torch.float64)(problem, False)(problem.x, problem.t)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=0)


def test_keops_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pykeops", None)
    (result,) = race(problem_of(SHAPES[0]), "forward", [by_name("KeOps")])
    assert result.status == "refused"
    assert result.note.startswith("KeOps is not installed (pip install pykeops)")


def test_without_a_compiler_nothing_that_needs_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert set(machine.gflops(B=64, d=16, N=32)) <= {"mkl", "blas", "onednn"}
    (result,) = race(
        problem_of(SHAPES[0]), "forward", [by_name("float32 composite, torch.compile")]
    )
    assert (result.status, result.note) == (
        "refused",
        "torch.compile: a C++ compiler is needed, and there is none",
    )


def test_the_peak_is_of_multiply_adds_that_are_all_done() -> None:
    library = machine.compiled("fma_peak.cpp")
    if library is None:
        pytest.skip("fma_peak.cpp cannot be compiled here")
    chains, lanes = library.chain_count(), library.lane_count()
    starts = torch.arange(chains, dtype=torch.float64)
    # v -> v / 2 + 3 approaches 6 and halves the distance each time: exact in float32.
    expected = float(lanes * (6 + (starts - 6) / 2**5).sum())
    assert machine.fma_sums(library, 3, 5, 0.5, 3.0) == [expected] * 3
    assert machine.fma_sums(library, 1, 100, 1.0, 1.0) == [float(lanes * (starts + 100).sum())]


def test_our_product_gives_every_product() -> None:
    """101 references are one block of 96 and 5 more, of 300 columns 256 are multiplied first."""
    library = machine.compiled("product.cpp")
    if library is None:
        pytest.skip("product.cpp cannot be compiled here")
    generator = torch.Generator().manual_seed(0)
    # Products and sums of small integers are exact in float32.
    x = torch.randint(-50, 50, (192, 300), generator=generator).float()
    x0 = torch.randint(-50, 50, (101, 300), generator=generator).float()
    packed = machine.pack_queries(library, x)
    assert torch.equal(packed, x.view(3, 64, 300).transpose(1, 2))
    exact = (x0.double() @ x.double().T).view(101, 3, 64).transpose(0, 1)
    assert torch.equal(machine.tile_products(library, packed, x0).double(), exact)
    with pytest.raises(ValueError, match="expected a multiple of 64 queries, got 65"):
        machine.pack_queries(library, torch.zeros(65, 3))


@pytest.mark.exhaustive
def test_the_peak_and_matrix_products_are_measured() -> None:
    speeds = machine.gflops(B=64, d=16, N=32)
    expected = {"mkl" if torch.backends.mkl.is_available() else "blas"}
    expected |= {"onednn"} if torch.backends.mkldnn.is_available() else set()
    if machine.compiled("product.cpp") is not None:
        expected |= {"fma_peak", "pfgm_kernels", "pfgm_kernels on packed queries"}
    assert set(speeds) == expected
    assert all(speed > 0 for speed in speeds.values())


@pytest.mark.exhaustive
@pytest.mark.parametrize("wrong", [None, "portable"])
def test_each_instruction_set_computes_and_a_wrong_one_fails(
    wrong: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _C = pytest.importorskip("pfgm_kernels._C", reason="the extension is not built")
    from benchmarks import instruction_sets

    def prepare(problem: Problem, gradient: bool) -> Any:
        def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            used.append(_C.build_info()["instruction set"])
            return right(x, t) * (1.001 if used[-1] == wrong else 1)

        right = ours("cpu", True)(problem, gradient)
        return field

    used: list[str] = []
    monkeypatch.setattr(instruction_sets, "shapes", lambda: [SHAPES[1]])
    monkeypatch.setattr(instruction_sets, "ours", lambda *_, **__: prepare)
    names = instruction_sets.available()
    assert instruction_sets.main() == (wrong is not None)
    assert set(used) == set(names)
    assert _C.build_info()["instruction set"] == names[0]
    cells = map(str.strip, capsys.readouterr().out.splitlines()[-1].split("|")[2:-1])
    for name, cell in zip(names, cells, strict=True):
        text, _, error = cell.partition(", ")
        assert text == "wrong" if name == wrong else float(text) > 0
        assert (float(error) <= 1e-6) == (name != wrong)


def test_peak_memory_sees_what_was_freed_again() -> None:
    def prepare(problem: Problem, gradient: bool) -> Any:
        right = composite(torch.float64)(problem, gradient)
        return lambda x, t: right(x, t) + 0 * torch.ones(32 << 20).sum()

    provider = Provider("wasteful", prepare, (1e-6, 1e-5))
    (result,) = race(problem_of(SHAPES[0]), "forward", [provider])
    if result.peak_bytes is None:
        pytest.skip("this system does not let a process reset its peak memory")
    assert result.peak_bytes == pytest.approx(4 * 32 << 20, rel=0.1)


def test_synthetic_images_have_the_spectrum_of_photographs() -> None:
    images = synthetic_images(64, 3072, torch.Generator().manual_seed(0))
    again = synthetic_images(64, 3072, torch.Generator().manual_seed(0))
    assert images.shape == (64, 3072)
    assert images.dtype == torch.uint8
    assert torch.equal(images, again)
    assert images.float().std() > 40
    power = torch.fft.rfft(images.float().view(64, 3, 32, 32), dim=3).abs().square().mean((0, 1, 2))
    # Amplitudes that fall as 1/f in two dimensions leave rows with a power of about 1/f.
    slope = torch.log(power[12] / power[3]) / torch.log(torch.tensor(12 / 3))
    assert -2 < slope < -0.7
    with pytest.raises(ValueError, match="got 50"):
        synthetic_images(2, 50, torch.Generator())


def test_a_path_that_a_shell_splits_is_told(tmp_path: Path) -> None:
    assert machine.cannot_compile(tmp_path / "été" / "a-b_c.d") is None
    for name in ("a b", "$a", "it's", "a;b", "a\nb"):
        reason = machine.cannot_compile(tmp_path, tmp_path / name)
        assert reason is not None
        assert repr(str(tmp_path / name)) in reason
