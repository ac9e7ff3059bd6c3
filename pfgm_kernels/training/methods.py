# SPDX-License-Identifier: Apache-2.0
"""What a model is trained on, and how it is sampled from: PFGM, Eq. (10) and PFGM++."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pfgm_kernels import ReferenceSet
from pfgm_kernels.flow import (
    FieldLoss,
    PosteriorMeanLoss,
    Substitution,
    UnnormalizedLoss,
    as_denoiser,
    as_field,
)

if TYPE_CHECKING:
    from pfgm_kernels.training.config import TrainConfig
    from pfgm_kernels.training.data import DataSet
    from pfgm_kernels.training.ranks import Ranks

METHODS = ("pfgm", "unnormalized", "pfgmpp")
TARGETS = ("exact", "clean")
Function = Callable[..., Tensor]


def check_method(config: TrainConfig) -> None:
    """Raises ValueError where the config asks for what does not go together."""
    if config.method == "unnormalized" and config.predicts != "field":
        raise ValueError(
            "method=unnormalized expects a network that predicts the field itself "
            f"(predicts=field), got predicts={config.predicts}"
        )
    if config.method == "pfgmpp" and config.predicts == "field":
        raise ValueError(
            "method=pfgmpp expects a network that predicts a mean (predicts=denoiser), got "
            "predicts=field"
        )
    if math.isinf(config.D) and config.method == "unnormalized":
        raise ValueError("method=unnormalized expects a finite D, got inf")
    if math.isinf(config.D) and config.predicts == "field":
        raise ValueError("predicts=field expects a finite D, got inf")
    if config.references and not needs_references(config):
        raise ValueError(
            f"references expects 0 where no target is of references, got {config.references}"
        )
    if config.sharded and (config.classes or config.references or not needs_references(config)):
        raise ValueError(
            "sharded=true expects targets of the whole data set, without classes, got "
            f"method={config.method}, classes={config.classes}, references={config.references}"
        )
    if 0 < config.references < config.batch_size:
        raise ValueError(
            "references expects 0, for the whole data set, or at least the batch_size "
            f"({config.batch_size}), as a step's queries are around some of them; "
            f"got {config.references}"
        )


def needs_references(config: TrainConfig) -> bool:
    """Whether the targets are sums over references."""
    return config.method == "pfgm" or (config.method == "pfgmpp" and config.targets == "exact")


def count_classes(data: DataSet) -> int:
    """The number of classes, labelled from 0 on. Raises ValueError where there are no labels."""
    if data.train_labels is None:
        raise ValueError(f"a class-conditional run expects data with labels, got {data.name}")
    return int(data.train_labels.max()) + 1


def references_of(
    config: TrainConfig, data: DataSet, device: torch.device, ranks: Ranks
) -> ReferenceSet | None:
    """The whole training part on the device, with its labels where the run is class-conditional; of
    a sharded run this rank's part; None where no target is of references.
    """
    if config.classes and count_classes(data) > config.classes:
        raise ValueError(f"classes expects at least {count_classes(data)}, got {config.classes}")
    if not needs_references(config):
        return None
    if config.sharded and ranks.world > 1:
        return data.references_of_part(ranks.rank, ranks.world, device)
    return (data.references_by_class() if config.classes else data.references).to(device)


def make_loss(
    config: TrainConfig, references: ReferenceSet | None
) -> FieldLoss | UnnormalizedLoss | PosteriorMeanLoss:
    """The loss of the config, of what `as_predicted` makes of its model; references as of
    `references_of`.
    """
    noise: dict[str, Any] = {
        "D": config.D,
        "sigma": config.sigma,
        "tau": config.tau,
        "M": config.M,
        "restrict_M": config.restrict_M,
    }
    if config.method == "unnormalized":
        return UnnormalizedLoss(**noise)
    if config.method == "pfgm":
        assert references is not None
        return FieldLoss(references, gamma=config.gamma, **noise)
    return PosteriorMeanLoss(
        references,
        D=config.D,
        sigma_data=config.sigma_data,
        mean=config.log_sigma_mean,
        std=config.log_sigma_std,
    )


def as_predicted(config: TrainConfig, model: Function) -> Function:
    """What the loss looks at: a field, normalised as its target, or a denoiser."""
    if config.method == "pfgmpp":
        return model if config.predicts == "denoiser" else as_denoiser(model)
    return _normalised(config, as_field(model)) if config.predicts == "denoiser" else model


def field_of(config: TrainConfig, model: Function) -> Function:
    """The field to sample from."""
    return as_field(model) if config.predicts == "denoiser" else model


def substitution(config: TrainConfig) -> Substitution | None:
    """For the t-component at small t, which a network that predicts it does not get right."""
    if config.predicts != "field" or config.method != "pfgm" or config.gamma == 0:
        return None
    return Substitution(config.gamma, below=config.gamma)


def _normalised(config: TrainConfig, field_fn: Function) -> Function:
    scale = math.sqrt(math.prod(config.event_shape))

    def normalised(x: Tensor, t: Tensor, **keywords: Any) -> Tensor:
        field = field_fn(x, t, **keywords)
        return scale * field / (torch.linalg.vector_norm(field, dim=1, keepdim=True) + config.gamma)

    return normalised
