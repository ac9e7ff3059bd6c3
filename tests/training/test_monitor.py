# SPDX-License-Identifier: Apache-2.0
"""Is what a run says of itself while it trains what it says it is?"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from pfgm_kernels import ReferenceSet, posterior_mean
from pfgm_kernels.training import data, monitor
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.monitor import Monitor, by_level
from pfgm_kernels.training.reports import read_stats
from pfgm_kernels.training.state import Training
from pfgm_kernels.training.trainer import train

TINY: dict[str, Any] = {"width": 8, "depth": 1, "batch_size": 32, "warmup": 4}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return data.load("digits")


def training_of(points: DataSet, **options: Any) -> Training:
    return Training(TrainConfig.for_data(points, **(TINY | options)), points)


def monitor_of(training: Training) -> Monitor:
    return Monitor(training.config, training.data, training.device)


class Exact(torch.nn.Module):
    """The posterior mean of some references, as a model."""

    def __init__(self, references: ReferenceSet, D: float) -> None:
        super().__init__()
        self.references, self.D = references, D

    def forward(self, x: Tensor, t: Tensor, **labels: Tensor) -> Tensor:
        return posterior_mean(x, t, self.references, D=self.D, **labels)


@pytest.mark.parametrize("D", [3.0, 128.0, math.inf])
def test_levels_are_those_of_the_noise(D: float) -> None:
    root = 1.0 if math.isinf(D) else math.sqrt(D)
    sigma = torch.tensor([0.001, 0.009, 0.011, 0.5, 0.9, 9.99, 10.01, 300.0], dtype=torch.float64)
    losses = torch.arange(8.0)
    found = by_level("loss", [(sigma[:3] * root, losses[:3]), (sigma[3:] * root, losses[3:])], D)
    assert found == {
        "loss": 3.5,
        "loss/sigma_below_0.01": 0.5,
        "loss/sigma_below_0.1": 2.0,
        "loss/sigma_below_1": 3.5,
        "loss/sigma_below_10": 5.0,
        "loss/sigma_from_10": 6.5,
    }
    assert by_level("loss", [], D) == {}


@pytest.mark.parametrize(("targets", "references"), [("exact", 0), ("exact", 64), ("clean", 0)])
def test_held_out_targets_are_exact(digits: DataSet, targets: str, references: int) -> None:
    """Whatever the run trains on: the exact mean has no loss, and a model of zeros has one."""
    options: dict[str, Any] = {"method": "pfgmpp", "D": 8.0, "predicts": "denoiser"}
    training = training_of(digits, targets=targets, references=references, **options)
    looking = monitor_of(training)
    exact = Exact(looking.loss.references, 8.0)
    assert len(exact.references) == len(digits.train) + len(digits.held_out)
    assert looking.losses(exact)["held_out_loss"] < 1e-9
    memory = looking.losses(Exact(digits.references, 8.0))  # which takes points for others
    assert memory["held_out_loss/sigma_below_0.1"] > 10
    zeros = looking.losses(training.average.module)
    assert zeros["held_out_loss"] > 0.1
    assert len(zeros) > 3


def test_held_out_loss_of_the_field(digits: DataSet) -> None:
    for conditional in (False, True):
        training = training_of(digits, predicts="denoiser", conditional=conditional, references=64)
        looking = monitor_of(training)
        exact = Exact(looking.loss.references, training.config.D)
        assert looking.losses(exact)["held_out_loss"] < 1e-9


def test_it_looks_at_the_held_out_points_in_the_same_way_each_time(
    digits: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "QUERIES", 50)
    training = training_of(digits, conditional=True)
    looking, seen = monitor_of(training), []
    losses = looking.loss.per_query

    def watched(predicted: Any, batch: Tensor, **options: Any) -> Any:
        seen.append((batch, options["labels"]))
        return losses(predicted, batch, **options)

    looking.loss.per_query = watched
    before = torch.get_rng_state()
    first = looking.losses(training.average.module)
    torch.rand(3, generator=torch.Generator().manual_seed(1))
    assert looking.losses(training.average.module) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(batch) for batch, _ in seen] == [32, 18, 32, 18]
    batch, labels = (torch.cat(each) for each in zip(*seen[:2], strict=True))
    assert torch.equal(batch, digits.decode(digits.held_out[:50]))
    assert digits.held_out_labels is not None
    assert torch.equal(labels, digits.held_out_labels[:50])


def test_nothing_held_out_is_nothing_reported(digits: DataSet) -> None:
    none = replace(digits, held_out=digits.held_out[:0])
    training = training_of(none)
    assert monitor_of(training).losses(training.average.module) == {}


def test_samples_are_those_of_the_field(digits: DataSet) -> None:
    """Near the data, of any run: samples of the exact field are images of the data set."""
    options: dict[str, Any] = {"method": "pfgmpp", "predicts": "denoiser", "conditional": True}
    training = training_of(digits, D=64.0, **options)
    images = monitor_of(training).samples(Exact(training.references, 64.0))
    assert images is not None
    assert images.shape == (monitor.PICTURES, 1, 8, 8)
    assert 0 <= images.min() < images.max() <= 1
    known = digits.train.float()[:, None] / 255
    gaps = torch.cdist(images.flatten(1), known.flatten(1))
    distance, nearest = gaps.min(dim=1)
    assert distance.max() < 0.05
    assert digits.train_labels is not None
    assert digits.train_labels[nearest].tolist() == [i % 10 for i in range(monitor.PICTURES)]
    moons = data.load("two_moons")
    assert monitor_of(training_of(moons)).samples(torch.nn.Identity()) is None


def test_a_checkpoint_is_looked_at(digits: DataSet, tmp_path: Path) -> None:
    """Held-out loss and samples at each; losses by level at each report; the last of a run too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrainConfig.for_data(digits, steps=21, checkpoint_every=7, **TINY)
    train(config, digits, tmp_path, console=QUIET)
    lines = {line["step"]: line for line in read_stats(tmp_path / "stats.jsonl")}
    assert [*lines] == [7, 10, 14, 20, 21]
    assert [step for step in lines if "held_out_loss" in lines[step]] == [7, 14, 21]
    assert all("loss/sigma_below_1" in line and line["memory_mib"] > 50 for line in lines.values())
    curves = EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    assert [event.step for event in curves.Images("samples")] == [7, 14, 21]
    assert [event.step for event in curves.Scalars("held_out_loss/sigma_below_1")] == [7, 14, 21]


def test_reported_losses_are_of_the_queries_since_the_last_report(digits: DataSet) -> None:
    training = training_of(digits, accumulation=2)
    done = [training.advance() for _ in range(3)]
    values = training.numbers(done[-1])
    assert values["loss"] == pytest.approx(sum(step.loss for step in done) / 3, rel=1e-6)
    assert training.losses == []
    later = training.advance()
    assert training.numbers(later)["loss"] == pytest.approx(later.loss, rel=1e-6)
    training.config = replace(training.config, spike=1e-9)
    training.recent = [later.loss] * 50
    assert training.advance().skipped
    assert "loss" not in training.numbers(later)
