# SPDX-License-Identifier: Apache-2.0
"""What a run looks at while it goes on: losses by noise level, held-out loss, a few samples."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pfgm_kernels.flow import sample, sample_prior
from pfgm_kernels.flow._queries import root_of, t_to_sigma
from pfgm_kernels.flow.grid import T_MIN, grid
from pfgm_kernels.training import methods
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.data.dataset import pictures
from pfgm_kernels.training.ranks import Ranks

QUERIES = 1024
"""Held-out points whose loss is taken."""
LEVELS = (0.01, 0.1, 1.0, 10.0)
PICTURES, STEPS = 16, 18
SEED = 0


class Monitor:
    """Looks at a model, in its eval mode, in the same way at each step that it is asked of.

    Its queries are drawn around the same held-out points by the same numbers, and its targets are
    exact, whatever the run trains on: the losses of runs that differ in their targets alone are of
    one kind. Their references are the training part and these held-out points: near a point that
    it does not have the training part has none but far images to be a mean of, which a model that
    generalises is not to know. It draws no random number that the run would miss.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: DataSet,
        device: torch.device,
        ranks: Ranks = Ranks(),  # noqa: B008  (a tuple)
    ) -> None:
        self.config, self.data, self.device, self.ranks = config, data, device, ranks

    @cached_property
    def loss(self) -> Any:
        data, config = self.data, self.config
        labels = None
        if data.train_labels is not None and data.held_out_labels is not None:
            labels = torch.cat([data.train_labels, data.held_out_labels[:QUERIES]])
        known = replace(
            data, train=torch.cat([data.train, data.held_out[:QUERIES]]), train_labels=labels
        )
        targets = "exact" if config.method == "pfgmpp" else config.targets
        exact = replace(config, targets=targets)
        references = methods.references_of(exact, known, self.device, self.ranks)
        return methods.make_loss(exact, references)

    def losses(self, model: nn.Module) -> dict[str, float]:
        """The held-out loss, in all and by noise level; nothing where no points are held out."""
        if len(self.data.held_out) == 0:
            return {}
        predicted = methods.as_predicted(self.config, model)
        generator = torch.Generator(self.device).manual_seed(SEED)
        labels = self.data.held_out_labels if self.config.classes else None
        seen = []
        for i in range(0, min(QUERIES, len(self.data.held_out)), self.config.batch_size):
            rows = slice(i, min(i + self.config.batch_size, QUERIES))
            batch = self.data.decode(self.data.held_out[rows].to(self.device))
            options: dict[str, Any] = {"generator": generator}
            if labels is not None:
                options["labels"] = labels[rows].to(self.device)
            with torch.no_grad():
                seen.append(self.loss.per_query(predicted, batch, **options))
        return by_level("held_out_loss", seen, self.config.D)

    def samples(self, model: nn.Module) -> Tensor | None:
        """A few samples (n, channels, h, w) in [0, 1] of fixed draws of the prior, by EDM's grid
        and solver; None where the data is no image.
        """
        config = self.config
        if not self.data.is_image:
            return None
        t_min = T_MIN * root_of(config.D)
        options: dict[str, Any] = {}
        if config.classes:
            options["labels"] = torch.arange(PICTURES, device=self.device) % config.classes
        prior = sample_prior(
            PICTURES, config.event_shape, T=config.T, D=config.D, seeds=range(PICTURES)
        )
        x = sample(
            methods.field_of(config, model),
            prior.to(self.device),
            times=grid(config.T, t_min, STEPS, rho=7),
            substitution=methods.substitution(config),
            **options,
        ).x
        return pictures(x, self.data.low, self.data.high).float()


def by_level(name: str, seen: Sequence[tuple[Tensor, Tensor]], D: float) -> dict[str, float]:
    """The mean of losses (B,) at heights t (B,), and that of each level of noise σ = t / √D, named
    ``name``, ``name/sigma_below_1`` and so on; nothing of none.
    """
    if not seen:
        return {}
    sigma = t_to_sigma(torch.cat([t.double() for t, _ in seen]), D)
    losses = torch.cat([loss.double() for _, loss in seen])
    levels = torch.bucketize(sigma, sigma.new_tensor(LEVELS), right=True)
    names = [f"{name}/sigma_below_{level:g}" for level in LEVELS]
    names.append(f"{name}/sigma_from_{LEVELS[-1]:g}")
    found = {names[level]: losses[levels == level].mean().item() for level in levels.unique()}
    return {name: losses.mean().item()} | found


def peak_mib(device: torch.device) -> float:
    """The most memory so far: of torch on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
