# SPDX-License-Identifier: Apache-2.0
"""A perceptron that judges small images and points."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pfgm_kernels.training.data import DataSet


class Perceptron:
    """A classifier with one hidden layer, trained on the training part of a labelled data set.

    Deterministic: its seed is fixed, its settings are those of scikit-learn but for the width and
    the number of passes. Raises ValueError for a data set without labels.
    """

    name = "perceptron"

    def __init__(self, data: DataSet, *, width: int = 128, passes: int = 400) -> None:
        if data.train_labels is None:
            raise ValueError(f"expected a data set with labels, got {data.name!r} without")
        from sklearn.neural_network import MLPClassifier
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        self._decode = data.decode
        self._model = MLPClassifier((width,), max_iter=passes, random_state=0)
        with threadpool_limits(1):  # products this small are slower on several threads
            self._model.fit(self._flat(data.train), data.train_labels.numpy())

    def features(self, images: Tensor) -> np.ndarray:
        """Stored images (n, *event) -> activations of the hidden layer (n, width), float64."""
        hidden = self._flat(images) @ self._model.coefs_[0] + self._model.intercepts_[0]
        return np.maximum(hidden, 0)

    def probabilities(self, images: Tensor) -> np.ndarray:
        """Stored images (n, *event) -> probabilities of the classes (n, classes), float64."""
        return self._model.predict_proba(self._flat(images))

    def _flat(self, images: Tensor) -> np.ndarray:
        return self._decode(images.cpu()).flatten(1).double().numpy()
