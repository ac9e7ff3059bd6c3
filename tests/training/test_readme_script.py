# SPDX-License-Identifier: Apache-2.0
"""Does the README's script train a network and a ZIP that the package has never seen?"""

from __future__ import annotations

import io
import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pfgm_kernels.cli import app
from pfgm_kernels.training.config import TrainConfig

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = re.search(r"^## Your network, your images\n(.*?)(?=^## )", README, re.M | re.S)
(BLOCK,) = re.findall(r"```python\n(.*?)```", SECTION[1] if SECTION else "", re.DOTALL)
REDUCED = {"steps=10_000": "steps=3", "batch_size=64": "batch_size=4", 'solver="rk45"': "steps=2"}
MODULE = """
import torch
class Network(torch.nn.Module):
    def __init__(self, hidden=4):
        super().__init__()
        self.first = torch.nn.Conv2d(4, hidden, 3, padding=1)
        self.last = torch.nn.Conv2d(hidden, 3, 3, padding=1)
    def forward(self, x, noise_condition):
        level = noise_condition[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return self.last(torch.tanh(self.first(torch.cat([x, level], 1))))
"""
FACTORIES = """
def make(event_shape, num_classes):
    return Network()
other = make
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the reader is: beside a network of his, and a ZIP."""
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for index in range(10):
            image = io.BytesIO()
            Image.new("RGB", (6, 5), (20 * index, 7, index)).save(image, "PNG")
            archive.writestr(f"holiday/{index}.png", image.getvalue())
    (tmp_path / "my_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    # What is kept of a module passes for that of another of its size, written in the same second.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def run(**changes: str) -> dict[str, object]:
    """What the script leaves behind, at a reduced size and with further changes."""
    code = BLOCK
    for whole, less in (REDUCED | changes).items():
        assert code.count(whole) == 1
        code = code.replace(whole, less)
    scope: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), scope)
    return scope


def test_it_is_short() -> None:
    assert len([line for line in BLOCK.splitlines() if line and "import" not in line]) < 10


def test_it_trains_and_goes_on(folder: Path) -> None:
    found = run()
    assert found["samples"].shape == (16, 3, 5, 6)
    assert found["samples"].isfinite().all()
    config = TrainConfig.read(folder / "runs" / "photos")
    assert (config.steps, config.flips, config.network) == (3, True, "own")
    assert (config.method, config.targets, config.D) == ("pfgmpp", "exact", 128)
    assert len(found["photos"].references) == 18
    further = run(**{"steps=10_000": "steps=5"})
    assert TrainConfig.read(folder / "runs" / "photos").steps == 5
    weights = [scope["model"].network.first.weight for scope in (found, further)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    ("mine", "other", "sentence"),
    [
        (
            "hidden=4",
            "hidden=6",
            r"first.bias float32 of shape \(6,\), got float32 of shape \(4,\)",
        ),
        ("3, 3, padding", "3, 3, bias=False, padding", "last.bias nothing, got float32 of shape"),
    ],
)
def test_it_refuses_to_go_on_with_another_network(
    folder: Path, mine: str, other: str, sentence: str
) -> None:
    run()
    kept = {path: path.read_bytes() for path in (folder / "runs").rglob("*.[ys]a*")}
    assert len(kept) == 3  # settings, a checkpoint and the model
    assert MODULE.count(mine) == 1
    (folder / "my_nets.py").write_text(MODULE.replace(mine, other))
    del sys.modules["my_nets"]
    with pytest.raises(ValueError, match=f"is of another network: expected .*{sentence}") as caught:
        run(**{"steps=10_000": "steps=5"})
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in kept} == kept


def test_the_lines_for_diffusers(folder: Path) -> None:
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "Pipeline" in b)
    start = ("train", "--data", "digits", "--out", "run", "steps=1", "batch_size=4")
    for words in (start, ("export", "--model", "run", "--out", "exported")):
        assert CliRunner().invoke(app, words).exit_code == 0
    scope: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert [image.size for image in scope["images"]] == [(8, 8)] * 16


def test_a_network_by_name_is_told_from_another(folder: Path) -> None:
    """On the command line: the same weights under another name are another network, too."""
    (folder / "my_nets.py").write_text(MODULE + "\n\n" + FACTORIES)
    start = ("train", "--data", "photos.zip", "--out", "run", "--steps", "1", "batch_size=4")
    result = CliRunner().invoke(app, [*start, "--network", "my_nets:make"])
    assert result.exit_code == 0, result.output
    options = ("train", "--out", "run", "--resume", "--steps", "2", "--network")
    refused = CliRunner().invoke(app, [*options, "my_nets:other"])
    assert refused.exit_code == 2
    assert refused.stderr == (
        "pfgm: run holds another run: expected network = 'my_nets:make', got 'my_nets:other'\n"
    )
    assert CliRunner().invoke(app, [*options, "my_nets:make"]).exit_code == 0
