# SPDX-License-Identifier: Apache-2.0
"""A small convolutional classifier of a data set of images, trained once and kept in a cache."""

from __future__ import annotations

import hashlib
import json
import warnings

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from pfgm_kernels.files import cache_folder
from pfgm_kernels.training import checkpoint
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.evaluation.images import channels
from pfgm_kernels.training.progress import progress_bar
from pfgm_kernels.training.trainer import threads

RECIPE = 2
"""To be raised with every change of the network or of its training: a cached one is of another."""
PASSES, BATCH, WIDTHS, FEATURES = 3, 128, (32, 64, 128), 128
LEARNING_RATE = 4e-3
THREADS = 1  # more change the order of sums, and gain little in layers this small


class Convolutional:
    """A classifier of images, trained on the training part of a labelled data set.

    Three convolutions, each followed by normalisation and pooling, a hidden layer, whose
    activations are the 128 features, and the logits. Deterministic on one machine: its seed and its
    number of threads are fixed. MNIST takes about two minutes on one core. The weights are kept
    in ``~/.cache/pfgm_kernels`` (``XDG_CACHE_HOME``), by a hash of the images and labels.

    Raises ValueError for a data set without labels or of something other than images.
    """

    name = "convolutional classifier"

    def __init__(
        self, data: DataSet, *, passes: int = PASSES, console: Console | None = None
    ) -> None:
        if data.train_labels is None or not data.is_image:
            raise ValueError(f"expected a data set of images with labels, got {data.name!r}")
        self._classes = int(data.train_labels.max()) + 1
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            self._network = _network(channels(data.train).shape[1], self._classes)
        name = f"classifier-{_digest(data, passes)}.safetensors"
        if not self._restore(name):
            with threads(THREADS):
                self._train(data, passes, console or Console(quiet=True))
            self._keep(name)
        self._network.eval()

    @torch.no_grad()
    def features(self, images: Tensor) -> np.ndarray:
        """uint8 images (n, *event) -> activations of the hidden layer (n, 128), float32."""
        return self._network[:-1](_normalised(images)).numpy()

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> np.ndarray:
        """uint8 images (n, *event) -> probabilities of the classes (n, classes), float64."""
        return self._network(_normalised(images)).double().softmax(dim=1).numpy()

    def _restore(self, name: str) -> bool:
        try:
            path = cache_folder() / name
            weights, _ = checkpoint.read(path)
            checkpoint.match(path, self._network.state_dict(), weights)
        except FileNotFoundError:
            return False
        except (OSError, RuntimeError, ValueError) as error:
            warnings.warn(f"{error}; the classifier is trained anew", stacklevel=3)
            return False
        self._network.load_state_dict(weights)
        return True

    def _keep(self, name: str) -> None:
        try:
            checkpoint.write(cache_folder() / name, self._network.state_dict(), {})
        except (OSError, RuntimeError) as error:  # the latter of a user without a home
            warnings.warn(f"the classifier is not kept: {error}", stacklevel=3)

    def _train(self, data: DataSet, passes: int, console: Console) -> None:
        assert data.train_labels is not None  # checked above
        network, labels = self._network.train(), data.train_labels
        batches = -(-len(labels) // BATCH)
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=passes * batches
        )
        generator = torch.Generator("cpu").manual_seed(0)
        with progress_bar(console, "Training a classifier", passes * batches) as update:
            for step in range(passes * batches):
                if step % batches == 0:
                    order = torch.randperm(len(labels), generator=generator, device="cpu")
                rows = order[step % batches * BATCH :][:BATCH]
                logits = network(_normalised(data.train[rows]))
                loss = nn.functional.cross_entropy(logits, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                update(step + 1, f"of {data.name}: loss {loss.item():.2f}")


def _network(inputs: int, classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in WIDTHS:
        layers += [
            nn.Conv2d(inputs, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        inputs = width
    layers += [nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * inputs, FEATURES)]
    network = nn.Sequential(*layers, nn.ReLU(), nn.Linear(FEATURES, classes))
    # As the images are laid out: a third less time.
    return nn.utils.convert_conv2d_weight_memory_format(network, torch.channels_last)


def _normalised(images: Tensor) -> Tensor:
    values = channels(images).float() / 127.5 - 1
    return values.contiguous(memory_format=torch.channels_last)


def _digest(data: DataSet, passes: int) -> str:
    """Of all that the weights depend on."""
    assert data.train_labels is not None  # checked by the classifier
    digest = hashlib.sha256(json.dumps([RECIPE, passes, *data.train.shape]).encode())
    for part in (data.train, data.train_labels):
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()[:32]
