# SPDX-License-Identifier: Apache-2.0
"""Does `pfgm interpolate` go from one image to the other, by way of the model?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import pfgm
from PIL import Image
from rich.console import Console
from torch import Tensor

from pfgm_kernels import figures
from pfgm_kernels.training import data
from pfgm_kernels.training.interpolation import paths
from pfgm_kernels.training.trainer import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    options = ("--steps", 4, "width=16", "depth=1", "checkpoint_every=2", "--conditional")
    assert pfgm("train", "--data", "digits", "--out", folder, *options).exit_code == 0
    return folder


def test_the_ends_come_back(run: Path) -> None:
    digits, seen = data.load("digits"), []
    model, config = load_model(run)

    def watched(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels.tolist())
        return model(x, t, labels=labels)

    options: dict[str, Any] = {"sigma_min": 0.05, "rtol": 1e-5, "console": Console(quiet=True)}
    with torch.no_grad():
        found = paths(watched, config, digits, (3, 1, 8), 5, **options)
    assert found.shape == (2, 7, 8, 8)
    ends = digits.decode(digits.held_out[[3, 1, 8]])
    for path, a, b in ((found[0], *ends[:2]), (found[1], *ends[1:])):
        assert torch.equal(path[0], a)
        assert torch.equal(path[-1], b)
        torch.testing.assert_close(path[1], a, rtol=0, atol=2e-3)
        torch.testing.assert_close(path[-2], b, rtol=0, atol=2e-3)
        steps = (path[2:-1] - path[1:-2]).flatten(1).norm(dim=1)
        assert steps.max() < (b - a).norm()
        assert steps.min() > 0
    first, second, third = digits.held_out_labels[[3, 1, 8]].tolist()
    assert seen[0] == [first, second, third]
    assert [first] * 3 + [second] * 2 in seen
    assert [second] * 3 + [third] * 2 in seen


def test_the_command(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, draw = [], figures.draw_samples
    monkeypatch.setattr(
        figures, "draw_samples", lambda *a, **k: shown.append((a[0], k)) or draw(*a, **k)
    )
    out = tmp_path / "new" / "way.png"
    quick = ("interpolate", "--model", run, "--rtol", 0.01, "--sigma-min", 0.1, "--out")
    result = pfgm(*quick, out, "--images", "4,2", "--columns", 3, "--step", 2)
    assert result.exit_code == 0, result.output
    assert f"1 rows of 3 images: {out}" in result.stdout
    ((images, options),) = shown
    digits = data.load("digits")
    assert options == {"columns": 5}
    assert torch.equal(images[[0, -1]], digits.decode(digits.held_out[[4, 2]]))
    with Image.open(out) as picture:
        assert picture.width > 2 * picture.height
    out = tmp_path / "x.png"
    for arguments, expected in (
        ((out, "--images", "1"), "images expects two or more held-out rows from 0 to 359, got [1]"),
        ((out, "--images", "0,360"), "held-out rows from 0 to 359, got [0, 360]"),
        ((out, "--images", "a,b"), "--images expects integers as in 1,2, got 'a,b'"),
        ((out, "--columns", 1), "columns expects an integer ≥ 2, got 1"),
        ((out, "--data", "two_moons"), "as the run's are, got points of shape (2,)"),
        ((tmp_path / "x.gif",), "--out expects a file name that ends in .png"),
    ):
        refused = pfgm(*quick, *arguments)
        assert refused.exit_code == 2, refused.output
        assert expected in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert not out.exists()
