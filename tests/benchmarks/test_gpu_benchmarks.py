# SPDX-License-Identifier: Apache-2.0
"""Do the parts of the benchmarks that serve a GPU work, as far as a CPU can tell?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import gpu_peers, machine, measure, problems, report
from benchmarks.measure import DIRECTIONS, race
from benchmarks.problems import Shape, shapes
from benchmarks.providers import Provider, providers

CUDA = torch.device("cuda")
SPLIT = Provider("split", gpu_peers.split_composite, (1e-2, 1e-2), one_batch_size=True)


@pytest.fixture(autouse=True)
def short_races(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("shape", "worst"),
    [
        # The product of the low parts is left out, 2⁻¹⁶ of the distances: logits are off by 2e-5.
        (Shape(40, 600, 64, "normal"), 1e-4),
        (Shape(40, 200, 768, "synthetic"), 1e-6),
    ],
    ids=str,
)
def test_split_products_are_as_accurate_as_float32(
    shape: Shape, worst: float, direction: str
) -> None:
    (result,) = race(shape.problem(), direction, [SPLIT])
    assert result.status == "timed", result
    assert result.error is not None
    assert result.error < worst


def test_two_parts_hold_16_bits() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e3
    high, low = gpu_peers._halves(x)
    assert high.dtype == low.dtype == torch.bfloat16
    assert ((high.float() - x).abs() <= 2**-8 * x.abs()).all()
    assert ((high.double() + low.double() - x).abs() <= 2**-16 * x.abs()).all()


@pytest.mark.exhaustive
def test_a_compiler_keeps_the_low_part() -> None:
    """torch.compile takes a rounding to bfloat16 and back for nothing at all."""
    if reason := machine.cannot_compile(torch.__file__):
        pytest.skip(reason)
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.compile(gpu_peers._three, dynamic=True)(x), gpu_peers._three(x))


def test_what_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {provider.name for provider in providers(CUDA)}
    on_cpu = {provider.name for provider in providers(torch.device("cpu"))}
    assert "bfloat16 split products" in names - on_cpu
    assert "float32 composite, oneDNN" in on_cpu - names
    monkeypatch.delenv("PFGM_DATA", raising=False)
    larger = set(shapes(on_gpu=True))
    dimensions = {shape.d for shape in larger}
    assert {shape for shape in shapes() if shape.d in dimensions} < larger
    assert shapes(on_gpu=True)[0] == Shape(512, 50_000, 3072, "synthetic"), "the order of worth"
    monkeypatch.setenv("PFGM_DATA", "somewhere")
    real = set(shapes(on_gpu=True)) - larger
    assert {shape.source for shape in real} == {"mnist", "cifar10"}
    assert max(shape.N for shape in real) == 16_000


def test_only_the_files_that_the_images_take_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pfgm_kernels.training.data import idx_cifar

    folder = tmp_path / "cifar10"
    folder.mkdir()
    for number in (1, 2, 3):
        (folder / f"data_batch_{number}.xz").touch()
    monkeypatch.setenv("PFGM_DATA", str(tmp_path))
    monkeypatch.setattr(idx_cifar, "CIFAR_ROWS", 4)
    monkeypatch.setattr(
        idx_cifar,
        "read_cifar_batch",
        lambda file: (torch.full((4, 3, 2, 2), int(file.stem[-1])), torch.zeros(4)),
    )
    assert problems.real_images("cifar10", 6)[:, 0].tolist() == [1, 1, 1, 1, 2, 2]


def test_a_provider_that_breaks_does_not_stop_the_race() -> None:
    def broken(problem: Any, gradient: bool) -> Any:
        raise RuntimeError("no kernel image\nis available")

    names = ("broken", broken), ("split", gpu_peers.split_composite)
    peers = [Provider(name, prepare, (1e-2, 1e-2)) for name, prepare in names]
    failed, timed = race(Shape(5, 40, 3, "normal").problem(), "forward", peers)
    assert (failed.status, failed.note) == ("failed", "RuntimeError: no kernel image")
    assert timed.status == "timed"


class Event:
    """Of a GPU on which each of the calls between two events takes 3 ms."""

    calls = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.calls

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 3.0 * (end.at - self.at)


def test_a_round_on_a_gpu_is_of_calls_that_follow_one_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def call() -> tuple[torch.Tensor, ...]:
        Event.calls += 1
        return ()

    assert measure.timed(call, CUDA, 5) == pytest.approx(3e-3)
    assert Event.calls == 5
    assert measure.calls_a_round(call, CUDA) == 3
    monkeypatch.setattr(measure, "GPU_ROUND", 1.0)
    assert measure.calls_a_round(call, CUDA) == measure.GPU_CALLS
    monkeypatch.setattr(measure, "GPU_ROUND", 1e-3)
    assert measure.calls_a_round(call, CUDA) == 1
    assert measure.calls_a_round(call, torch.device("cpu")) == 1


@pytest.mark.parametrize(
    ("source", "direction", "expected"),
    [
        # 635.9 µs of 8-bit references, 953.8 µs of others; with gradients 5 products for 2.
        ("synthetic", "forward", "50.0%"),
        ("normal", "forward", "75.0%"),
        ("synthetic", "gradient", "125.0%"),
    ],
)
def test_a_gpu_is_held_against_its_floor(source: str, direction: str, expected: str) -> None:
    shape = {"B": 512, "N": 50_000, "d": 3072, "source": source}
    row = {"shape": shape, "direction": direction}
    machine = {"device": "NVIDIA H200", "fma_peak_gflops": None}
    assert report._share(row, 2 * 635.9e-6, machine) == expected
    assert report._share(row, 1.0, machine | {"device": "NVIDIA Something"}) == "–"
