# SPDX-License-Identifier: Apache-2.0
"""All that changes while training: one step of it, and how to save and restore it."""

from __future__ import annotations

import hashlib
import math
import statistics
import struct
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel

from pfgm_kernels.flow import UnnormalizedLoss
from pfgm_kernels.training import checkpoint, methods
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.monitor import by_level, peak_mib
from pfgm_kernels.training.ranks import Ranks

REPORT_EVERY = 10
RECENT = 50
"""How many losses say what a spike is."""
KEYS = {"step", "parts", "groups", "skipped", "in_a_row", "recent", "scaler"}


class Step(NamedTuple):
    """What one step was."""

    loss: float
    """The mean over the batch of all ranks."""
    norm: float
    """Of the gradient, before it is clipped."""
    skipped: bool
    stopped: bool
    """Whether any rank is asked to stop."""
    targets: float
    """The share of the step that drawing queries and computing their targets took."""
    rate: float
    """The learning rate."""
    decay: float
    """What the average kept of itself."""


class Training:
    """A model in training: its averaged weights, its optimizer, its step."""

    def __init__(
        self,
        config: TrainConfig,
        data: DataSet,
        network: torch.nn.Module | None = None,
        ranks: Ranks = Ranks(),  # noqa: B008  (a tuple)
    ) -> None:
        self.config, self.data, self.ranks = config, data, ranks
        self.device = ranks.device(config.device)
        for name, of_data in (
            ("event_shape", data.event_shape),
            ("held_out", data.share),
            ("flips", data.flips),
        ):
            if (value := getattr(config, name)) != of_data:
                raise ValueError(f"{name} expects that of the data, {of_data}, got {value}")
        self.parts = ranks.world * config.accumulation
        if config.batch_size % self.parts:
            raise ValueError(
                f"batch_size expects a multiple of {self.parts} (ranks times accumulation), "
                f"got {config.batch_size}"
            )
        self.references = methods.references_of(config, data, self.device, ranks)
        self.loss = methods.make_loss(config, self.references)
        self.network = config.model(data, network).to(self.device)
        self.parallel = ranks.parallel(self.network, self.device)
        self.function = torch.compile(self.parallel) if config.compile else self.parallel
        self.average = AveragedModel(self.network, self.device, multi_avg_fn=self._average)
        self.average.module.eval()
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.learning_rate, fused=True
        )
        half = config.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.step = self.skipped = self.in_a_row = 0
        self.recent: list[float] = []
        self.losses: list[tuple[Tensor, Tensor]] = []
        """Heights and losses of this rank's queries since they were last taken away."""

    def advance(self, stop: Callable[[], bool] = lambda: False) -> Step:
        """One step. ``stop`` says whether this rank is asked to stop, which all are told of."""
        config, accumulation = self.config, self.config.accumulation
        began, self._targets = time.perf_counter(), 0.0
        rate, decay = self.rate, self.decay
        self.optimizer.zero_grad()
        total = 0.0
        for i in range(accumulation):
            with nullcontext() if i == accumulation - 1 else self.ranks.apart(self.parallel):
                loss = self._loss(self.ranks.rank * accumulation + i) / accumulation
                self.scaler.scale(loss).backward()
            total += loss.item()
        self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(self.network.parameters(), config.clip_norm).item()
        value, stopped = self.ranks.agree(total, stop(), self.device)
        skipped = not math.isfinite(norm) or self._is_spike(value)
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.scaler.step(self.optimizer)
            self.average.update_parameters(self.network)
            self.recent = [*self.recent, value][-RECENT:]
        self.scaler.update()
        self.step += 1
        self.skipped += skipped
        if skipped:
            del self.losses[-accumulation:]
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        share = self._targets / (time.perf_counter() - began)
        return Step(value, norm, skipped, stopped, share, rate, decay)

    def numbers(self, done: Step) -> dict[str, float]:
        """What to report of the step that is just ``done``; takes the losses so far away."""
        seen, self.losses = self.losses, []
        return by_level("loss", seen, self.config.D) | {
            "gradient_norm": done.norm,
            "learning_rate": done.rate,
            "average_decay": done.decay,
            "skipped": self.skipped,
            "images": self.step * self.config.batch_size,
            "targets_share": done.targets,
            "memory_mib": peak_mib(self.device),
        }

    @property
    def rate(self) -> float:
        """The learning rate of the step to come: it rises in equal steps over the warm-up."""
        return self.config.learning_rate * min(1.0, (self.step + 1) / self.config.warmup)

    @property
    def decay(self) -> float:
        """What the average keeps of itself at the step to come. Its half-life in images is short at
        first, as the first weights are not worth keeping.
        """
        config = self.config
        halflife = config.ema_halflife
        if config.ema_rampup > 0:
            halflife = min(halflife, config.ema_rampup * (self.step + 1) * config.batch_size)
        return 0.5 ** (config.batch_size / halflife)

    def _loss(self, part: int) -> Tensor:
        """Of one part of the batch. All that is random in it comes from the seed, part and step, so
        that ranks and accumulated parts are one and the same, and a resumed run needs no state.
        """
        seed = seed_of(self.config.seed, part, self.step)
        rows = self._rows(torch.Generator("cpu").manual_seed(seed))
        train, labels = self.data.train, self.data.train_labels
        batch = self.data.decode(train[rows].to(self.device))
        options: dict[str, Any] = {"generator": torch.Generator(self.device).manual_seed(seed)}
        if self.config.classes and labels is not None:
            options["labels"] = labels[rows].to(self.device)
        self._clock = self._now()
        predicted = methods.as_predicted(self.config, self._call)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # what a network draws itself, as for dropout
            torch.manual_seed(seed)
            heights, losses = self.loss.per_query(predicted, batch, **options)
        self.losses.append((heights, losses.detach()))
        return losses.mean()

    def _call(self, x: Tensor, t: Tensor, **labels: Tensor) -> Tensor:
        """The model, in the precision asked for. Losses call it when they have their targets."""
        self._targets += self._now() - self._clock
        dtype = getattr(torch, self.config.precision)
        reduced = dtype != torch.float32
        with torch.autocast(self.device.type, dtype, enabled=reduced) if reduced else nullcontext():
            return self.function(x, t, **labels)

    def _rows(self, generator: torch.Generator) -> Tensor:
        """Those of a part. Where it has references of its own they are drawn with them: a query
        needs the point that it was made of among its references.
        """
        count, size = len(self.data.train), self.config.batch_size // self.parts
        if self.config.references:
            assert self.references is not None
            assert not isinstance(self.loss, UnnormalizedLoss)
            drawn = torch.randperm(count, generator=generator, device="cpu")
            chosen = drawn[: self.config.references].to(self.device)
            self.loss.references = self.references[chosen]
            return drawn[:size]
        return torch.randint(count, (size,), generator=generator, device="cpu")

    def _is_spike(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        few = len(self.recent) < RECENT
        return not few and loss > self.config.spike * statistics.median(self.recent)

    def _average(self, average: Any, current: Any, updates: object) -> None:
        torch._foreach_lerp_(average, current, 1 - self.decay)

    def _now(self) -> float:
        if self.device.type == "cuda" and (self.step + 1) % REPORT_EVERY == 0:
            torch.cuda.synchronize(self.device)  # in steps that are reported alone
        return time.perf_counter()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Every tensor by name, and the rest as JSON values."""
        optimizer, groups = checkpoint.flatten_optimizer(self.optimizer)
        tensors = self._weights() | _prefixed("optimizer.", optimizer)
        return tensors, {
            "version": checkpoint.VERSION,
            "step": self.step,
            "parts": self.parts,
            "groups": groups,
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "recent": self.recent,
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Puts back what ``state`` gave, read from ``path``. Raises ValueError where that is of
        another network, or of batches in other parts.
        """
        version = state.pop("version", None)
        checkpoint.match_keys(path, KEYS, state.keys(), version)
        if state["parts"] != self.parts:  # each draws its own: with others it is another run
            raise ValueError(
                f"{path} is of batches in {state['parts']} parts: expected as many ranks times "
                f"accumulation, got {self.ranks.world} * {self.config.accumulation}"
            )
        optimizer = checkpoint.without_prefix("optimizer.", tensors)
        weights = {name: tensors[name] for name in tensors if not name.startswith("optimizer.")}
        checkpoint.match(path, self._weights(), weights, version)
        self.network.load_state_dict(checkpoint.without_prefix("network.", weights))
        self.average.load_state_dict(checkpoint.without_prefix("average.", weights))
        checkpoint.load_optimizer(self.optimizer, optimizer, state["groups"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped = state["step"], state["skipped"]
        self.in_a_row, self.recent = state["in_a_row"], state["recent"]

    def _weights(self) -> dict[str, Tensor]:
        return {
            **_prefixed("network.", self.network.state_dict()),
            **_prefixed("average.", self.average.state_dict()),
        }


def seed_of(seed: int, part: int, step: int) -> int:
    """The seed of one part of one step: any three numbers give an unrelated one."""
    digest = hashlib.blake2b(struct.pack("<3q", seed, part, step), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}
