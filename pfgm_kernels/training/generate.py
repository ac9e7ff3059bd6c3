# SPDX-License-Identifier: Apache-2.0
"""Samples of a trained network."""

from __future__ import annotations

import torch
from rich.console import Console

from pfgm_kernels._checks import integer
from pfgm_kernels.flow import Trajectory, sample, sample_prior
from pfgm_kernels.training.config import LEAST_SEED, TrainConfig
from pfgm_kernels.training.network import FieldNetwork
from pfgm_kernels.training.progress import progress_bar
from pfgm_kernels.training.trainer import threads


def generate(
    network: FieldNetwork,
    config: TrainConfig,
    count: int,
    *,
    seed: int,
    solver: str,
    steps: int,
    console: Console,
    keep_path: bool = False,
) -> Trajectory:
    """``count`` draws of the prior on t = T, taken along the network's field to t = 0 (Eq. 4).

    Shows the progress on ``console``. Raises ValueError for a count, solver or steps out of range.
    """
    generator = torch.Generator("cpu").manual_seed(integer("seed", seed, LEAST_SEED))
    x = sample_prior(count, config.event_shape, T=config.T, generator=generator)
    with threads(config.threads), progress_bar(console, "Sampling", 1.0) as update:
        return sample(
            network,
            x,
            T=config.T,
            solver=solver,
            steps=steps,
            keep_path=keep_path,
            progress=lambda done: update(done, f"{count} samples by {solver}"),
        )
