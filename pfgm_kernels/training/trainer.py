# SPDX-License-Identifier: Apache-2.0
"""The training loop of Eq. (12): Adam, averaged weights, checkpoints that resume bit-exactly."""

from __future__ import annotations

import shlex
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from pfgm_kernels.files import LOCK, TEMPORARY, locked
from pfgm_kernels.training import checkpoint
from pfgm_kernels.training.config import CONFIG, TrainConfig
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.monitor import Monitor
from pfgm_kernels.training.progress import progress_bar
from pfgm_kernels.training.ranks import joined
from pfgm_kernels.training.reports import Reports, reports
from pfgm_kernels.training.state import REPORT_EVERY, Step, Training

MODEL = "model.safetensors"
AVERAGE = "average.module."
"""Before the names of the averaged weights in a checkpoint."""
MOST_SKIPPED = 20
"""Steps in a row; so many mean that training does not come back by itself."""
# A resumed run may go further, save at other steps or compute the parts of a batch elsewhere, which
# its checkpoints count; in all else it is the run that it continues.
MAY_CHANGE = ("steps", "checkpoint_every", "device", "compile", "accumulation")


@dataclass(frozen=True)
class Run:
    """How a call of ``train`` went: the losses of its steps, without those that were skipped, and
    whether it reached the last one.
    """

    losses: list[float]
    first_step: int
    finished: bool
    seconds: float


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

    Checkpoints go to ``checkpoints/``, curves to ``tensorboard/`` and ``stats.jsonl``, the averaged
    weights of a finished run to ``model.safetensors``. Ctrl-C and SIGTERM end the current step,
    save a checkpoint and return; a second signal ends at once. With ``replace`` a run in the folder
    is removed first. Started by `torchrun`, each rank takes its part of each batch, the first one
    writes, and a signal to any stops all. ``network`` is what to train where the config says
    ``network="own"``, called as `pfgm_kernels.training.networks` says. Raises ValueError where the
    folder holds another run or, without either, any run, and where another process trains there;
    FloatingPointError where training diverged; ConnectionError where another rank is lost.
    """
    with joined(config.device) as ranks:
        first = ranks.rank == 0
        console = (console or Console()) if first else Console(quiet=True)
        with locked(folder) if first else nullcontext():
            training = Training(config, data, network, ranks)
            if first:
                _claim(folder, config, resume, replace)
            ranks.wait()
            return _train(training, folder, resume, console)


def _train(training: Training, folder: Path, resume: bool, console: Console) -> Run:
    began, config = time.monotonic(), training.config
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
    if resume and (newest := checkpoints.newest()) is not None:
        training.restore(*newest)
        console.print(f"Resuming after step {training.step}, from {newest[0]}.", soft_wrap=True)
    first = training.step
    if first > config.steps:
        raise ValueError(f"steps expects at least the {first} that are done, got {config.steps}")
    training.ranks.same(first, training.device)
    writes = training.ranks.rank == 0
    if writes:
        for left in folder.glob(f"*{TEMPORARY}"):  # by a process that was killed
            left.unlink(missing_ok=True)
        config.write(folder)
    told = reports(folder, first) if writes else nullcontext()
    with threads(config.threads), _stop_on_signal() as stopped, told as report:
        losses = _advance(training, checkpoints, stopped, report, console)
    finished = training.step == config.steps
    if finished and writes:
        weights = training.average.module.state_dict()
        state = {"version": checkpoint.VERSION, "step": training.step}
        checkpoint.write(folder / MODEL, weights, state)
    if not finished:
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
    report: Reports | None,
    console: Console,
) -> list[float]:
    """Trains to the last step or until ``stopped``, saving, looking at what it has and reporting as
    it goes; the losses of the steps that were not skipped.
    """
    config, first, began = training.config, training.step, time.monotonic()
    monitor = Monitor(config, training.data, training.device, training.ranks)
    losses: list[float] = []
    with progress_bar(console, "Training", config.steps, first) as update:
        while training.step < config.steps:
            done = training.advance(stopped.is_set)
            step = training.step
            if done.skipped:
                _told_of_skip(training, done, checkpoints, console)
            else:
                losses.append(done.loss)
            last = step == config.steps or done.stopped
            # While steps are skipped the weights may be at fault: the checkpoint before is kept.
            due = last or (step % config.checkpoint_every == 0 and not training.in_a_row)
            if due and training.ranks.rank == 0:
                checkpoints.save(step, *training.state())
            if losses and (step % REPORT_EVERY == 0 or due):
                mean = sum(losses[-REPORT_EVERY:]) / len(losses[-REPORT_EVERY:])
                speed = (step - first) / (time.monotonic() - began)
                values = training.numbers(done) | {"loss": mean, "steps_per_second": speed}
                looks = due and not done.stopped
                if looks and (report or config.sharded):  # which takes all ranks
                    values |= monitor.losses(training.average.module)
                if looks and report:
                    report.pictures(monitor.samples(training.average.module), step)
                if report:
                    report.numbers(values, step)
                images = f"{speed * config.batch_size:.0f} images/s"
                text = f"loss {mean:.3g}  {images}  targets {done.targets:.0%}"
                update(step, f"step {step}/{config.steps}  {text}")
            if last:
                break
    return losses


def _told_of_skip(
    training: Training, done: Step, checkpoints: checkpoint.Checkpoints, console: Console
) -> None:
    """Says so; raises FloatingPointError where too many steps in a row were skipped."""
    what = f"step {training.step}: the loss is {done.loss:.4g}, its gradient's norm {done.norm:.4g}"
    console.print(f"Skipped {what}.", soft_wrap=True)
    if training.in_a_row < MOST_SKIPPED:
        return
    saved = checkpoints.paths()
    raise FloatingPointError(
        f"training diverged: {training.in_a_row} steps in a row were skipped, at {what}; "
        + (f"the last good checkpoint is {saved[0]}" if saved else "no checkpoint was saved")
    )


def load_model(
    folder: Path, network: torch.nn.Module | None = None, *, step: int | None = None
) -> tuple[torch.nn.Module, TrainConfig]:
    """The averaged model of the finished run in ``folder``, and what the run was given; with
    ``step`` that of its checkpoint of this step, of a run that need not be finished. A model around
    ``network``, which takes the weights, where the run was given its own from Python.

    Raises FileNotFoundError or ValueError, naming the file, where something is missing or damaged.
    """
    config = TrainConfig.read(folder)
    model = config.model(network=network)
    path, weights, version = _finished(folder, config) if step is None else _saved(folder, step)
    checkpoint.match(path, model.state_dict(), weights, version)
    model.load_state_dict(weights)
    return model.eval(), config


def _finished(folder: Path, config: TrainConfig) -> tuple[Path, dict[str, Tensor], str | None]:
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
    if state["step"] < config.steps:
        warnings.warn(
            f"{path} is of step {state['step']} of {config.steps}: `{finish}` finishes the run",
            stacklevel=3,
        )
    return path, weights, version


def _saved(folder: Path, step: int) -> tuple[Path, dict[str, Tensor], str | None]:
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
    path = checkpoints.path(step)
    if not path.is_file():
        steps = ", ".join(str(known) for known in checkpoints.steps())
        raise FileNotFoundError(
            f"{folder} holds no checkpoint of step {step}: expected one of {steps or 'none'}"
        )
    tensors, state = checkpoint.read(path)
    return path, checkpoint.without_prefix(AVERAGE, tensors), state.get("version")


def _claim(folder: Path, config: TrainConfig, resume: bool, replace: bool) -> None:
    """Raises ValueError unless ``config`` may train in ``folder``, emptied first to ``replace``."""
    taken = any((folder / name).exists() for name in (CONFIG, "config.json", "checkpoints"))
    if not taken:
        if resume:
            raise ValueError(f"nothing to resume: expected a run in {folder}, got no {CONFIG}")
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
    """An event that the first Ctrl-C or SIGTERM sets; a second one, of either, acts as before."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped  # signals reach the main thread only
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in signals}

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()
        release()

    def release() -> None:
        for number in signals:
            signal.signal(number, before[number])

    for number in signals:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        release()
