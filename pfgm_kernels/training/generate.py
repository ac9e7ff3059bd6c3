# SPDX-License-Identifier: Apache-2.0
"""Samples of a trained network: by seed, in batches, each the same whatever it is drawn with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from pfgm_kernels._checks import integer, positive
from pfgm_kernels.flow import Churn, Trajectory, grid, sample, sample_prior
from pfgm_kernels.flow._queries import root_of
from pfgm_kernels.flow.grid import T_MIN
from pfgm_kernels.flow.solvers import SOLVERS
from pfgm_kernels.training import methods
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.progress import progress_bar
from pfgm_kernels.training.ranks import Ranks
from pfgm_kernels.training.trainer import threads

BATCH = {"cpu": 16, "cuda": 256}
"""A seed by itself costs as much as a whole batch."""


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn: with a model and a seed, what makes a sample.

    Raises ValueError or TypeError where options are out of range or do not go together.
    """

    solver: str = "heun"
    steps: int = 50
    """Of solvers with a grid, before the final one to t = 0."""
    rho: float | None = None
    """Of the grid of Karras et al. 2022; None for equal ratios."""
    sigma_min: float = T_MIN
    """The noise level at which the solver ends."""
    rtol: float | None = None
    """Of rk45, whose steps are each sample's own; None is 1e-4."""
    churn: tuple[float, ...] = ()
    """S_churn, S_min, S_max and S_noise of `Churn`, or the first of them; none for the ODE."""
    labels: tuple[int, ...] = ()
    """The classes that samples of a class-conditional run have in turn, by their seeds; none for
    all."""
    batch: int | None = None
    """How many samples the network is asked about at a time; None for what suits the device."""

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver expects one of {', '.join(SOLVERS)}, got {self.solver!r}")
        integer("steps", self.steps)
        positive("sigma_min", self.sigma_min)
        for name, check in (("batch", integer), ("rho", positive), ("rtol", positive)):
            if getattr(self, name) is not None:
                check(name, getattr(self, name))
        if len(self.churn) > 4:
            raise ValueError(
                "churn expects S_churn and, if need be, S_min, S_max and S_noise, "
                f"got {len(self.churn)} numbers"
            )
        if self.churn:
            self._churn(1)
        if self.rtol is not None and self.solver != "rk45":
            raise ValueError(f"rtol expects the solver rk45, got {self.solver}")
        for name, given in (("rho", self.rho is not None), ("churn", self.churn)):
            if given and self.solver == "rk45":
                raise ValueError(f"{name} expects a solver with a grid, got rk45")

    def of(self, config: TrainConfig, device: torch.device) -> Sampling:
        """The same with nothing left open. Raises ValueError for classes that the run has not."""
        for label in self.labels:
            if not 0 <= label < config.classes:
                known = f"of 0 to {config.classes - 1}" if config.classes else "of a run with some"
                raise ValueError(f"labels expects classes {known}, got {label}")
        return replace(
            self,
            labels=self.labels or tuple(range(config.classes)),
            batch=self.batch or BATCH[device.type],
        )

    def labels_of(self, seeds: Sequence[int]) -> Tensor:
        """(n,) int64: the class of each seed."""
        turn = self.labels
        return torch.tensor([turn[seed % len(turn)] for seed in seeds], device="cpu")

    def arguments(self, config: TrainConfig) -> dict[str, Any]:
        """Those of `sample`."""
        t_min = self.sigma_min * root_of(config.D)
        if self.solver == "rk45":
            tolerance = {"rtol": self.rtol or 1e-4, "per_sample": True}
            return {"solver": "rk45", "T": config.T, "t_min": t_min, **tolerance}
        times = grid(config.T, t_min, self.steps + 1, rho=self.rho)
        churn = self._churn(config.D) if self.churn else None
        return {"solver": self.solver, "times": times, "churn": churn}

    def _churn(self, D: float) -> Churn:
        names = ("S_churn", "S_min", "S_max", "S_noise")
        return Churn(D=D, **dict(zip(names, self.churn, strict=False)))


class Part(NamedTuple):
    """Samples that were drawn together."""

    seeds: list[int]
    result: Trajectory
    """On the CPU, a row a seed."""

    @property
    def evaluations(self) -> float:
        """Of the field, for a sample, in the mean."""
        each = self.result.evaluations
        return self.result.nfe if each is None else each.double().mean().item()


