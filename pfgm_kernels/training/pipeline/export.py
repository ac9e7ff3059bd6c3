# SPDX-License-Identifier: Apache-2.0
"""A run as a folder that diffusers loads."""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from pfgm_kernels.files import TEMPORARY, naming
from pfgm_kernels.training import methods, networks
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.networks import own
from pfgm_kernels.training.pipeline import (
    PoissonFlowModel,
    PoissonFlowPipeline,
    PoissonFlowScheduler,
)
from pfgm_kernels.training.trainer import load_model


def export(run: Path, folder: Path, network: str | None = None) -> PoissonFlowPipeline:
    """Writes the model of the finished run in ``run`` as a folder for `from_pretrained`, which is
    whole or not there, and returns its pipeline.

    network: for a run whose network was given from Python: the package.module:factory that makes
    it. Raises FileNotFoundError or ValueError where there is no finished run in ``run``, or
    something in ``folder``.
    """
    config = TrainConfig.read(run)
    if config.network == networks.OWN and network is None:
        raise ValueError(
            f"the network of {run} was given from Python: expected network=package.module:factory "
            "that makes it, got none"
        )
    if config.network != networks.OWN and network is not None:
        raise ValueError(f"network expects None, for the run's {config.network}, got {network}")
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise ValueError(f"{folder} already holds something: name another folder")
    given = None
    if network is not None:
        given = own.make(networks.check_name(network), config.event_shape, config.classes)
    model, config = load_model(run, given)
    pipeline = pipeline_of(model, replace(config, network=network or config.network))
    temporary = folder.with_name(secrets.token_hex(8) + TEMPORARY)
    with naming(folder):
        try:
            pipeline.save_pretrained(temporary)
            for weights in temporary.rglob("*.safetensors"):  # which are private, unlike the rest
                shutil.copymode(temporary / "model_index.json", weights)
            os.replace(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return pipeline


def pipeline_of(model: torch.nn.Module, config: TrainConfig) -> PoissonFlowPipeline:
    """The pipeline of what `load_model` gave, with its own copy of the weights."""
    substitution = methods.substitution(config)
    unet = PoissonFlowModel(
        **config.of_network,
        low=config.low,
        high=config.high,
        substitute_below=None if substitution is None else substitution.below,
    )
    unet.model.load_state_dict(model.state_dict())
    return PoissonFlowPipeline(unet.eval(), PoissonFlowScheduler(T=config.T, D=config.D))
