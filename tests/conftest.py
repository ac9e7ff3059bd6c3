# SPDX-License-Identifier: Apache-2.0
"""Every test of the op runs on every backend that can run here, into poisoned memory."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import emulated
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from pfgm_kernels import ReferenceSet, poisson_displacement, poisson_field, posterior_mean
from pfgm_kernels.backends import BACKENDS, cpu

settings.register_profile("default", max_examples=100, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=5_000, deadline=None)
settings.register_profile("interpreted", max_examples=15, deadline=None, derandomize=True)

INTERPRETED = 5
"""Of each test so many parametrisations, evenly spread, run under Triton's interpreter, which takes
seconds for a call, and on the emulated GPU. --interpret-all runs all; on a GPU all run anyway.
"""

EMULATED = emulated.build(kind) if (kind := os.environ.get("PFGM_EMULATION")) else None
if EMULATED is not None:
    emulated.install(EMULATED)
cpu.WORK_PER_THREAD = 1  # small problems, too, are shared out among threads

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@dataclass(frozen=True)
class Backend:
    """One backend by name, with inputs taken to its device and results back to the CPU."""

    name: str
    device: torch.device

    @property
    def interpreted(self) -> bool:
        return self.name in ("triton", "cuda") and self.device.type == "cpu"

    def reason(self, d: int, requires_grad: bool = False) -> str | None:
        return BACKENDS[self.name].unsupported_reason(self.device, d, requires_grad)

    def displacement(
        self, x: Tensor, t: Tensor | float, x0: Tensor | ReferenceSet, **options: float
    ) -> tuple[Tensor, Tensor]:
        x, t, x0 = self._take(x, t, x0)
        v, log_mass = poisson_displacement(x, t, x0, backend=self.name, **options)
        return v.cpu(), log_mass.cpu()

    def field(
        self, x: Tensor, t: Tensor | float, x0: Tensor | ReferenceSet, **options: float
    ) -> Tensor:
        x, t, x0 = self._take(x, t, x0)
        return poisson_field(x, t, x0, backend=self.name, **options).cpu()

    def mean(
        self, x: Tensor, t: Tensor | float, x0: Tensor | ReferenceSet, **options: float
    ) -> Tensor:
        x, t, x0 = self._take(x, t, x0)
        return posterior_mean(x, t, x0, backend=self.name, **options).cpu()

    def _take(self, *arguments):
        requires_grad = any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
        reason = self.reason(math.prod(arguments[0].shape[1:]), requires_grad)
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


def patch_the_language_once() -> None:
    """Triton's interpreter patches triton.language at each call of a function within a kernel,
    which takes longer than the function. Once for each function does.
    """
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def call(self, *args, **kwargs):
        if self.fn not in patched:
            patched.add(self.fn)
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


SLOW = [b.name for b in available_backends() if b.interpreted]
settings.load_profile("interpreted" if SLOW else "default")
if "triton" in SLOW:
    patch_the_language_once()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--interpret-all", action="store_true", help="see INTERPRETED in conftest.py")
    help_ = "emulated kernels that no test has run are a failure"
    parser.addoption("--every-kernel", action="store_true", help=help_)


def _emulated(item: pytest.Item) -> bool:
    if item.path.name.startswith("test_cuda_"):
        return True
    tested = getattr(item, "callspec", None) and item.callspec.params.get("backend")
    return isinstance(tested, Backend) and tested.name == "cuda"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if EMULATED is not None:
        others = [item for item in items if not _emulated(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if _emulated(item)]
    if config.getoption("--interpret-all"):
        return
    groups: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        tested = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if isinstance(tested, Backend) and tested.interpreted:
            groups[item.nodeid.partition("[")[0]].append(item)
    left_out = set()
    for group in groups.values():
        step = max(1, len(group) / INTERPRETED)
        left_out |= set(group) - {group[int(i * step)] for i in range(int(len(group) / step))}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


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
    if EMULATED is not None:
        emulated.set_schedule(EMULATED, item.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if EMULATED is not None and session.config.getoption("--every-kernel"):
        missing = emulated.kernels_that_did_not_run(EMULATED)
        if missing and session.exitstatus == pytest.ExitCode.OK:
            print("\nkernels that no test has run:", *missing, sep="\n  ")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2022)
