# SPDX-License-Identifier: Apache-2.0
"""Are the data of a run, their flips and what is held out of them, those that it was given?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import assert_refused, pfgm
from PIL import Image

from pfgm_kernels.training import data, trainer
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.state import Training

TINY = ("--steps", 1, "--device", "cpu", "batch_size=8", "width=8", "depth=1")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Training]:
    """What each run was made of."""
    found: list[Training] = []

    class Watched(Training):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            found.append(self)

    monkeypatch.setattr(trainer, "Training", Watched)
    return found


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty images of four classes."""
    images = np.random.default_rng(5).integers(0, 256, (20, 6, 5), dtype=np.uint8)
    np.savez(tmp_path / "photos.npz", images=images, labels=np.arange(20) % 4)
    return tmp_path / "photos.npz"


def test_flips_and_the_held_out_share_are_of_the_run(
    photos: Path, tmp_path: Path, made: list[Training]
) -> None:
    out = tmp_path / "run"
    start = ("train", "--data", photos, "--out", out, *TINY)
    result = pfgm(*start, "--flips", "--held-out", 0.25)
    assert result.exit_code == 0, result.output
    config = TrainConfig.read(out)
    assert (config.flips, config.held_out, config.device) == (True, 0.25, "cpu")
    plain = data.load(photos, held_out=0.25)
    assert [len(made[0].references), len(plain.train)] == [30, 15]
    assert torch.equal(made[0].data.train, plain.with_flips().train)
    for points in (made[0].data, config.load_data()):
        assert torch.equal(points.held_out, plain.held_out)
    for change, expected in (
        (("--held-out", 0.1), "another run: expected held_out = 0.25, got 0.1"),
        (("held_out=null",), "held_out expects that of the data, 0.1, got None"),
        (("flips=false",), "another run: expected flips = True, got False"),
    ):
        assert_refused(pfgm("train", "--out", out, "--resume", *change), expected)
    result = pfgm("train", "--out", out, "--resume", "--steps", 2, "--flips")
    assert result.exit_code == 0, result.output
    assert torch.equal(made[-1].data.train, made[0].data.train)
    assert pfgm("train", "--data", photos, "--out", tmp_path / "plain", *TINY).exit_code == 0
    config = TrainConfig.read(tmp_path / "plain")
    assert (config.flips, config.held_out) == (False, 0.1)


def test_a_mirror_image_is_of_its_images_class(
    photos: Path, tmp_path: Path, made: list[Training]
) -> None:
    options = ("--flips", "--conditional", "--held-out", 0)
    result = pfgm("train", "--data", photos, "--out", tmp_path / "run", *TINY, *options)
    assert result.exit_code == 0, result.output
    references = made[0].references
    assert (made[0].config.classes, len(references), len(made[0].data.held_out)) == (4, 40, 0)
    train, labels = made[0].data.train, made[0].data.train_labels
    for label in range(4):
        mine = train[labels == label]
        assert len(mine) == 10
        assert {each.numpy().tobytes() for each in mine} == {
            each.flip(-1).numpy().tobytes() for each in mine
        }


def test_what_is_held_out_is_judged_by(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default; other data by themselves."""
    from pfgm_kernels.training import evaluation

    out, judged = tmp_path / "run", []

    def evaluate(samples: torch.Tensor, points: DataSet, *_: object, **__: object) -> None:
        judged.append(points)
        raise ValueError("enough")

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    start = ("train", "--data", photos, "--out", out, *TINY)
    assert pfgm(*start, "--flips", "--held-out", 0.5).exit_code == 0
    options = ("--model", out, "--seeds", "0-1", "--steps", 2, "--out", tmp_path / "judged")
    assert_refused(pfgm("evaluate", *options), "enough")
    assert_refused(pfgm("evaluate", *options, "--data", photos), "enough")
    assert [len(points.held_out) for points in judged] == [10, 2]
    assert [len(points.train) for points in judged] == [20, 18]


def test_what_does_not_go_with_the_data(photos: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    flips = pfgm("train", "--data", "two_moons", *out, "--flips")
    assert_refused(flips, "flips expects images of 8 bits, got float32 points of shape (2,) (two_m")
    named = pfgm("train", "--data", "two_moons", *out, "--held-out", 0.2)
    assert_refused(named, "held_out expects no share for two_moons, which comes with a part held")
    for share in (1, -1, "nan"):
        wrong = pfgm("train", "--data", photos, *out, f"held_out={share}")
        assert_refused(wrong, "held_out expects a")
    device = pfgm("train", "--data", photos, *out, "--device", "tpu")
    assert_refused(device, "device expects one of auto, cpu, cuda, got 'tpu'")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_data_are_what_the_config_says(photos: Path) -> None:
    """Also from Python, where one may be changed without the other."""
    plain = data.load(photos)
    with pytest.raises(ValueError, match="flips expects that of the data, False, got True"):
        Training(TrainConfig.for_data(plain, flips=True), plain)
    with pytest.raises(ValueError, match=r"held_out expects that of the data, 0\.1, got 0\.2"):
        Training(TrainConfig.for_data(plain, held_out=0.2), plain)
    flipped = plain.with_flips()
    assert TrainConfig.for_data(flipped).flips
    assert TrainConfig.for_data(flipped).M == TrainConfig.for_data(plain).M


def test_images_by_a_path_take_the_preset(tmp_path: Path, made: list[Training]) -> None:
    """Unless another is named; what stands beside it goes before it. Points do not take it."""
    images = np.random.default_rng(5).integers(0, 256, (12, 12, 12), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "points.npy", images[:, :, 0].astype(np.float32))
    (tmp_path / "mine.yaml").write_text("batch_size: 5\n")
    (tmp_path / "digits").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "digits" / f"{index}.png")
    few = ("steps=1", "threads=1")
    for name, options, expected in (
        ("images.npy", (), ("unet", 128, 250)),
        ("digits", ("batch_size=4",), ("unet", 4, 250)),
        ("images.npy", ("--config", tmp_path / "mine.yaml"), ("unet", 5, 500)),
        ("images.npy", ("--config", "folder", "--network", "perceptron"), ("perceptron", 128, 250)),
        ("points.npy", (), ("perceptron", 256, 500)),
    ):
        out = tmp_path / f"run{len(made)}"
        result = pfgm("train", "--data", tmp_path / name, "--out", out, *options, *few)
        assert result.exit_code == 0, result.output
        config = made[-1].config
        assert (config.network, config.batch_size, config.checkpoint_every) == expected
    assert_refused(
        pfgm("train", "--config", "folder", "--out", tmp_path / "none"), "expected --data"
    )
