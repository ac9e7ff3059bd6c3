# SPDX-License-Identifier: Apache-2.0
"""How likely held-out data are under the flow of a trained network."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from pfgm_kernels._checks import integer, positive
from pfgm_kernels.files import write_bytes
from pfgm_kernels.flow import bits_per_dim, log_likelihood
from pfgm_kernels.flow._queries import root_of
from pfgm_kernels.training import methods
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.generate import BATCH
from pfgm_kernels.training.progress import progress_bar
from pfgm_kernels.training.ranks import Ranks
from pfgm_kernels.training.state import seed_of
from pfgm_kernels.training.trainer import threads


@dataclass(frozen=True)
class Likelihood:
    """Of held-out points, (n,) float64 each."""

    rows: Tensor
    """Which of the held-out part they are, int64."""
    log_p: Tensor
    """In nats: at noise level sigma_min; of images, of which noise fills the steps of 8 bits."""
    bits: Tensor
    """Per dimension: of images an upper bound of the code length of their 8 bits in the mean; of
    other data those of the density, −log_p / (d log 2)."""
    nfe: float
    """Evaluations of the field for a batch, in the mean."""

    @property
    def mean(self) -> float:
        return self.bits.mean().item()

    @property
    def error(self) -> float | None:
        """The standard error of the mean; None of one point."""
        return self.bits.std().item() / math.sqrt(len(self.bits)) if len(self.bits) > 1 else None


def likelihood(
    model: Callable[..., Tensor],
    config: TrainConfig,
    data: DataSet,
    count: int,
    *,
    sigma_min: float,
    rtol: float,
    console: Console,
    exact: bool = False,
    seed: int = 0,
    batch: int | None = None,
) -> Likelihood:
    """The log density that the model's flow gives ``count`` held-out points, drawn at random
    without repetition (all, where there are fewer), of class-conditional runs given their classes.

    Images get uniform noise as wide as a step of their 8 bits (dequantisation). The divergence is
    estimated by one probe a point, or with ``exact`` computed, by a backward pass a dimension.
    ``seed`` is that of the choice, the noise and the probes. Raises ValueError for data of another
    kind than the run's.
    """
    device = Ranks().device(config.device)
    size = integer("batch", BATCH[device.type] if batch is None else batch)
    t_min = positive("sigma_min", sigma_min) * root_of(config.D)
    check_data(config, data)
    generator = torch.Generator("cpu").manual_seed(seed_of(seed, 0, 0))
    rows = torch.randperm(len(data.held_out), generator=generator, device="cpu")
    rows = rows[: integer("count", count)]
    if isinstance(model, torch.nn.Module):
        model.to(device)
    field, d = methods.field_of(config, model), math.prod(config.event_shape)
    found: list[Tensor] = []
    nfe, done = 0, 0
    with progress_bar(console, "Likelihood", len(rows)) as update, threads(config.threads):
        for part in rows.split(size):
            generator = torch.Generator("cpu").manual_seed(seed_of(seed, 1, done))
            x = with_noise(data, data.held_out[part], generator).to(device)

            def progress(share: float, start: int = done, size: int = len(part)) -> None:
                update(start + share * size, f"{len(rows)} held-out points")

            result = log_likelihood(
                field,
                x,
                T=config.T,
                D=config.D,
                t_min=t_min,
                rtol=rtol,
                per_sample=True,
                divergence="exact" if exact else "hutchinson",
                generator=generator,
                substitution=methods.substitution(config),
                progress=progress,
                **labels_of(config, data, part, device),
            )
            found.append(result.log_p.cpu())
            nfe += result.nfe * len(part)
            done += len(part)
    log_p = torch.cat(found)
    bits = -log_p / (d * math.log(2))
    if data.is_image:
        bits = bits_per_dim(log_p, d, data.low, data.high)
    return Likelihood(rows, log_p, bits, nfe / len(rows))


def check_data(config: TrainConfig, data: DataSet) -> None:
    """Raises ValueError for data of another kind than the run's, or without the labels that it
    needs, or with nothing held out.
    """
    expected, got = (
        f"{'images' if images else 'points'} of shape {event_shape}"
        for images, event_shape in (
            (config.images, config.event_shape),
            (data.is_image, data.event_shape),
        )
    )
    if expected != got:
        raise ValueError(f"data expects {expected}, as the run's are, got {got}")
    if len(data.held_out) == 0:
        raise ValueError(f"data expects some held out, got none of {data.name}")
    labels = data.held_out_labels
    if config.classes and (labels is None or int(labels.max()) >= config.classes):
        raise ValueError(f"data expects labels from 0 to {config.classes - 1}, got others or none")


def with_noise(data: DataSet, values: Tensor, generator: torch.Generator) -> Tensor:
    """The float32 points of stored values; of images with uniform noise, each in its cell."""
    if not data.is_image:
        return data.decode(values)
    width = (data.high - data.low) / 255
    noise = torch.rand(values.shape, generator=generator, dtype=torch.float64, device="cpu")
    return (data.decode(values).double() + width * (noise - 0.5)).float()


def labels_of(
    config: TrainConfig, data: DataSet, rows: Tensor, device: torch.device
) -> dict[str, Any]:
    """Keywords of the field for held-out rows."""
    if not config.classes or data.held_out_labels is None:
        return {}
    return {"labels": data.held_out_labels[rows].to(device)}


def write(result: Likelihood, source: dict[str, Any], path: Path) -> None:
    """``source`` says what was measured and how; of each point there is the row and its bits."""
    content = {
        "source": source,
        "count": len(result.bits),
        "bits_per_dim": result.mean,
        "standard_error": result.error,
        "log_p": result.log_p.mean().item(),
        "nfe": result.nfe,
        "rows": result.rows.tolist(),
        "bits_per_dim_of_each": result.bits.tolist(),
    }
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())
