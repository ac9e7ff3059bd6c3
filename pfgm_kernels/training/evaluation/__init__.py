# SPDX-License-Identifier: Apache-2.0
"""How good samples are, judged in features that saw real images only.

* ``metrics``: Fréchet distance, Inception Score, precision and recall, copies;
* ``perceptron``, ``convolutional``: features of a classifier trained on the data set;
* ``torchscript``: features of a network in a file that the user names;
* ``images``: samples from files, in 8 bits;
* ``judge``: all measures of samples, beside those of held-out data;
* ``report``: these as JSON and as a table.
"""

from pfgm_kernels.training.evaluation.convolutional import Convolutional
from pfgm_kernels.training.evaluation.images import read_images, stored
from pfgm_kernels.training.evaluation.judge import (
    Evaluation,
    Features,
    Quality,
    classifier,
    evaluate,
)
from pfgm_kernels.training.evaluation.perceptron import Perceptron
from pfgm_kernels.training.evaluation.report import table, write_metrics
from pfgm_kernels.training.evaluation.torchscript import TorchScriptFeatures

__all__ = [
    "Convolutional",
    "Evaluation",
    "Features",
    "Perceptron",
    "Quality",
    "TorchScriptFeatures",
    "classifier",
    "evaluate",
    "read_images",
    "stored",
    "table",
    "write_metrics",
]
