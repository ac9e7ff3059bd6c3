# SPDX-License-Identifier: Apache-2.0
"""Do checkpoints come back bit for bit, and is anything that is not whole refused?"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pfgm_kernels import files
from pfgm_kernels.training import checkpoint
from pfgm_kernels.training.checkpoint import Checkpoints, match, read, write

TENSORS = {
    "weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "double": torch.tensor([1 / 3, float("inf"), float("nan")], dtype=torch.float64),
    "half": torch.tensor([0.1, -2.0], dtype=torch.bfloat16),
    "transposed": torch.arange(6).reshape(2, 3).T,
    "count": torch.tensor(7),
    "empty": torch.empty(0, 4),
    "state": torch.Generator().manual_seed(3).get_state(),
}
STATE = {"step": 3, "rate": 0.1 + 0.2, "groups": [{"betas": [0.9, 0.999]}]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "step_00000003.safetensors"
    write(path, TENSORS, STATE)
    return path


def test_comes_back_bit_for_bit(path: Path) -> None:
    tensors, state = read(path)
    assert state == STATE
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_truncated(path: Path, kept: int) -> None:
    content = path.read_bytes()[:kept]
    path.write_bytes(content)
    message = rf"damaged checkpoint {path}: expected a whole .*, got one of {len(content)} bytes"
    with pytest.raises(ValueError, match=message):
        read(path)


@pytest.mark.parametrize("position", [-1, -300, 200])
def test_one_bit_wrong(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"damaged checkpoint {path}: expected"):
        read(path)


def test_names_and_state_count_too(path: Path) -> None:
    tensors, _ = read(path)
    with safe_open(path, framework="pt") as file:
        entry = file.metadata()["pfgm_kernels"]
    renamed = {name.replace("weight", "weights"): tensor for name, tensor in tensors.items()}
    for altered, text in ((renamed, entry), (tensors, entry.replace('"step": 3', '"step": 4'))):
        save_file(altered, path, {"pfgm_kernels": text})
        with pytest.raises(ValueError, match="expected checksum"):
            read(path)
    save_file(tensors, path, {"pfgm_kernels": entry})
    assert read(path)[1] == STATE


def test_the_disk_has_the_content_before_the_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses its power has the old file or the new one."""
    events, replace_file = [], os.replace

    def fsync(number: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "content")

    def replace(source: str, target: Path) -> None:
        events.append("name")
        replace_file(source, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    write(path, TENSORS, STATE)
    assert events == ["content", "name", "folder"]


def test_not_a_checkpoint(path: Path, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is no checkpoint: expected the entry"):
        read(path)
    with pytest.raises(FileNotFoundError, match=r"other\.safetensors; it does not exist"):
        read(tmp_path / "other.safetensors")


def test_another_network(path: Path) -> None:
    network = nn.Linear(3, 4)
    expected = network.state_dict()
    match(path, expected, nn.Linear(3, 4).state_dict())
    message = r"expected weight float32 of shape \(4, 3\), got float32 of shape \(4, 2\)"
    with pytest.raises(ValueError, match=rf"{path} is of another network: {message}"):
        match(path, expected, nn.Linear(2, 4).state_dict())
    with pytest.raises(ValueError, match=r"expected bias float32 of shape \(4,\), got nothing"):
        match(path, expected, nn.Linear(3, 4, bias=False).state_dict())
    with pytest.raises(ValueError, match=r"expected extra nothing, got float32 of shape \(1,\)"):
        match(path, expected, dict(expected, extra=torch.zeros(1)))
    with pytest.raises(ValueError, match=r"expected bias float32 .*, got float64"):
        match(path, expected, nn.Linear(3, 4).double().state_dict())


def test_keeps_the_last_three(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest() is None
    checkpoints.folder.mkdir()
    (checkpoints.folder / "tmp123.partial").write_bytes(b"left over by a killed process")
    for step in (5, 10, 15, 20):
        checkpoints.save(step, {"weight": torch.tensor(step)}, {"step": step})
    names = [f"step_{step:08d}.safetensors" for step in (20, 15, 10)]
    assert sorted(os.listdir(checkpoints.folder), reverse=True) == names
    newest = checkpoints.newest()
    assert newest is not None
    assert newest[0].name == names[0]
    assert newest[1]["weight"] == 20
    assert newest[2] == {"step": 20}


def test_newest_that_reads_well(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"weight": torch.tensor(step)}, {"step": step})
    newest, oldest = checkpoints.paths()
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=f"damaged checkpoint {newest}"):
        found = checkpoints.newest()
    assert found is not None
    assert found[0] == oldest
    assert found[1]["weight"] == 1
    oldest.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="trying the one before it"),
        pytest.raises(ValueError, match=f"damaged checkpoint {oldest}"),
    ):
        checkpoints.newest()


def test_optimizer_comes_back(tmp_path: Path) -> None:
    """The third step of Adam is the same with and without a file in between."""

    def step(network: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        network(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()

    networks = [nn.Linear(3, 4) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [torch.optim.Adam(network.parameters(), lr=0.1) for network in networks]
    for _ in range(2):
        step(networks[0], optimizers[0])
    tensors, groups = checkpoint.flatten_optimizer(optimizers[0])
    write(tmp_path / "a", tensors, {"groups": groups})
    tensors, state = read(tmp_path / "a")
    networks[1].load_state_dict(networks[0].state_dict())
    checkpoint.load_optimizer(optimizers[1], tensors, state["groups"])
    for network, optimizer in zip(networks, optimizers, strict=True):
        step(network, optimizer)
    assert torch.equal(networks[0].weight, networks[1].weight)
    assert torch.equal(networks[0].bias, networks[1].bias)
