# SPDX-License-Identifier: Apache-2.0
"""What does the extension contain, and does it say where it can run?"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pfgm_kernels import poisson_field, report
from pfgm_kernels.backends import BACKENDS, _native, cuda

GPU = torch.device("cuda", 0)
needs_extension = pytest.mark.skipif(
    _native.missing_reason is not None, reason=str(_native.missing_reason)
)


@needs_extension
@pytest.mark.skipif(shutil.which("readelf") is None, reason="there is no readelf")
def test_the_extension_links_neither_torch_nor_the_cuda_runtime() -> None:
    def readelf(option: str) -> str:
        command = ["readelf", "-W", option, _native._C.__file__]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    needed = [line.split("[")[1] for line in readelf("--dynamic").splitlines() if "NEEDED" in line]
    assert any(name.startswith("libc.so") for name in needed)
    assert not [name for name in needed if any(w in name for w in ("torch", "c10", "cuda", "nv"))]
    # The static runtime's symbols are hidden: none is taken from, or lent to, torch's own.
    rows = [line.split() for line in readelf("--dyn-syms").splitlines()]
    symbols = [row[7] for row in rows if len(row) > 7]
    assert "PyInit__C" in symbols
    assert not [name for name in symbols if name.startswith(("cuda", "__cuda"))]


@needs_extension
def test_build_info() -> None:
    info = _native.build_info
    assert any(c.isdigit() for c in info["compiler"])
    assert info["instruction set"] in ("portable", "avx2", "avx512", "avx512vnni")
    if info["CUDA"] == "none":
        assert "architectures" not in info
    else:
        assert [int(part) for part in info["CUDA"].split(".")] >= [12, 0]
        assert all(arch.isdigit() for arch in info["architectures"].split(";"))
    assert all(value in report()["extension"] for value in info.values())


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this look like a machine with a GPU, an extension and a driver of some kind."""

    def pretend(
        capability: tuple[int, int] = (9, 0),
        cuda_version: str = "13.0",
        missing: str | None = None,
        unavailable: str | None = None,
        torch_finds_gpu: bool = True,
    ) -> None:
        info = {"CUDA": cuda_version, "architectures": "80;90;100;120"}
        monkeypatch.setattr(_native, "missing_reason", missing)
        monkeypatch.setattr(_native, "build_info", info)
        monkeypatch.setattr(_native, "cuda_unavailable", lambda: unavailable)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_finds_gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretend


def test_a_machine_that_can_run_it(machine: Callable[..., None]) -> None:
    machine()
    assert cuda.unsupported_reason() is None
    assert cuda.unsupported_reason(GPU) is None


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"missing": "the extension is not built"}, "the extension is not built"),
        ({"cuda_version": "none"}, "the extension was built without CUDA: nvcc was not found"),
        ({"unavailable": "no driver is installed"}, r"no CUDA device .*\(no driver is installed\)"),
        ({"torch_finds_gpu": False}, "this torch finds no CUDA device"),
        ({"capability": (7, 5)}, "built for 80, 90, 100, 120, the GPU is 75"),
    ],
)
def test_a_machine_that_cannot(
    machine: Callable[..., None], state: dict[str, Any], reason: str
) -> None:
    machine(**state)
    for arguments in ((), (GPU,)):
        assert re.search(reason, str(cuda.unsupported_reason(*arguments)))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((torch.device("cpu"),), "it computes on CUDA tensors, got cpu"),
    ],
)
def test_inputs_that_it_cannot_take(
    machine: Callable[..., None], arguments: tuple[torch.device], reason: str
) -> None:
    machine()
    assert reason in str(cuda.unsupported_reason(*arguments))


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((7, 5), False),
        ((8, 0), True),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 3), True),
        ((11, 0), False),
        ((12, 1), True),
        ((13, 0), True),
    ],
)
def test_machine_code_within_a_major_version_and_ptx_from_then_on(
    capability: tuple[int, int], runs: bool
) -> None:
    assert cuda.runs_on(capability, ["80", "90", "100", "120"]) == runs


def test_machine_code_of_a_later_minor_version_does_not_run() -> None:
    assert not cuda.runs_on((8, 0), ["86", "90"])
    assert cuda.runs_on((8, 9), ["86", "90"])


def test_the_report_names_every_backend() -> None:
    assert report().keys() == {*BACKENDS, "extension"}
    if not torch.cuda.is_available():
        assert report()["cuda"] == cuda.unsupported_reason() != "available"


def test_asking_for_it_on_the_cpu_says_why_not() -> None:
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run here: "):
        poisson_field(torch.zeros(2, 3), 1.0, torch.ones(4, 3), backend="cuda")


@needs_extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_without_a_device_raises() -> None:
    if _native.build_info["CUDA"] == "none":
        pytest.skip("the extension was built without CUDA")
    t = torch.ones(2, dtype=torch.float64)
    crowd = torch.zeros(cuda.CROWD_BLOCKS, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="CUDA error: "):
        cuda.forward(torch.ones(2, 3), t, torch.ones(4, 3), torch.empty(0), [crowd], 4.0)