class Sampler:
    """Draws samples of a model: for a seed the draw of the prior on t = T that is its own, taken
    along the model's field to t = 0 (Eq. 4).

    The model is always asked about ``how.batch`` points, in which a sample has the row ``seed %
    how.batch``; where there are fewer samples, the other rows are copies. So a sample is its
    seed's, to the bit, whatever the other seeds, which were drawn before, and how many processes
    share them: on a CPU with as many threads as the config says, and on a GPU as far as its kernels
    are deterministic. Another ``how.batch``, device or version of torch can change last digits.

    model: the network of ``load_model``, or any function that is called as one. how: its attribute
    of that name is the same with nothing left open. Raises ValueError for what the run does not
    permit.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        config: TrainConfig,
        how: Sampling = Sampling(),
        ranks: Ranks = Ranks(),  # noqa: B008  (a tuple)
    ) -> None:
        self.config, self.device = config, ranks.device(config.device)
        self.how = how.of(config, self.device)
        self.batch = self.how.batch or BATCH[self.device.type]
        if isinstance(model, torch.nn.Module):
            model.to(self.device)
        self._field = at_fixed_rows(methods.field_of(config, model), self.batch)
        self._options = self.how.arguments(config)

    def generate(
        self, seeds: Iterable[int], console: Console, *, keep_path: bool = False
    ) -> Iterator[Part]:
        """The samples of different seeds, a batch at a time: memory is bounded by one, however many
        there are. Shows the progress on ``console``. With ``keep_path`` also the states on the way.
        """
        parts = batches(seeds, self.batch)
        count, done = sum(map(len, parts)), 0
        text = f"{count} samples by {self.how.solver}"
        with progress_bar(console, "Sampling", max(count, 1)) as update:
            for part in parts:

                def progress(share: float, start: int = done, size: int = len(part)) -> None:
                    update(start + share * size, text)

                yield Part(part, self._draw(part, keep_path, progress))
                done += len(part)

    def _draw(
        self, seeds: list[int], keep_path: bool, progress: Callable[[float], None]
    ) -> Trajectory:
        config, device = self.config, self.device
        prior: dict[str, Any] = {"T": config.T, "D": config.D, "seeds": seeds, "device": device}
        x = sample_prior(len(seeds), config.event_shape, **prior)
        of_each: dict[str, Any] = {
            "rows": torch.tensor([seed % self.batch for seed in seeds], device=device)
        }
        if config.classes:
            of_each["labels"] = self.how.labels_of(seeds).to(device)
        with threads(config.threads):
            result = sample(
                self._field,
                x,
                seeds=seeds if self.how.churn else None,
                substitution=methods.substitution(config),
                keep_path=keep_path,
                progress=progress,
                **of_each,
                **self._options,
            )
        return replace(
            result,
            x=result.x.cpu(),
            path=None if result.path is None else result.path.cpu(),
            evaluations=None if result.evaluations is None else result.evaluations.cpu(),
        )


def batches(seeds: Iterable[int], size: int) -> list[list[int]]:
    """Lists of up to ``size`` seeds that differ modulo ``size``; consecutive ones stay together."""
    columns: list[list[int]] = [[] for _ in range(size)]
    for seed in seeds:
        columns[seed % size].append(seed)
    return [[seed for seed in row if seed is not None] for row in zip_longest(*columns)]


def at_fixed_rows(field_fn: Callable[..., Tensor], batch: int) -> Callable[..., Tensor]:
    """The field, which is always asked about ``batch`` points: those given stand at ``rows``, (b,)
    int64, and the others are copies of the first. Sums in a network are ordered by the shapes that
    it sees, and by where in them a sample is.
    """

    def field(x: Tensor, t: Tensor, *, rows: Tensor, **of_each: Tensor) -> Tensor:
        def placed(values: Tensor) -> Tensor:
            whole = values[:1].expand(batch, *values.shape[1:]).clone()
            whole[rows] = values
            return whole

        more = {name: placed(values) for name, values in of_each.items()}
        return field_fn(placed(x), placed(t), **more)[rows]

    return field
