# SPDX-License-Identifier: Apache-2.0
"""Which rows are held out: always the same, no row twice, and those that the data say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pfgm_kernels.training import data
from pfgm_kernels.training.data import checks
from pfgm_kernels.training.data.dataset import MOST_HELD_OUT, DataSet, split

GREY = np.random.default_rng(0).integers(0, 256, (12, 9, 7), dtype=np.uint8)


def write_all(folder: Path, names: list[str]) -> None:
    for name, each in zip(names, GREY, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(each).save(folder / name)


@pytest.mark.parametrize(
    ("count", "share", "held_out"),
    [
        (2, 0.1, 1),
        (10, 0.1, 1),
        (29, 0.1, 2),
        (1000, 0.1, 100),
        (1000, 0.35, 350),
        (1000, 0.0, 0),
        (1, 0.0, 0),
        (200_000, 0.1, MOST_HELD_OUT),
    ],
)
def test_a_split_is_a_partition_in_order(count: int, share: float, held_out: int) -> None:
    places, train, kept = split("here", count, share)
    assert kept == share
    assert train == count - held_out
    assert np.array_equal(np.sort(places), np.arange(count))
    order = np.argsort(places)
    for part in (order[:train], order[train:]):
        assert (np.diff(part) > 0).all()


def test_a_split_is_the_same_always() -> None:
    """These numbers may not change: a run that goes on would train on what it had held out."""
    order = np.argsort(split("here", 1000, 0.01).places)
    assert order[990:].tolist() == [203, 254, 366, 410, 503, 543, 566, 821, 930, 986]


@pytest.mark.parametrize("period", [2, 10, 100, 128])
def test_rows_in_turn_are_held_out_alike(period: int) -> None:
    places, train, _ = split("here", 10_000, None)
    counts = np.bincount(np.argsort(places)[train:] % period, minlength=period)
    mean = 1000 / period
    assert np.abs(counts - mean).max() < 5 * mean**0.5


def test_too_few_rows(tmp_path: Path) -> None:
    write_all(tmp_path, ["a.png"])
    assert len(data.load(tmp_path, held_out=0).train) == 1
    with pytest.raises(ValueError, match="expected at least 2 rows, of which 1 is held out, got 1"):
        data.load(tmp_path)


@pytest.mark.parametrize("share", [1, -0.1, 1.5])
def test_shares(tmp_path: Path, share: float) -> None:
    with pytest.raises(ValueError, match="held_out expects a share from 0 to below 1, got"):
        data.load(tmp_path, held_out=share)


@pytest.mark.parametrize(("held_out", "count"), [(None, 1), (0.1, 1), (0.5, 5), (0.0, 0)])
def test_a_share_is_kept_with_the_data(tmp_path: Path, held_out: float | None, count: int) -> None:
    write_all(tmp_path, [f"{index}.png" for index in range(10)])
    found = data.load(tmp_path, held_out=held_out)
    assert (len(found.train), len(found.held_out)) == (10 - count, count)
    assert found.share == (0.1 if held_out is None else held_out)


def test_a_part_that_the_data_bring_takes_no_share(tmp_path: Path) -> None:
    """Nor is a share that is asked for passed over. Images may still be read as one whole."""
    write_all(tmp_path, ["train/a/1.png", "train/b/2.png", "val/a/3.png"])
    assert data.load(tmp_path).share is None
    whole = data.load(tmp_path, held_out=0)
    assert (len(whole.train), len(whole.held_out), whole.share) == (3, 0, 0)
    for name in (tmp_path, "digits"):
        with pytest.raises(ValueError, match=rf"expects no share for {name}, which comes with a"):
            data.load(name, held_out=0.2)


def test_labels_go_where_their_images_go(tmp_path: Path) -> None:
    names = [f"{index % 3}/{index:02}.png" for index in range(12)]
    write_all(tmp_path, names)
    found = data.load(tmp_path, held_out=0.4)
    assert found.train_labels is not None
    assert found.held_out_labels is not None
    assert (len(found.train), len(found.held_out)) == (8, 4)
    seen = {}
    for images, labels in (
        (found.train, found.train_labels),
        (found.held_out, found.held_out_labels),
    ):
        for image, label in zip(images.numpy(), labels.tolist(), strict=True):
            seen[image.tobytes()] = label
    assert seen == {each.tobytes(): index % 3 for index, each in enumerate(GREY)}
    again = data.load(tmp_path, held_out=0.4)
    assert torch.equal(found.train, again.train)
    assert torch.equal(found.held_out, again.held_out)


@pytest.mark.parametrize("wrapped", ["", "photos/"])
@pytest.mark.parametrize(
    ("held_out", "others"), [("val", []), ("test", []), ("val", ["test/9.png"])]
)
def test_parts_that_the_data_bring(
    tmp_path: Path, wrapped: str, held_out: str, others: list[str]
) -> None:
    names = ["train/1.png", f"{held_out}/2.png", "train/3.png", *others]
    write_all(tmp_path, [wrapped + name for name in names])
    found = data.load(tmp_path)
    assert np.array_equal(found.train.numpy(), GREY[[0, 2]])
    assert np.array_equal(found.held_out.numpy(), GREY[[1]])
    assert found.train_labels is None
    write_all(tmp_path, [f"{wrapped}more/4.png"])
    with pytest.raises(ValueError, match="without other images beside them, got some in 'more'"):
        data.load(tmp_path)


def test_one_part_alone_is_split(tmp_path: Path) -> None:
    write_all(tmp_path, ["train/1.png", "train/2.png"])
    assert (len(data.load(tmp_path).train), len(data.load(tmp_path).held_out)) == (1, 1)


def test_classes_of_parts_are_those_to_train_on(tmp_path: Path) -> None:
    write_all(tmp_path, ["train/b/1.png", "train/a/2.png", "test/b/3.png", "train/c/4.png"])
    found = data.load(tmp_path)
    assert found.train_labels is not None
    assert found.held_out_labels is not None
    assert found.train_labels.tolist() == [0, 1, 2]
    assert found.held_out_labels.tolist() == [1]
    write_all(tmp_path, ["test/d/5.png"])
    with pytest.raises(ValueError, match=r"d/5.png: expected .* a class of train/, got 'd'"):
        data.load(tmp_path)


@pytest.mark.parametrize("whole", [True, False])
def test_labels_of_parts(tmp_path: Path, whole: bool) -> None:
    """In one file for both, or one in each."""
    write_all(tmp_path, ["train/1.png", "test/2.png", "train/3.png"])
    tables = {"train": [["1.png", 5], ["3.png", 4]], "test": [["2.png", 6]]}
    if whole:
        pairs = [[f"{part}/{name}", label] for part in tables for name, label in tables[part]]
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": pairs}))
    else:
        for part, pairs in tables.items():
            (tmp_path / part / "dataset.json").write_text(json.dumps({"labels": pairs}))
    found = data.load(tmp_path)
    assert found.train_labels is not None
    assert found.held_out_labels is not None
    assert (found.train_labels.tolist(), found.held_out_labels.tolist()) == ([5, 4], [6])
    if not whole:
        (tmp_path / "test" / "dataset.json").unlink()
        with pytest.raises(ValueError, match=r"2.png: expected a label of each image"):
            data.load(tmp_path)


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 3, 4, 5)], ids=["grey", "colour"])
@pytest.mark.parametrize("labels", [torch.tensor([1, 0, 2]), None], ids=["labels", "none"])
def test_flips(shape: tuple[int, ...], labels: torch.Tensor | None) -> None:
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()
    flipped = DataSet("mine", images, images[:1], labels, None, 0.0, 2.0).with_flips()
    assert torch.equal(flipped.train[:3], images)
    for column in range(5):
        assert torch.equal(flipped.train[3:, ..., column], images[..., 4 - column])
    assert torch.equal(flipped.held_out, images[:1])
    if labels is None:
        assert flipped.train_labels is None
    else:
        assert flipped.train_labels is not None
        assert flipped.train_labels.tolist() == [1, 0, 2, 1, 0, 2]
    assert (flipped.name, flipped.low, flipped.high) == ("mine", 0.0, 2.0)
    assert len(flipped.references) == 6
    assert flipped.flips
    with pytest.raises(ValueError, match=r"flips expects images of 8 bits, got flipped ones"):
        flipped.with_flips()


def test_flips_that_do_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_all(tmp_path, ["a.png", "b.png"])
    monkeypatch.setattr(checks, "memory", lambda: 3 * GREY[0].size)
    data.load(tmp_path, held_out=0)
    with pytest.raises(ValueError, match=r"this machine's memory, got shape \(4, "):
        data.load(tmp_path, held_out=0, flips=True)


def test_points_have_no_mirror_image() -> None:
    points = torch.zeros(3, 2)
    with pytest.raises(
        ValueError,
        match=r"flips expects images of 8 bits, got float32 points of shape \(2,\) \(mine",
    ):
        DataSet("mine", points, points, None, None).with_flips()
