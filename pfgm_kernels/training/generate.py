# SPDX-License-Identifier: Apache-2.0
"""Samples of a trained network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from pfgm_kernels._checks import integer
from pfgm_kernels.flow import Trajectory, sample, sample_prior
from pfgm_kernels.flow._queries import root_of
from pfgm_kernels.flow.grid import T_MIN
from pfgm_kernels.training import methods
from pfgm_kernels.training.config import LEAST_SEED, TrainConfig
from pfgm_kernels.training.progress import progress_bar
from pfgm_kernels.training.ranks import Ranks
from pfgm_kernels.training.trainer import threads


def generate(
    model: Callable[..., Tensor],
    config: TrainConfig,
    count: int,
    *,
    seed: int,
    solver: str,
    steps: int,
    console: Console,
    keep_path: bool = False,
) -> Trajectory:
    """``count`` draws of the prior on t = T, taken along the model's field to t = 0 (Eq. 4); of a
    class-conditional run one of each class in turn. The solver ends at the noise level `T_MIN`.

    Shows the progress on ``console``. Raises ValueError for a count, solver or steps out of range.
    """
    generator = torch.Generator("cpu").manual_seed(integer("seed", seed, LEAST_SEED))
    device = Ranks().device(config.device)
    if isinstance(model, torch.nn.Module):
        model.to(device)
    x = sample_prior(count, config.event_shape, T=config.T, D=config.D, generator=generator)
    x = x.to(device)
    labels: dict[str, Any] = {}
    if config.classes:
        labels["labels"] = torch.arange(count, device=x.device) % config.classes
    with threads(config.threads), progress_bar(console, "Sampling", 1.0) as update:
        result = sample(
            methods.field_of(config, model),
            x,
            T=config.T,
            t_min=T_MIN * root_of(config.D),
            solver=solver,
            steps=steps,
            keep_path=keep_path,
            substitution=methods.substitution(config),
            progress=lambda done: update(done, f"{count} samples by {solver}"),
            **labels,
        )
    path = None if result.path is None else result.path.cpu()
    return replace(result, x=result.x.cpu(), path=path)
