# SPDX-License-Identifier: Apache-2.0
"""Do the measures of sample quality give the known answers of simple cases?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from pfgm_kernels.training import data
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.evaluation import (
    Classifier,
    copies_share,
    evaluate,
    frechet_distance,
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


def test_frechet_distance_of_diagonal_gaussians() -> None:
    """|difference of means|^2 + sum (s - r)^2 for standard deviations s and r."""
    rng = np.random.default_rng(0)
    white = rng.standard_normal((500, 3))
    white -= white.mean(axis=0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    a = white * [1.0, 2.0, 0.5] + [0.0, 1.0, 0.0]
    b = white[:, ::-1] * [3.0, 2.0, 0.0] + [4.0, 0.0, 0.0]
    assert frechet_distance(a, b) == pytest.approx(16 + 1 + 4 + 0 + 0.25)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_correlated_gaussians() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal((400, 8)) @ rng.standard_normal((8, 8)) for _ in range(2))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(cov_a)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(
        cov_a + cov_b - 2 * sqrtm(root @ cov_b @ root).real
    )
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(b, a) == pytest.approx(expected)


def test_copies_share() -> None:
    """Held-out images are 1, 2 and 4 from the nearest training image: copies are nearer than 1."""
    train = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
    held_out = torch.tensor([[1.0, 0.0], [100.0, 2.0], [0.0, -4.0]])
    samples = torch.tensor([[0.0, 0.99], [0.0, 1.01], [100.0, 0.0], [50.0, 0.0]])
    assert copies_share(samples, train, held_out) == 0.5


def test_classifier_is_good_and_deterministic(digits: DataSet) -> None:
    images, labels = digits.decode(digits.held_out), digits.held_out_labels
    assert labels is not None
    probabilities = Classifier(digits).probabilities(images)
    assert (probabilities.argmax(1) == labels.numpy()).mean() >= 0.97
    assert np.array_equal(probabilities, Classifier(digits).probabilities(images))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_features_lead_to_the_probabilities(digits: DataSet) -> None:
    """The softmax of the last layer on the features gives the probabilities."""
    classifier = Classifier(digits, passes=20)
    images = digits.decode(digits.held_out)
    model = classifier._model
    logits = classifier.features(images) @ model.coefs_[1] + model.intercepts_[1]
    expected = torch.from_numpy(logits).softmax(dim=1).numpy()
    np.testing.assert_allclose(classifier.probabilities(images), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_classifier_sees_the_training_part_alone(squares: DataSet) -> None:
    images = squares.decode(squares.held_out)
    others = replace(
        squares, held_out=squares.held_out.flip(0), held_out_labels=squares.held_out_labels % 2
    )
    relabelled = replace(squares, train_labels=(squares.train_labels + 1) % 3)
    first, same, other = (
        Classifier(data, passes=60).probabilities(images) for data in (squares, others, relabelled)
    )
    assert np.array_equal(first, same)
    assert np.array_equal(other.argmax(1), (first.argmax(1) + 1) % 3)


def test_each_measure_is_taken_of_its_own_part(squares: DataSet) -> None:
    """Of 45 samples that are all of the first class, some of them copies of training images."""
    generator = torch.Generator().manual_seed(10)
    train, held_out = squares.decode(squares.train), squares.decode(squares.held_out)
    first = train[squares.train_labels == 0]
    samples = torch.cat([first[:9], first[:1] + 0.2 * torch.randn(36, 2, 2, generator=generator)])
    result, classifier = evaluate(samples, squares), Classifier(squares)
    features = {"train": train, "held_out": held_out, "samples": samples[:30]}
    features = {name: classifier.features(images) for name, images in features.items()}
    assert features["train"].shape == (90, 128)
    assert result.samples == 45
    assert result.classes == [0] * 45
    assert result.class_shares == [1, 0, 0]
    assert result.classifier_held_out_accuracy == pytest.approx(2 / 3)
    top = [classifier.probabilities(images).max(1).mean() for images in (held_out, samples)]
    assert [result.held_out_top_probability, result.sample_top_probability] == pytest.approx(top)
    assert 0 < result.copies_share == copies_share(samples, train, held_out) < 1
    expected = frechet_distance(features["held_out"], features["train"])
    assert result.held_out_frechet_distance == pytest.approx(expected)
    expected = frechet_distance(features["samples"], features["train"])
    assert result.sample_frechet_distance == pytest.approx(expected)


def test_real_digits_as_samples(digits: DataSet) -> None:
    held_out = digits.decode(digits.held_out)
    result = evaluate(held_out, digits)
    assert result.samples == 360
    assert result.sample_frechet_distance == pytest.approx(result.held_out_frechet_distance)
    assert result.sample_top_probability == result.held_out_top_probability > 0.95
    assert result.copies_share < 0.05
    assert sum(result.class_shares) == pytest.approx(1)
    assert min(result.class_shares) > 0.08
    shares = np.bincount(result.classes, minlength=10) / 360
    np.testing.assert_allclose(shares, result.class_shares)


@pytest.mark.exhaustive
def test_bad_samples_are_found_out(digits: DataSet) -> None:
    """Copies, noise and a single class each show in the measure that is there for them."""
    train = digits.decode(digits.train)
    assert evaluate(train[:400], digits).copies_share == 1
    assert digits.train_labels is not None
    fours = evaluate(train[digits.train_labels == 4], digits)
    assert min(fours.class_shares) == 0
    assert fours.class_shares[4] > 0.95
    assert fours.sample_frechet_distance > 5 * fours.held_out_frechet_distance
    noise = torch.randn(400, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    result = evaluate(noise, digits)
    assert result.sample_top_probability < 0.85
    assert result.sample_frechet_distance > 5 * result.held_out_frechet_distance


def test_labels_are_needed(digits: DataSet) -> None:
    with pytest.raises(ValueError, match="a data set with labels, got 'digits' without"):
        Classifier(replace(digits, train_labels=None))
