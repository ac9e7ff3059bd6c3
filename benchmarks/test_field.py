# SPDX-License-Identifier: Apache-2.0
"""The field, and the field with its gradients for x and t: every provider on every shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import Races, device
from benchmarks.measure import DIRECTIONS
from benchmarks.problems import Shape, shapes
from benchmarks.providers import Provider, providers


class RecordedClock:
    """A timer that shows durations measured earlier.

    pytest-benchmark times one function to its end, but the providers have to alternate: so the race
    measures, and pytest-benchmark reads the durations from this clock.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def player(self, durations: Iterable[float]) -> Callable[[], None]:
        """A function whose calls take the durations, one after the other, on this clock."""
        self.now = 0.0
        remaining = iter(durations)

        def play() -> None:
            self.now += next(remaining)

        return play


CLOCK = RecordedClock()


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", providers(device()), ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", shapes(on_gpu=device().type == "cuda"), ids=str)
def test_field(
    shape: Shape, direction: str, provider: Provider, races: Races, benchmark: BenchmarkFixture
) -> None:
    result = races.result(shape, direction, provider)
    if result.status == "timed":
        info = asdict(result)
        seconds = info.pop("seconds")
        benchmark.group = f"{shape} {direction}"
        benchmark.extra_info |= {"shape": asdict(shape), "direction": direction, **info}
        benchmark.pedantic(CLOCK.player(seconds), rounds=len(seconds))
        return
    benchmark.skipped = True
    if result.status == "failed" and provider.ours:
        pytest.fail(result.note)
    if result.status == "wrong" and provider.ours:
        pytest.fail(f"error {result.error:.1e}, expected at most {result.tolerance:.0e}")
    pytest.skip(f"{result.status}: error {result.error}, {result.note}")
