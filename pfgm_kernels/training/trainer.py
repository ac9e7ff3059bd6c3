# SPDX-License-Identifier: Apache-2.0
"""The training loop of Eq. (12): Adam, averaged weights, checkpoints that resume bit-exactly."""

from __future__ import annotations

import math
import shlex
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pfgm_kernels.files import LOCK, locked, naming
from pfgm_kernels.flow import UnnormalizedLoss
from pfgm_kernels.training import checkpoint, methods
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.progress import progress_bar

MODEL = "model.safetensors"
LOG_EVERY = 10
# A resumed run may go further or save at other steps; in all else it is the run that it continues.
MAY_CHANGE = ("steps", "checkpoint_every")


@dataclass(frozen=True)
class Run:
    """How a call of ``train`` went: the losses of its steps and whether it reached the last one."""

    losses: list[float]
    first_step: int
    finished: bool
    seconds: float


class Training:
    """All that changes while training, and how to save and restore it."""

    def __init__(
        self, config: TrainConfig, data: DataSet, network: torch.nn.Module | None = None
    ) -> None:
        self.config = config
        self.data = data
        self.references = methods.references_of(config, data)
        self.loss = methods.make_loss(config, self.references)
        self.network = config.model(data, network)
        self.average = AveragedModel(
            self.network, torch.device("cpu"), multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)
        )
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.learning_rate, fused=True
        )
        self.scheduler = LinearLR(self.optimizer, 1 / config.warmup, total_iters=config.warmup)
        self.generator = torch.Generator("cpu").manual_seed(config.seed)
        self.step = 0

    def advance(self) -> tuple[float, float]:
        """One step; the loss and the norm of its gradient."""
        rows = self._rows()
        batch = self.data.decode(self.data.train[rows])
        options = {}
        if self.config.classes and self.data.train_labels is not None:
            options["labels"] = self.data.train_labels[rows]
        predicted = methods.as_predicted(self.config, self.network)
        loss = self.loss(predicted, batch, generator=self.generator, **options)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.average.update_parameters(self.network)
        self.step += 1
        return loss.item(), norm.item()

    def _rows(self) -> Tensor:
        """Those of the batch. Where a step has references of its own they are drawn with them: a
        query needs the point that it was made of among its references.
        """
        count, size, generator = len(self.data.train), self.config.batch_size, self.generator
        if self.config.references and not isinstance(self.loss, UnnormalizedLoss):
            drawn = torch.randperm(count, generator=generator, device=generator.device)
            self.loss.references = self.references[drawn[: self.config.references]]
            return drawn[:size]
        return torch.randint(count, (size,), generator=generator, device=generator.device)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Every tensor by name, and the rest as JSON values."""
        optimizer, groups = checkpoint.flatten_optimizer(self.optimizer)
        tensors = self._weights() | _prefixed("optimizer.", optimizer)
        return tensors, {
            "version": checkpoint.VERSION,
            "step": self.step,
            "groups": groups,
            "scheduler": self.scheduler.state_dict(),
        }

    def restore(self, path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Puts back what ``state`` gave, read from ``path``."""
        version = state.pop("version", None)
        checkpoint.match_keys(path, {"step", "groups", "scheduler"}, state.keys(), version)
        optimizer = _without_prefix("optimizer.", tensors)
        weights = {name: tensors[name] for name in tensors if not name.startswith("optimizer.")}
        checkpoint.match(path, self._weights(), weights, version)
        self.network.load_state_dict(_without_prefix("network.", weights))
        self.average.load_state_dict(_without_prefix("average.", weights))
        checkpoint.load_optimizer(self.optimizer, optimizer, state["groups"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(tensors["generator"])
        self.step = state["step"]

    def _weights(self) -> dict[str, Tensor]:
        return {
            **_prefixed("network.", self.network.state_dict()),
            **_prefixed("average.", self.average.state_dict()),
            "generator": self.generator.get_state(),
        }


def train(
    config: TrainConfig,
    data: DataSet,
    folder: Path,
    *,
    network: torch.nn.Module | None = None,
    resume: bool = False,
    replace: bool = False,
    console: Console | None = None,
) -> Run:
    """Trains in ``folder``, or continues there, until ``config.steps`` or a signal to stop.

    Checkpoints go to ``checkpoints/``, curves to ``tensorboard/``, the averaged weights of a
    finished run to ``model.safetensors``. Ctrl-C and SIGTERM end the current step, save a
    checkpoint and return; a second signal ends at once. With ``replace`` a run in the folder is
    removed first. ``network`` is what to train where the config says ``network="own"``, called as
    `pfgm_kernels.training.networks` says. Raises ValueError where the folder holds another run or,
    without either, any run, and where another process trains there.
    """
    with locked(folder):
        training = Training(config, data, network)
        _claim(folder, config, resume, replace)
        return _train(training, folder, resume, console or Console())


def _train(training: Training, folder: Path, resume: bool, console: Console) -> Run:
    began, config = time.monotonic(), training.config
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
    if resume and (newest := checkpoints.newest()) is not None:
        training.restore(*newest)
        console.print(f"Resuming after step {training.step}, from {newest[0]}.", soft_wrap=True)
    first = training.step
    if first > config.steps:
        raise ValueError(f"steps expects at least the {first} that are done, got {config.steps}")
    config.write(folder)
    with threads(config.threads), _stop_on_signal() as stopped, _curves(folder, first) as curve:
        losses = _advance(training, checkpoints, stopped, curve, console)
    finished = training.step == config.steps
    if finished:
        weights = training.average.module.state_dict()
        state = {"version": checkpoint.VERSION, "step": training.step}
        checkpoint.write(folder / MODEL, weights, state)
    else:
        console.print(
            f"Stopped after step {training.step} of {config.steps}; a checkpoint is saved, "
            "--resume continues from it.",
            soft_wrap=True,
        )
    return Run(losses, first, finished, time.monotonic() - began)


def _advance(
    training: Training,
    checkpoints: checkpoint.Checkpoints,
    stopped: threading.Event,
    curve: Callable[[dict[str, float], int], None],
    console: Console,
) -> list[float]:
    """Trains to the last step or until ``stopped``, saving as it goes; the losses of the steps."""
    config, first, began = training.config, training.step, time.monotonic()
    losses: list[float] = []
    with progress_bar(console, "Training", config.steps, first) as update:
        while training.step < config.steps:
            loss, norm = training.advance()
            step = training.step
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"training diverged: the loss of step {step} is {loss}; "
                    f"the checkpoints in {checkpoints.folder} are from before"
                )
            losses.append(loss)
            last = step == config.steps or stopped.is_set()
            if step % config.checkpoint_every == 0 or last:
                checkpoints.save(step, *training.state())
            if step % LOG_EVERY == 0 or last:
                speed = len(losses) / (time.monotonic() - began)
                mean = sum(losses[-LOG_EVERY:]) / len(losses[-LOG_EVERY:])
                update(step, f"step {step}/{config.steps}  loss {mean:.3g}  {speed:.1f} steps/s")
                curve({"loss": mean, "gradient_norm": norm, "steps_per_second": speed}, step)
            if last:
                break
    return losses


def load_model(
    folder: Path, network: torch.nn.Module | None = None
) -> tuple[torch.nn.Module, TrainConfig]:
    """The averaged model of the finished run in ``folder``, and what the run was given. A model
    around ``network``, which takes the weights, where the run was given its own from Python.

    Raises FileNotFoundError or ValueError, naming the file, where something is missing or damaged.
    """
    config = TrainConfig.read(folder)
    model = config.model(network=network)
    path = folder / MODEL
    finish = f"pfgm train --out {shlex.quote(str(folder))} --resume"
    if not path.is_file():
        raise FileNotFoundError(
            f"expected the model {path}; it does not exist, the run is not finished: "
            f"`{finish}` finishes it"
        )
    weights, state = checkpoint.read(path)
    version = state.pop("version", None)
    checkpoint.match_keys(path, {"step"}, state.keys(), version)
    checkpoint.match(path, model.state_dict(), weights, version)
    if state["step"] < config.steps:
        warnings.warn(
            f"{path} is of step {state['step']} of {config.steps}: `{finish}` finishes the run",
            stacklevel=2,
        )
    model.load_state_dict(weights)
    return model.eval(), config


def _claim(folder: Path, config: TrainConfig, resume: bool, replace: bool) -> None:
    """Raises ValueError unless ``config`` may train in ``folder``, emptied first to ``replace``."""
    taken = (folder / "config.json").exists() or (folder / "checkpoints").exists()
    if not taken:
        if resume:
            raise ValueError(f"nothing to resume: expected a run in {folder}, got no config.json")
        return
    if replace:
        for path in folder.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    if not resume:
        raise ValueError(f"{folder} already holds a run: continue it with --resume or name another")
    found = TrainConfig.read(folder)
    for field in fields(TrainConfig):
        old, new = getattr(found, field.name), getattr(config, field.name)
        if field.name not in MAY_CHANGE and old != new:
            raise ValueError(
                f"{folder} holds another run: expected {field.name} = {old!r}, got {new!r}"
            )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Lets torch use ``count`` threads of the CPU meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one acts as it did before."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped  # signals reach the main thread only
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in signals}

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()
        signal.signal(number, before[number])

    for number in signals:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number in signals:
            signal.signal(number, before[number])


@contextmanager
def _curves(folder: Path, step: int) -> Iterator[Callable[[dict[str, float], int], None]]:
    """Yields a function (values by name, step) that adds points to TensorBoard's curves."""
    from torch.utils.tensorboard import SummaryWriter

    path = folder / "tensorboard"
    with naming(path):
        writer = SummaryWriter(path, purge_step=step + 1)

    def add(values: dict[str, float], step: int) -> None:
        with naming(path):
            for name, value in values.items():
                writer.add_scalar(name, value, step)

    try:
        yield add
    finally:
        with naming(path):
            writer.close()


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def _without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
