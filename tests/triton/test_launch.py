# SPDX-License-Identifier: Apache-2.0
"""Is each kernel launched with what fits a GPU, and on the device of its tensors?"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from sizes import DIMENSIONS, call_all

from pfgm_kernels.backends import triton as backend

pytest.importorskip("triton", "3.6")

from pfgm_kernels.backends.triton import configurations
from pfgm_kernels.backends.triton.launch import LARGEST_BLOCK, Kernel


@Kernel
def no_kernel(x_ptr, BLOCK):
    pass


@pytest.fixture
def launches(monkeypatch):
    """Of no_kernel, which does nothing: grids, options and the device that is current."""
    current, found = [0], []

    def exchange(device):
        before, current[0] = current[0], device if device >= 0 else current[0]
        return before if device >= 0 else -1

    class Jit:
        def __getitem__(self, grid):
            return lambda *arguments, **options: found.append((grid, options, current[0]))

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    monkeypatch.setattr(no_kernel, "jit", Jit())
    yield found
    assert current == [0], "the device that was current is not so any more"


def on_gpu(index: int) -> SimpleNamespace:
    return SimpleNamespace(is_cuda=True, get_device=lambda: index)


def test_the_device_of_the_tensors_is_current_for_the_launch_and_no_longer(launches):
    no_kernel[1,](on_gpu(1), BLOCK=64)
    no_kernel[1,](on_gpu(0), BLOCK=64)
    no_kernel[1,](torch.empty(1), BLOCK=64)
    assert [device for _, _, device in launches] == [1, 0, 0]


def test_the_former_device_is_current_again_after_an_error(launches):
    with (
        mock.patch.object(no_kernel, "jit", {(1,): mock.Mock(side_effect=MemoryError)}),
        pytest.raises(MemoryError),
    ):
        no_kernel[1,](on_gpu(1), BLOCK=64)


def test_whether_products_are_added_unrounded_is_said(launches):
    no_kernel[1,](torch.empty(1), BLOCK=64, num_warps=2)
    assert launches == [((1,), {"BLOCK": 64, "num_warps": 2, "enable_fp_fusion": True}, 0)]


@pytest.mark.parametrize(
    ("grid", "fits"),
    [
        ((2**31 - 1, 65_535, 65_535), True),
        ((2**31,), False),
        ((1, 65_536), False),
        ((1, 1, 65_536), False),
        ((0,), False),
        ((1, 0), False),
    ],
)
def test_grids_that_no_gpu_has_are_refused(launches, grid, fits):
    if fits:
        no_kernel[grid](torch.empty(1), BLOCK=1)
        assert len(launches) == 1
    else:
        with pytest.raises(RuntimeError, match=r"no_kernel: .* programs along"):
            no_kernel[grid](torch.empty(1), BLOCK=1)
        assert launches == []


def test_blocks_that_registers_do_not_hold_are_refused(launches):
    no_kernel[1,](torch.empty(1), BLOCK=LARGEST_BLOCK)
    with pytest.raises(RuntimeError, match=f"no_kernel: BLOCK is {LARGEST_BLOCK + 1}"):
        no_kernel[1,](torch.empty(1), BLOCK=LARGEST_BLOCK + 1)
    assert len(launches) == 1


def kernels() -> dict[str, Kernel]:
    """All of the backend, by module and name."""
    found = {}
    for source in Path(backend.__file__).parent.glob("*.py"):
        module = importlib.import_module(f"{backend.__name__}.{source.stem}")
        for name, value in vars(module).items():
            if name.endswith("_kernel"):
                found[f"{source.stem}.{name}"] = value
    return found


def test_every_kernel_is_launched_so():
    assert all(isinstance(kernel, Kernel) for kernel in kernels().values())


# Calls of any size


@pytest.fixture
def every_launch(monkeypatch):
    """Of all kernels of the backend, which do nothing: names and grids."""
    found: list[tuple[str, tuple[int, ...]]] = []

    class Jit:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **options: found.append((self.name, grid))

    for kernel in kernels().values():
        monkeypatch.setattr(kernel, "jit", Jit(kernel.name))
    for cached in (configurations.kind, configurations.multiprocessors):
        monkeypatch.setattr(configurations, cached.__name__, cached.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize("d", DIMENSIONS)
def test_calls_of_any_size_are_launched_as_a_gpu_can(every_launch, d):
    call_all(backend, d)
    assert len({name for name, _ in every_launch}) >= 9
