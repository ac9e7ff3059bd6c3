# SPDX-License-Identifier: Apache-2.0
"""Is each measure taken of what it is said to be of?"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from pfgm_kernels.training import data
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.evaluation import (
    Perceptron,
    evaluate,
    judge,
    stored,
    table,
    write_metrics,
)
from pfgm_kernels.training.evaluation.metrics import (
    copy_ratio,
    frechet_distance,
    inception_score,
    nearest,
    precision_recall,
)


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return data.load("digits")


@pytest.fixture(scope="module")
def squares() -> DataSet:
    """Three classes of 2 x 2 images, quick to learn; a third of the held-out labels are wrong."""
    generator = torch.Generator().manual_seed(9)
    labels = torch.arange(120) % 3
    means = torch.tensor([[60.0, 60, 200, 200], [200, 60, 60, 200], [60, 200, 60, 60]])
    images = means[labels] + 15 * torch.randn(120, 4, generator=generator)
    images = images.clamp(0, 255).to(torch.uint8).view(120, 2, 2)
    wrong = torch.where(torch.arange(30) < 10, (labels[90:] + 1) % 3, labels[90:])
    return DataSet("squares", images[:90], images[90:], labels[:90], wrong)


class Pixels:
    """Features that are easy to check: the pixels, and no classes."""

    name = "pixels"

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def features(self, images: Tensor) -> np.ndarray:
        assert images.dtype == torch.uint8
        self.sizes.append(len(images))
        return images.flatten(1).numpy().astype(np.float32)

    def probabilities(self, images: Tensor) -> None:
        return None


def test_perceptron_is_good_and_deterministic(digits: DataSet) -> None:
    labels = digits.held_out_labels
    assert labels is not None
    probabilities = Perceptron(digits).probabilities(digits.held_out)
    assert (probabilities.argmax(1) == labels.numpy()).mean() >= 0.97
    assert np.array_equal(probabilities, Perceptron(digits).probabilities(digits.held_out))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_features_lead_to_the_probabilities(digits: DataSet) -> None:
    """The softmax of the last layer on the features gives the probabilities."""
    perceptron = Perceptron(digits, passes=20)
    model = perceptron._model
    logits = perceptron.features(digits.held_out) @ model.coefs_[1] + model.intercepts_[1]
    expected = torch.from_numpy(logits).softmax(dim=1).numpy()
    found = perceptron.probabilities(digits.held_out)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_perceptron_sees_the_training_part_alone(squares: DataSet) -> None:
    others = replace(
        squares, held_out=squares.held_out.flip(0), held_out_labels=squares.held_out_labels % 2
    )
    relabelled = replace(squares, train_labels=(squares.train_labels + 1) % 3)
    first, same, other = (
        Perceptron(data, passes=60).probabilities(squares.held_out)
        for data in (squares, others, relabelled)
    )
    assert np.array_equal(first, same)
    assert np.array_equal(other.argmax(1), (first.argmax(1) + 1) % 3)


def flat(images: Tensor) -> np.ndarray:
    return images.flatten(1).double().numpy()


def test_each_measure_is_taken_of_its_own_part(squares: DataSet) -> None:
    """Of 45 samples that are all of the first class, some of them copies of training images."""
    generator = torch.Generator().manual_seed(10)
    train, held_out = squares.train, squares.held_out
    first = train[squares.train_labels == 0]
    near = first[:1] + (20 * torch.randn(36, 2, 2, generator=generator)).to(torch.uint8)
    samples = torch.cat([first[:9], near])
    result, perceptron = evaluate(samples, squares), Perceptron(squares)

    def rows(n: int) -> Tensor:
        return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:30]

    f = {"train": train, "held_out": held_out, "sample": samples, "part": samples[rows(45)]}
    features = {name: perceptron.features(images) for name, images in f.items()}
    assert result.features == "perceptron"
    assert (result.samples, result.count, result.feature_count) == (45, 30, 128)
    assert result.classes == perceptron.probabilities(samples).argmax(1).tolist()
    assert result.class_shares == (np.bincount(result.classes, minlength=3) / 45).tolist()
    assert result.class_shares[0] > 0.8
    assert result.held_out_class_shares == pytest.approx([1 / 3] * 3)
    assert result.held_out_accuracy == pytest.approx(2 / 3)
    every = frechet_distance(features["sample"], features["train"])
    assert result.frechet_distance_of_all == pytest.approx(every)
    distances, indices = nearest(flat(samples), flat(train), 2)
    assert result.nearest == indices[:, 0].tolist()
    assert result.nearest_ratio == copy_ratio(distances).tolist()
    usual = nearest(flat(held_out[rows(30)]), flat(train), 2)[0]
    some = features["train"][rows(90).numpy()]
    for quality, images, part, near in (
        (result.sample, samples, "part", distances),
        (result.held_out, held_out, "held_out", usual),
    ):
        p = perceptron.probabilities(images)
        assert quality.frechet_distance == pytest.approx(
            frechet_distance(features[part], features["train"])
        )
        assert (quality.precision, quality.recall) == precision_recall(some, features[part])
        assert quality.inception_score == pytest.approx(
            inception_score(p[rows(len(p)).numpy()], 1)[0]
        )
        assert quality.inception_score_deviation is None
        assert quality.copies_share == (copy_ratio(near) <= 1 / 3).mean() < 1
        low, high = quality.copies_interval
        assert low <= quality.copies_share <= high
        assert quality.top_probability == pytest.approx(p.max(1).mean())
    assert result.sample.copies_share >= 9 / 45


def test_features_without_classes(squares: DataSet) -> None:
    pixels = Pixels()
    result = evaluate(squares.decode(squares.held_out), squares, pixels)
    assert result.features == "pixels"
    assert result.feature_count == 4
    sample, held_out = (
        replace(quality, frechet_distance=0.0) for quality in (result.sample, result.held_out)
    )
    assert sample == held_out
    distance = pytest.approx(result.frechet_distance_of_all, rel=1e-8)  # whose sums are others
    for quality in (result.sample, result.held_out):
        assert quality.frechet_distance == distance
        assert quality.inception_score is quality.inception_score_deviation is None
        assert quality.top_probability is None
    assert result.classes is result.class_shares is result.held_out_class_shares is None
    assert result.held_out_accuracy is None


def test_labels_are_needed_by_a_classifier_alone(squares: DataSet) -> None:
    without = replace(squares, train_labels=None, held_out_labels=None)
    assert evaluate(squares.held_out, without, Pixels()).sample.precision > 0
    with pytest.raises(ValueError, match="a data set with labels, got 'squares' without"):
        evaluate(squares.held_out, without)


def test_images_are_judged_in_batches(digits: DataSet) -> None:
    pixels = Pixels()
    evaluate(digits.train[:600], digits, pixels)
    assert sum(pixels.sizes) == len(digits.train) + len(digits.held_out) + 600
    assert max(pixels.sizes) == 250


def test_few_samples_bound_the_count(squares: DataSet) -> None:
    result = evaluate(squares.train[:12], squares, Pixels())
    assert result.count == 12
    rows = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:12]
    cut = frechet_distance(flat(squares.held_out[rows]), flat(squares.train))
    assert result.held_out.frechet_distance == pytest.approx(cut)
    with pytest.raises(ValueError, match="at least 4 samples and held-out images, got 3"):
        evaluate(squares.train[:3], squares, Pixels())
    with pytest.raises(ValueError, match="at least 4 samples and held-out images, got 2"):
        evaluate(squares.train, replace(squares, held_out=squares.held_out[:2]), Pixels())


@pytest.mark.parametrize(("size", "splits"), [(7, 4), (15, 2), (16, 1), (2, 10)])
def test_scores_are_of_parts_that_are_large_enough(
    squares: DataSet, monkeypatch: pytest.MonkeyPatch, size: int, splits: int
) -> None:
    monkeypatch.setattr(judge, "SPLIT", size)
    quality = evaluate(squares.held_out, squares).sample
    p = Perceptron(squares).probabilities(squares.held_out)
    rows = torch.randperm(30, generator=torch.Generator().manual_seed(0)).numpy()
    score, deviation = inception_score(p[rows], splits)
    assert quality.inception_score == pytest.approx(score)
    expected = None if splits == 1 else pytest.approx(deviation)
    assert quality.inception_score_deviation == expected


def test_real_digits_as_samples(digits: DataSet) -> None:
    result = evaluate(digits.decode(digits.held_out), digits)
    assert (result.samples, result.count) == (360, 360)
    assert result.sample == result.held_out
    assert result.sample.top_probability > 0.95
    assert result.sample.precision > 0.8
    assert result.sample.recall > 0.8
    assert 8 < result.sample.inception_score < 10
    assert result.sample.copies_share < 0.05
    assert sum(result.class_shares) == pytest.approx(1)
    assert min(result.class_shares) > 0.08


@pytest.mark.exhaustive
def test_bad_samples_are_found_out(digits: DataSet) -> None:
    """Copies, noise and a single class each show in the measure that is there for them."""
    train = digits.decode(digits.train)
    assert evaluate(train[:400], digits).sample.copies_share == 1
    assert digits.train_labels is not None
    fours = evaluate(train[digits.train_labels == 4], digits)
    assert min(fours.class_shares) == 0
    assert fours.class_shares[4] > 0.95
    assert fours.sample.frechet_distance > 5 * fours.held_out.frechet_distance
    assert fours.sample.inception_score < 1.5
    assert fours.sample.precision > 0.8
    assert fours.sample.recall < 0.2
    noise = torch.randn(400, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    result = evaluate(noise, digits)
    assert result.sample.top_probability < 0.85
    assert result.sample.frechet_distance > 5 * result.held_out.frechet_distance
    assert result.sample.precision < 0.1


def test_what_is_written(squares: DataSet, tmp_path: Path) -> None:
    """All measures of whole sets, and where they come from."""
    result = evaluate(squares.held_out, squares)
    write_metrics(result, {"model": "runs/a", "seed": 3}, tmp_path / "new" / "metrics.json")
    found = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert found.pop("source") == {"model": "runs/a", "seed": 3}
    assert found.pop("versions")["torch"] == torch.__version__
    expected = asdict(result)
    for name in ("classes", "nearest", "nearest_ratio"):
        del expected[name]
    assert found == json.loads(json.dumps(expected))


def test_the_table(squares: DataSet) -> None:
    sample = squares.train[:40]
    result = evaluate(sample, squares, Pixels())
    console = Console(width=100, record=True, quiet=False)
    with console.capture() as capture:
        console.print(table(result))
    text = capture.get()
    for words in (
        "4 features by pixels, n = 30",
        "40 samples",
        "Fréchet distance of all",
        "100.0%",
    ):
        assert words in text
    assert "Inception Score" not in text
    with console.capture() as capture:
        console.print(table(evaluate(stored(squares.decode(sample), squares), squares)))
    assert "Inception Score" in capture.get()
    assert "accuracy of the classifier" in capture.get()
