# SPDX-License-Identifier: Apache-2.0
"""Features of images by a network in a file that the user names."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pfgm_kernels.files import naming
from pfgm_kernels.training.evaluation.images import channels


class TorchScriptFeatures:
    """The network in a TorchScript file, as the Inception network ``inception-2015-12-05.pt``.

    That file, of StyleGAN2-ADA's metrics, is the network of all published Fréchet inception
    distances (StyleGAN3's and EDM's pickle holds the same one; pickles are not read here).
    A network is called with uint8 images (n, 3, h, w), grey ones repeated to three channels, and
    scales them itself. One whose ``forward`` knows ``return_features`` gives features (n, f) where
    that is true, and probabilities of classes otherwise, of the logits without their bias where it
    knows ``no_output_bias`` (so does the published Inception Score). Any other gives features.

    **A TorchScript file is a program, and loading it is running it**: it reads, writes and
    overwrites files with the rights of whoever runs it, and may take all memory. PyTorch has no
    safe mode for it. Name only files from a source that you would install a package from; the
    SHA-256 digest that is written beside the results says which one it was.

    torch calls the format deprecated and, from Python 3.14 on, unsupported; the file is of 2015.

    Runs on the GPU where there is one. Raises FileNotFoundError where there is no file, and
    ValueError, naming the file, where it is not TorchScript or does not answer as above.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"expected the TorchScript file {path}; it does not exist")
        with naming(path):
            self.digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.name, self.path = path.name, path
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._module = torch.jit.load(str(path), map_location=self._device).eval()
            arguments = {argument.name for argument in self._module.forward.schema.arguments}
        except (RuntimeError, torch.jit.Error, AttributeError) as error:
            raise ValueError(
                f"{path} is no network: expected a TorchScript module with `forward`, "
                f"got {_gist(error)}"
            ) from error
        self._classifies = "return_features" in arguments
        self._unbiased = {"no_output_bias": True} if "no_output_bias" in arguments else {}

    def features(self, images: Tensor) -> np.ndarray:
        """uint8 images (n, *event) -> features (n, f), float32."""
        return self._call(images, **({"return_features": True} if self._classifies else {}))

    def probabilities(self, images: Tensor) -> np.ndarray | None:
        """uint8 images (n, *event) -> probabilities (n, classes); None of features alone."""
        return self._call(images, **self._unbiased) if self._classifies else None

    @torch.no_grad()
    def _call(self, images: Tensor, **options: bool) -> np.ndarray:
        images = channels(images).to(self._device)
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        try:
            result = self._module(images, **options)
        except (RuntimeError, torch.jit.Error) as error:
            shape = tuple(images.shape)
            raise ValueError(
                f"{self.path} does not take uint8 images of shape {shape}: {_gist(error)}"
            ) from error
        if not isinstance(result, Tensor) or result.ndim != 2 or len(result) != len(images):
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"{self.path} expects to give ({len(images)}, features), got {got}")
        if not result.isfinite().all():
            raise ValueError(f"{self.path} expects to give finite features, got others")
        return result.float().cpu().numpy()


def _gist(error: Exception) -> str:
    """What TorchScript's long messages are about: the first sentence of the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(". ")[0] if lines else type(error).__name__
