# SPDX-License-Identifier: Apache-2.0
"""Do several processes train as one does, stop together, and go on together?"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import ends, fork, said
from rich.console import Console
from torch import Tensor

from pfgm_kernels.training import checkpoint, data
from pfgm_kernels.training.checkpoint import Checkpoints
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.ranks import joined
from pfgm_kernels.training.reports import read_stats
from pfgm_kernels.training.state import Step, Training
from pfgm_kernels.training.trainer import load_model, train

TINY: dict[str, Any] = {"width": 8, "depth": 1, "batch_size": 32, "warmup": 4, "threads": 1}


def work(out: Path) -> None:
    """What each of two ranks does: gradients of two steps, accumulated and not; a run that the
    second is told to stop; the rest of it; a folder that is not the same.
    """
    moons, quiet = data.load("two_moons"), Console(quiet=True)
    with joined("cpu") as ranks:
        for accumulation in (1, 2):
            config = config_of(moons, accumulation=accumulation, clip_norm=1e9)
            found = gradients_of(Training(config, moons, None, ranks))
            torch.save(found, out / f"{ranks.rank}-{accumulation}.pt")
        config = config_of(moons, sharded=True, clip_norm=1e9)
        training = Training(config, moons, None, ranks)
        assert len(training.references.own) == len(moons.train) // 2
        torch.save(gradients_of(training), out / f"{ranks.rank}-sharded.pt")
        run = train(replace(config, steps=3), moons, out / "sharded", console=quiet)
        assert run.finished
        config, advance = config_of(moons, steps=9), Training.advance

        def stopped(training: Training, stop: Callable[[], bool]) -> Step:
            if training.step == 3 and ranks.rank == 1:
                signal.raise_signal(signal.SIGTERM)
            return advance(training, stop)

        Training.advance = stopped
        run = train(config, moons, out / "run", console=quiet)
        assert not run.finished
        assert len(run.losses) == 4
        Training.advance = advance
        run = train(config, moons, out / "run", resume=True, console=quiet)
        assert run.finished
        assert run.first_step == 4
        with pytest.raises(ValueError, match="expected one step, got 0 to 1"):
            ranks.same(ranks.rank, torch.device("cpu"))


def config_of(moons: DataSet, **options: Any) -> TrainConfig:
    return TrainConfig.for_data(moons, **(TINY | options))


def gradients_of(training: Training) -> Tensor:
    """Of two steps, after the loss of each."""
    found = []
    for _ in range(2):
        found += [torch.tensor([training.advance().loss])]
        found += [p.grad.flatten().clone() for p in training.network.parameters()]
    return torch.cat(found)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left."""
    folder = tmp_path_factory.mktemp("ranks")
    assert ends(fork(folder, work, [(folder,)] * 2)) == [0, 0], said(folder, 0) + said(folder, 1)
    return folder


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_make_one_batch(out: Path, accumulation: int) -> None:
    """Two ranks of half the batch have the gradients of one process with all of it."""
    first, second = (torch.load(out / f"{rank}-{accumulation}.pt") for rank in (0, 1))
    moons = data.load("two_moons")
    config = config_of(moons, accumulation=2 * accumulation, clip_norm=1e9)
    alone = gradients_of(Training(config, moons))
    assert torch.equal(first, second)
    assert (first - alone).norm() < 1e-6 * alone.norm()


def test_sharded_references_are_whole(out: Path) -> None:
    """Each rank holds half of them, and the targets are the same."""
    moons = data.load("two_moons")
    alone = gradients_of(Training(config_of(moons, accumulation=2, clip_norm=1e9), moons))
    for rank in (0, 1):
        found = torch.load(out / f"{rank}-sharded.pt")
        assert (found - alone).norm() < 1e-6 * alone.norm()
    losses = [line["held_out_loss"] for line in read_stats(out / "sharded" / "stats.jsonl")]
    assert len(losses) == 1
    assert math.isfinite(losses[0])


@pytest.mark.parametrize(
    "options", [{"references": 64}, {"conditional": True}, {"method": "unnormalized"}]
)
def test_what_cannot_be_sharded(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sharded=true expects targets of the whole data set"):
        config_of(data.load("two_moons"), sharded=True, **options)


def test_a_signal_to_one_stops_all_and_all_go_on(out: Path, tmp_path: Path) -> None:
    """To the end of one process with as many parts; what ranks draw is of the parts alone."""
    names = [path.name for path in Checkpoints(out / "run" / "checkpoints").paths()]
    assert names == ["step_00000009.safetensors", "step_00000004.safetensors"]
    moons = data.load("two_moons")
    config = config_of(moons, steps=9, accumulation=2)
    train(config, moons, tmp_path, console=Console(quiet=True))
    load_model(out / "run")
    alone, _ = checkpoint.read(tmp_path / "model.safetensors")
    together, _ = checkpoint.read(out / "run" / "model.safetensors")
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-6)
    assert not list((out / "run").rglob("*.partial"))
