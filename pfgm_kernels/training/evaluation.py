# SPDX-License-Identifier: Apache-2.0
"""How good samples are, judged by a classifier that saw real images only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pfgm_kernels.training.data import DataSet


class Classifier:
    """A perceptron with one hidden layer, trained on the training part of a labelled data set.

    Deterministic: its seed is fixed, its settings are those of scikit-learn but for the width and
    the number of passes. ``features`` are the activations of the hidden layer, the penultimate one.
    """

    def __init__(self, data: DataSet, *, width: int = 128, passes: int = 400) -> None:
        if data.train_labels is None:
            raise ValueError(f"expected a data set with labels, got {data.name!r} without")
        from sklearn.neural_network import MLPClassifier
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        self._model = MLPClassifier((width,), max_iter=passes, random_state=0)
        with threadpool_limits(1):  # products this small are slower on several threads
            self._model.fit(_flat(data.decode(data.train)), data.train_labels.numpy())

    def probabilities(self, x: Tensor) -> np.ndarray:
        """x (n, *event) -> probabilities of the classes (n, classes)."""
        return self._model.predict_proba(_flat(x))

    def features(self, x: Tensor) -> np.ndarray:
        """x (n, *event) -> activations of the hidden layer (n, width)."""
        return np.maximum(_flat(x) @ self._model.coefs_[0] + self._model.intercepts_[0], 0)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Distance of the Gaussians with the means and covariances of features a (n, f) and b (m, f).

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017). The trace of the
    root is the sum of the roots of the eigenvalues of C_a C_b, which are real and not negative.
    """
    mean = a.mean(axis=0) - b.mean(axis=0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0))
    return float(mean @ mean + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())


def copies_share(samples: Tensor, train: Tensor, held_out: Tensor) -> float:
    """Share of ``samples`` that copy a training image, all (n, *event).

    A copy is nearer to its nearest training image than half of the median of that distance over the
    held-out images.
    """
    threshold = _nearest(held_out, train).median() / 2
    return (_nearest(samples, train) < threshold).double().mean().item()


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` measures."""

    samples: int
    classes: list[int]
    """The class that the classifier gives each sample."""
    classifier_held_out_accuracy: float
    held_out_top_probability: float
    sample_top_probability: float
    class_shares: list[float]
    copies_share: float
    held_out_frechet_distance: float
    sample_frechet_distance: float


def evaluate(samples: Tensor, data: DataSet) -> Evaluation:
    """Judges samples (n, *event), in the data set's range, against its training and held-out parts.

    A Fréchet distance depends on the number of images, so both are taken over equally many: the
    held-out images, and as many of the samples, each against the training images.
    """
    classifier = Classifier(data)
    train, held_out = data.decode(data.train), data.decode(data.held_out)
    probabilities = classifier.probabilities(samples)
    real = classifier.probabilities(held_out)
    labels = data.held_out_labels
    assert labels is not None  # Classifier has refused a data set without labels
    train_features = classifier.features(train)
    classes = probabilities.argmax(1)
    shares = np.bincount(classes, minlength=real.shape[1]) / len(samples)
    return Evaluation(
        samples=len(samples),
        classes=classes.tolist(),
        classifier_held_out_accuracy=float((real.argmax(1) == labels.numpy()).mean()),
        held_out_top_probability=float(real.max(1).mean()),
        sample_top_probability=float(probabilities.max(1).mean()),
        class_shares=shares.tolist(),
        copies_share=copies_share(samples, train, held_out),
        held_out_frechet_distance=frechet_distance(classifier.features(held_out), train_features),
        sample_frechet_distance=frechet_distance(
            classifier.features(samples[: len(held_out)]), train_features
        ),
    )


def _flat(x: Tensor) -> np.ndarray:
    return x.detach().cpu().flatten(1).double().numpy()


def _nearest(x: Tensor, references: Tensor) -> Tensor:
    """Distance (n,) of each of x (n, *event) to its nearest of references (m, *event)."""
    return torch.cdist(x.flatten(1).double(), references.flatten(1).double()).amin(dim=1)
