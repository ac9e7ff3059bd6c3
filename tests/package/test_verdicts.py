# SPDX-License-Identifier: Apache-2.0
"""Are verdicts kept for as long as they hold, found once, and never while a graph is captured?"""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stand_ins import backend
from torch._subclasses import FakeTensorMode

from pfgm_kernels import proof
from pfgm_kernels.backends import BACKENDS
from pfgm_kernels.problems import Family
from pfgm_kernels.proof import Verdict

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FAMILY = Family(0, False, False)
PASSED, FAILED = Verdict(True, "as it should"), Verdict(False, "tails: off by 7 × allowed")


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, Family]]:
    """What was checked, in a process that knows nothing and with a cache folder of its own."""
    done: list[tuple[str, Family]] = []

    def check(name: str, family: Family, device: torch.device) -> Verdict:
        done.append((name, family))
        return FAILED if name == "cuda" else PASSED

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(proof, "check", check)
    monkeypatch.setattr(proof, "_verdicts", {})
    return done


def in_a_new_process() -> None:
    proof._verdicts.clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that there is one."""

    def pretend(name: str = "H200", capability: tuple[int, int] = (9, 0), captures: bool = False):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)

    pretend()
    return pretend


def test_once_for_each_family_and_device(checks, gpu):
    for _ in range(3):
        assert proof.proven("triton", FAMILY, GPU)
        assert proof.proven("triton", FAMILY, CPU)
        assert proof.proven("triton", FAMILY._replace(codes=True), GPU)
    assert len(checks) == 3


def test_a_failure_warns_once(checks):
    with pytest.warns(RuntimeWarning, match=r"'cuda' failed .* cpu for d ≤ 32.*off by 7 × allowed"):
        assert not proof.proven("cuda", FAMILY, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not proof.proven("cuda", FAMILY, CPU)
    in_a_new_process()
    with pytest.warns(RuntimeWarning, match="off by 7 × allowed"):
        assert not proof.proven("cuda", FAMILY, CPU)
    assert len(checks) == 1


def test_another_process_finds_the_verdict(checks, gpu, tmp_path):
    assert proof.recall("triton", FAMILY, GPU) is None
    assert proof.proven("triton", FAMILY, GPU)
    in_a_new_process()
    assert proof.recall("triton", FAMILY, GPU) == PASSED
    assert proof.proven("triton", FAMILY, GPU)
    assert proof.recall("triton", FAMILY._replace(band=1), GPU) is None
    assert proof.recall("cuda", FAMILY, GPU) is None
    assert len(checks) == 1
    (file,) = (tmp_path / "cache" / "pfgm_kernels").rglob("*.json")
    assert json.loads(file.read_text())["environment"]["device"] == "H200"


CHANGES: dict[str, Callable[[pytest.MonkeyPatch, Callable[..., None]], None]] = {
    "device": lambda patch, gpu: gpu(name="H100"),
    "capability": lambda patch, gpu: gpu(capability=(10, 0)),
    "driver": lambda patch, gpu: proof.DRIVER.write_text("580.126"),
    "torch": lambda patch, gpu: patch.setattr(torch, "__version__", "2.14.0"),
    "triton": lambda patch, gpu: patch.setattr(proof.triton, "version", lambda: "3.10.0"),
    "sources": lambda patch, gpu: patch.setattr(proof, "_sources", lambda: "others"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_verdict_expires(monkeypatch, checks, gpu, tmp_path, what):
    monkeypatch.setattr(proof, "DRIVER", tmp_path / "version")
    proof.DRIVER.write_text("580.65")
    assert proof.proven("triton", FAMILY, GPU)
    before = proof.environment(GPU)
    CHANGES[what](monkeypatch, gpu)
    after = proof.environment(GPU)
    assert [key for key in before if before[key] != after[key]] == [what]
    in_a_new_process()
    assert proof.recall("triton", FAMILY, GPU) is None
    assert proof.proven("triton", FAMILY, GPU)
    assert len(checks) == 2


def test_sources_are_those_of_the_kernels(monkeypatch):
    read, seen = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: seen.append(path.name) or read(path))
    assert len(proof._sources.__wrapped__()) == 64
    extension = {Path(proof._native._C.__file__).name} if proof._native.build_info else set()
    assert {"eager.py", "route.py", "cuda.py", "chunks.py", "proof.py", *extension} <= {*seen}


SPOILED = {
    "empty": b"",
    "cut off": b'{"environment": {"torch',
    "no JSON": b"\xff\xfe\x00",
    "no object": b"[true]",
    "nothing in it": b"{}",
    "of another kind": b'{"environment": {}, "passed": "yes", "figures": 3}',
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", SPOILED.values(), ids=SPOILED)
def test_a_file_that_says_nothing_is_written_anew(checks, content):
    file = proof._file("triton", FAMILY, CPU)
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert proof.proven("triton", FAMILY, CPU)
    in_a_new_process()
    assert proof.recall("triton", FAMILY, CPU) == PASSED
    assert len(checks) == 1


def test_a_verdict_of_another_environment_is_not_taken(checks):
    proof.proven("triton", FAMILY, CPU)
    file = proof._file("triton", FAMILY, CPU)
    content = json.loads(file.read_bytes())
    content["environment"]["torch"] = "0.4"
    file.write_text(json.dumps(content))
    in_a_new_process()
    assert proof.recall("triton", FAMILY, CPU) is None


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("spoil", ["a folder's place", "a file's place", "no home"])
def test_without_a_cache_folder_verdicts_live_in_memory(monkeypatch, checks, tmp_path, spoil):
    if spoil == "a folder's place":
        (tmp_path / "cache").write_text("not a folder")
    elif spoil == "a file's place":
        proof._file("triton", FAMILY, CPU).mkdir(parents=True)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setattr(Path, "home", no_home)
    for _ in range(2):
        assert proof.proven("triton", FAMILY, CPU)
    assert len(checks) == 1


def test_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert proof._file("triton", FAMILY, CPU).is_relative_to(tmp_path / ".cache/pfgm_kernels")


def test_capture_is_no_time_to_prove(checks, gpu):
    gpu(captures=True)
    message = r"'triton' has yet to prove itself on cuda:0 .* call the op once before"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            proof.proven("triton", FAMILY, GPU)
    assert checks == []
    gpu(captures=False)
    assert proof.proven("triton", FAMILY, GPU)
    gpu(captures=True)
    assert proof.proven("triton", FAMILY, GPU)
    in_a_new_process()
    assert proof.proven("triton", FAMILY, GPU)  # what another process left can be read
    assert len(checks) == 1


def test_threads_wait_for_one_check(monkeypatch, checks):
    check = proof.check

    def slow(*arguments):
        time.sleep(0.1)
        return check(*arguments)

    monkeypatch.setattr(proof, "check", slow)
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.append(proof.proven("triton", FAMILY, CPU)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4
    assert len(checks) == 1


def test_want_of_memory_is_no_verdict(monkeypatch, checks):
    def check(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    works = proof.check
    monkeypatch.setattr(proof, "check", check)
    with pytest.warns(RuntimeWarning, match="not enough memory"):
        assert not proof.proven("triton", FAMILY, CPU)
    assert not proof.proven("triton", FAMILY, CPU)  # a call with no memory is not to look each time
    in_a_new_process()
    monkeypatch.setattr(proof, "check", works)
    assert proof.proven("triton", FAMILY, CPU)


def test_kernels_without_memory_are_not_said_to_be_wrong(monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(BACKENDS, "triton", backend(forward=forward))
    with pytest.raises(torch.OutOfMemoryError):
        proof.check("triton", FAMILY, CPU)


MODES = {
    "fake tensors": FakeTensorMode,
    "another default device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_nothing_that_the_caller_is_within_matters(monkeypatch, checks, mode):
    monkeypatch.undo()
    monkeypatch.setattr(proof, "_verdicts", {})
    monkeypatch.setattr(proof, "write_bytes", lambda *_: None)
    monkeypatch.setitem(BACKENDS, "triton", backend())
    with MODES[mode]():
        assert proof.prove("triton", FAMILY, CPU).passed


def test_nor_does_a_transform(monkeypatch):
    monkeypatch.setattr(proof, "_verdicts", {})
    monkeypatch.setattr(proof, "write_bytes", lambda *_: None)
    monkeypatch.setitem(BACKENDS, "triton", backend())
    found = []

    def prove(x: torch.Tensor) -> torch.Tensor:
        found.append(proof.prove("triton", FAMILY, CPU).passed)
        return x

    torch.func.jvp(prove, (torch.ones(2),), (torch.ones(2),))
    torch.func.vmap(prove)(torch.ones(2))
    torch.func.grad(lambda x: prove(x).sum())(torch.ones(2))
    assert found == [True] * 3
