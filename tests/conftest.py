# SPDX-License-Identifier: Apache-2.0
"""Every test of the op runs on every backend that can run here, into poisoned memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import emulated
import interpreted
import pytest
import selection
import tensor_core
import torch
from hypothesis import settings
from torch import Tensor

from pfgm_kernels import (
    ReferenceSet,
    choice,
    divergence,
    log_density,
    poisson_displacement,
    poisson_field,
    posterior_mean,
)
from pfgm_kernels.backends import BACKENDS, cpu

settings.register_profile("default", max_examples=100, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=5_000, deadline=None)
settings.register_profile("interpreted", max_examples=15, deadline=None, derandomize=True)

EMULATED = emulated.build(kind) if (kind := os.environ.get("PFGM_EMULATION")) else None
if EMULATED is not None:
    emulated.install(EMULATED)
cpu.WORK_PER_THREAD = 1  # small problems, too, are shared out among threads

DID_NOT_RUN: list[set[str]] = []
"""Kernels, for each worker of pytest-xdist."""

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@dataclass(frozen=True)
class Backend:
    """One backend by name, with inputs taken to its device and results back to the CPU."""

    name: str
    device: torch.device

    @property
    def interpreted(self) -> bool:
        return self.name in ("triton", "cuda") and self.device.type == "cpu"

    def reason(self) -> str | None:
        return BACKENDS[self.name].unsupported_reason(self.device)

    def displacement(
        self, x: Tensor, t: Tensor | float, x0: Tensor | ReferenceSet, **options: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        (x, t, x0), options = self._take(x, t, x0), self._moved(options)
        v, log_mass = poisson_displacement(x, t, x0, backend=self.name, **options)
        return v.cpu(), log_mass.cpu()

    def field(
        self, x: Tensor, t: Tensor | float, x0: Tensor | ReferenceSet, **options: float | Tensor
    ) -> Tensor:
        (x, t, x0), options = self._take(x, t, x0), self._moved(options)
        return poisson_field(x, t, x0, backend=self.name, **options).cpu()

    def mean(
        self, x: Tensor, t: Tensor | float, x0: Tensor | ReferenceSet, **options: float | Tensor
    ) -> Tensor:
        (x, t, x0), options = self._take(x, t, x0), self._moved(options)
        return posterior_mean(x, t, x0, backend=self.name, **options).cpu()

    def _moved(self, options):
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in options.items()}

    def log_density(
        self, x: Tensor, t: Tensor | float, x0: Tensor | ReferenceSet, **options: float | Tensor
    ) -> Tensor:
        (x, t, x0), options = self._take(x, t, x0), self._moved(options)
        return log_density(x, t, x0, backend=self.name, **options).cpu()

    def divergence(
        self, x: Tensor, t: Tensor | float, x0: Tensor | ReferenceSet, **options: float | Tensor
    ) -> Tensor:
        (x, t, x0), options = self._take(x, t, x0), self._moved(options)
        return divergence(x, t, x0, backend=self.name, **options).cpu()

    def _take(self, *arguments):
        reason = self.reason()
        if reason is not None:
            pytest.skip(f"{self.name}: {reason}")
        return [a if isinstance(a, float | int) else a.to(self.device) for a in arguments]


def available_backends() -> list[Backend]:
    """Each backend with the first device that it runs on."""
    found = []
    for name, module in BACKENDS.items():
        devices = [torch.device(d) for d in DEVICES]
        if module.unsupported_reason() is None:
            runs_on = [d for d in devices if module.unsupported_reason(d) is None]
            found += [Backend(name, device) for device in runs_on[:1]]
    return found


SLOW = [b.name for b in available_backends() if b.interpreted]
settings.load_profile("interpreted" if SLOW else "default")
if "triton" in SLOW:
    interpreted.install()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", choices=selection.PARTS, help="see selection.py; all by default")
    parser.addoption("--interpret-all", action="store_true", help="what selection.py leaves out")
    help_ = "interpreted or emulated kernels that no test has run are a failure"
    parser.addoption("--every-kernel", action="store_true", help=help_)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "exhaustive: takes long, for `make check` alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[selection.COLLECTED] = [*items]
    chosen = set(items)
    if EMULATED is not None:
        chosen = {
            item
            for item in items
            if item.path.name.startswith("test_cuda_") or selection.place(item) == "cuda"
        }
    if not config.getoption("--interpret-all"):
        candidates = [item for item in items if item in chosen]
        slow = [
            {item for item in candidates if selection.place(item) == name and name in SLOW}
            for name in ("cuda", "triton")
        ]
        chosen = selection.choose(candidates, config.getoption("--part"), *slow)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


@pytest.fixture(scope="module", params=available_backends(), ids=lambda b: b.name)
def backend(request: pytest.FixtureRequest, poison: None) -> Backend:
    return request.param


@pytest.fixture(scope="module")
def poison() -> Iterator[None]:
    """Fresh memory is NaN (integers: their maximum): a value that nothing wrote cannot pass."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    choice._reason.cache_clear()  # a test may have pretended to be on another machine
    interpreted.CORE = tensor_core.of_test(item.nodeid)
    if EMULATED is not None:
        emulated.set_up(EMULATED, item.nodeid, interpreted.CORE)


def kernels_that_did_not_run() -> set[str]:
    found = emulated.kernels_that_did_not_run(EMULATED) if EMULATED is not None else []
    return {*found, *(interpreted.kernels_that_did_not_run() if "triton" in SLOW else [])}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """A worker of pytest-xdist has ended."""
    DID_NOT_RUN.append({*getattr(node, "workeroutput", {}).get("did not run", [])})


def pytest_sessionfinish(session: pytest.Session) -> None:
    config, missing = session.config, kernels_that_did_not_run().intersection(*DID_NOT_RUN)
    if hasattr(config, "workeroutput"):
        config.workeroutput["did not run"] = [*missing]
    elif missing and config.getoption("--every-kernel"):
        print("\nkernels that no test has run:", *sorted(missing), sep="\n  ")
        if session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2022)
