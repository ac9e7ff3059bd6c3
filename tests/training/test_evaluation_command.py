# SPDX-License-Identifier: Apache-2.0
"""Does `pfgm evaluate` judge what it was given, and leave what it says?"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import assert_refused, pfgm
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from pfgm_kernels import figures
from pfgm_kernels.training import data, evaluation
from pfgm_kernels.training.evaluation import Evaluation
from pfgm_kernels.training.generate import Sampler, Sampling
from pfgm_kernels.training.samples import collect
from pfgm_kernels.training.trainer import load_model

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


class Means(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0].float().mean(dim=2)


@pytest.fixture(scope="module")
def means(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features") / "means.pt"
    torch.jit.script(Means()).save(str(path))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert pfgm("train", "--data", "digits", "--out", folder, "--steps", 2).exit_code == 0
    return folder


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The samples that are judged."""
    found: list[Tensor] = []
    evaluate = evaluation.evaluate

    def watched(samples: Tensor, *arguments: object, **options: object) -> Evaluation:
        found.append(samples)
        return evaluate(samples, *arguments, **options)

    monkeypatch.setattr(evaluation, "evaluate", watched)
    return found


def test_a_model(run: Path, means: Path, tmp_path: Path, judged: list[Tensor]) -> None:
    out = tmp_path / "new" / "judged"
    options = ("--seeds", "7-26", "--solver", "euler", "--steps", 3, "--batch", 6, "--step", 2)
    result = pfgm("evaluate", "--model", run, "--features", means, "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert "8 features by means.pt, n = 20" in result.stdout
    network, config = load_model(run)
    sampler = Sampler(network, config, Sampling("euler", 3, batch=6))
    assert torch.equal(judged[0], collect(sampler, range(7, 27), Console(quiet=True))[0])
    metrics = json.loads((out / "metrics.json").read_text())
    digest = hashlib.sha256(means.read_bytes()).hexdigest()
    source = {"model": str(run), "step": 2, "seeds": "7-26", "nfe": 4, "solver": "euler"}
    source |= {"steps": 3, "batch": 6, "data": "digits", "features": digest}
    assert metrics["source"] == metrics["source"] | source
    assert (metrics["samples"], metrics["count"], metrics["feature_count"]) == (20, 20, 8)
    assert metrics["sample"]["inception_score"] is None
    with Image.open(out / "samples.png") as picture:
        assert picture.size[0] > 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty digits, held out, as files."""
    path = tmp_path / "digits"
    path.mkdir()
    for i, image in enumerate(data.load("digits").held_out[:30]):
        Image.fromarray(image.numpy()).save(path / f"{i:06d}.png")
    return path


@pytest.mark.exhaustive
def test_a_folder_by_a_classifier(folder: Path, tmp_path: Path, judged: list[Tensor]) -> None:
    options = ("--images", folder, "--data", "digits")
    result = pfgm("evaluate", *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "30 samples judged" in result.stdout
    assert torch.equal(judged[0], data.load("digits").held_out[:30])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["source"] == {"images": str(folder), "data": "digits", "features": None}
    assert metrics["features"] == "perceptron"
    assert metrics["sample"]["inception_score"] > 5
    before = (tmp_path / "out" / "metrics.json").read_bytes()
    again = pfgm("evaluate", *options, "--out", tmp_path / "out", "--count", 10)
    assert_refused(again, "out already holds an evaluation: overwrite it with --replace")
    assert (tmp_path / "out" / "metrics.json").read_bytes() == before
    assert len(judged) == 1


def test_a_file_that_replaces(folder: Path, means: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=data.load("digits").held_out[:40].numpy())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples.png").write_text("of another evaluation")
    options = ("--images", tmp_path / "x.npz", "--data", "digits", "--features", means)
    options = (*options, "--count", 25, "--out", tmp_path / "out")
    assert_refused(pfgm("evaluate", *options), "already holds an evaluation")
    result = pfgm("evaluate", *options, "--replace")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["samples"] == 25
    assert (tmp_path / "out" / "samples.png").stat().st_size > 10_000


def test_refusals(run: Path, means: Path, folder: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    either = "expected either --model or --images"
    assert_refused(pfgm("evaluate", *out), either)
    assert_refused(pfgm("evaluate", *out, "--model", run, "--images", folder), either)
    without = pfgm("evaluate", *out, "--images", folder)
    assert_refused(without, "expected --data with one of digits")
    unknown = pfgm("evaluate", *out, "--images", folder, "--data", "digit")
    assert_refused(unknown, "unknown data set 'digit'")
    few = pfgm("evaluate", *out, "--images", folder, "--data", "digits", "--count", 3)
    assert_refused(few, "at least 4 samples and held-out images, got 3")
    zero = pfgm("evaluate", *out, "--images", folder, "--data", "digits", "--count", 0)
    assert_refused(zero, "count expects an integer ≥ 1, got 0")
    nothing = pfgm("evaluate", *out, "--model", tmp_path / "none")
    assert_refused(nothing, "none holds no run")
    (tmp_path / "bad.pt").write_text("{}")
    bad = pfgm("evaluate", *out, "--model", run, "--features", tmp_path / "bad.pt")
    assert_refused(bad, "bad.pt is no network")
    other = pfgm("evaluate", *out, "--model", run, "--data", "two_moons")
    assert_refused(other, "data expects images of shape (8, 8), as the run's are, got points")
    for options in (("--model", run, "--count", 9), ("--images", folder, "--seeds", "0-9")):
        assert_refused(pfgm("evaluate", *out, *options), "--seeds goes with --model and --count")
    assert not (tmp_path / "out").exists()


def test_points(tmp_path: Path) -> None:
    """Two moons have classes, and a picture without a grid."""
    moons = data.load("two_moons")
    found = evaluation.evaluate(moons.held_out[:100], moons)
    assert found.held_out_accuracy > 0.95
    figures.draw_evaluation(moons.held_out[:100], moons, found, tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_the_page_shows_pairs(means: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the samples that are most like one training image the first, each before that."""
    digits, shown = data.load("digits"), []
    samples = digits.train[:50].clone()
    samples[:, 0, 0] = 5 * torch.arange(50, dtype=torch.uint8).flip(0)
    found = evaluation.evaluate(samples, digits, evaluation.TorchScriptFeatures(means))
    tile = figures.judged.tile
    monkeypatch.setattr(figures.judged, "tile", lambda *a: shown.append(a[0]) or tile(*a))
    figures.draw_evaluation(samples, digits, found, tmp_path / "page.png")
    first, pairs = shown
    assert torch.equal(first, digits.decode(samples))
    assert len(pairs) == 2 * figures.judged.PAIRS
    order = np.argsort(found.nearest_ratio, kind="stable")[: figures.judged.PAIRS]
    assert torch.equal(pairs[::2], digits.decode(samples[order]))
    nearest = digits.train[torch.tensor(found.nearest)[order]]
    assert torch.equal(pairs[1::2], digits.decode(nearest))
