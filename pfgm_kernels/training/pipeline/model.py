# SPDX-License-Identifier: Apache-2.0
"""A trained network as a model of diffusers."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import is_accelerate_available
from torch import Tensor

from pfgm_kernels._checks import positive, shape_of_event
from pfgm_kernels.flow import Substitution
from pfgm_kernels.flow._queries import each_height, points
from pfgm_kernels.flow._slope import Slope
from pfgm_kernels.training import methods, networks


class Safetensors:
    """Reads weights from safetensors files alone: where there are none, no pickle instead. Nor is
    code that lies in the folder run, which diffusers 0.35 does unasked.
    """

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **options: Any) -> Any:
        """As diffusers' own, whose options these are. Raises ValueError for use_safetensors=False
        and, without trust_remote_code=True, for a folder with code; OSError where there are no
        safetensors files.
        """
        if options.get("use_safetensors") is False:
            raise ValueError("use_safetensors expects True: no pickle is read here, got False")
        code = next(Path(folder).rglob("*.py"), None)
        if code is not None and not options.get("trust_remote_code"):
            raise ValueError(f"{folder} expects JSON and safetensors files, got code: {code}")
        options["use_safetensors"] = True
        # Its own default is a warning where accelerate, which it does without, is not installed.
        options.setdefault("low_cpu_mem_usage", is_accelerate_available())
        return super().from_pretrained(folder, **options)  # type: ignore[misc]


class PoissonFlowModel(Safetensors, ModelMixin, ConfigMixin):
    """A network of `pfgm_kernels.training.networks` and what it predicts.

    Args:
        event_shape, network, predicts, D, sigma_data, gamma, width, depth: as in `TrainConfig`.
        num_classes: of a class-conditional network; 0 is one without classes.
        substitute_below: the t below which the t-component of a network that predicts the field is
            substituted (`Substitution`); None for never.
        low, high: of images, what black and white are.

    With weights of 16 bits the network computes in these; all around it stays float32. Raises
    ValueError for a network that cannot be had. One of the user's own, package.module:factory, has
    to be imported before: what a file names is not imported, as that would run it.
    """

    @register_to_config
    def __init__(
        self,
        event_shape: Sequence[int],
        network: str,
        predicts: str,
        D: float | str = 1.0,
        sigma_data: float = 0.5,
        gamma: float = 0.0,
        num_classes: int = 0,
        width: int = 256,
        depth: int = 4,
        substitute_below: float | None = None,
        low: float = -1.0,
        high: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_to_config(D=as_json(D))
        module, colon, _ = networks.check_name(network).partition(":")
        if colon and module not in sys.modules:
            raise ValueError(
                f"network {network} expects {module} to be imported before it is loaded; "
                "no file has code imported here"
            )
        self.model = networks.build(
            network,
            shape_of_event(event_shape),
            predicts=predicts,
            num_classes=num_classes,
            width=width,
            depth=depth,
            gamma=gamma,
            D=float(D),
            sigma_data=sigma_data,
        )
        self.substitution = (
            None if substitute_below is None else Substitution(gamma, below=substitute_below)
        )

    def field(self, x: Tensor, t: Tensor, **labels: Tensor) -> Tensor:
        """(B, d + 1), the t-component last, at x (B, *event) and t (B,), with labels= (B,) where
        there are classes: what samplers take, together with ``self.substitution``.
        """
        half = self.dtype.itemsize == 2
        with torch.autocast(x.device.type, self.dtype) if half else nullcontext():
            return methods.field_of(self.config, self.model)(x, t, **labels)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """dx/dt (B, *event) of Eq. (4), float32 or wider, at the sample (B, *event) and the height
        ``timestep`` > 0, a number, 0-dim or (B,); class_labels (B,) int64.
        """
        x = points(sample, "sample")
        t = each_height("timestep", timestep, len(x), x.device)
        labels = {} if class_labels is None else {"labels": class_labels}
        slope = Slope(self.field, x, self.substitution, labels)(x, t)
        return UNet2DOutput(sample=slope) if return_dict else (slope,)


def as_json(D: float | str) -> float | str:
    """Infinity is no number of JSON: "inf" stands for it in files."""
    value = positive("D", float(D), finite=False)
    return value if math.isfinite(value) else "inf"
