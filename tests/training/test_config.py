# SPDX-License-Identifier: Apache-2.0
"""Does a run do what its config says, number by number?"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from pfgm_kernels.flow import constants, perturb
from pfgm_kernels.training import checkpoint, data, trainer
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.reports import reports
from pfgm_kernels.training.trainer import Step, TrainConfig, Training, load_model, train

TINY = {"width": 8, "depth": 1, "batch_size": 16, "warmup": 4, "checkpoint_every": 5}
QUIET = Console(quiet=True)
Losses = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def moons() -> DataSet:
    return data.load("two_moons")


def training_of(moons: DataSet, **options: object) -> Training:
    return Training(TrainConfig.for_data(moons, **(TINY | options)), moons)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(6)


@pytest.mark.parametrize(
    "options", [{"sigma": 0.3}, {"tau": 0.2}, {"M": 31}, {"restrict_M": False}, {"gamma": 0.1}]
)
def test_the_loss_is_that_of_the_config(moons: DataSet, options: dict) -> None:
    training = training_of(moons, **options)
    batch, found = moons.train[:50], []

    def network(x: Tensor, t: Tensor) -> Tensor:
        found.append((x, t))
        return torch.zeros(len(x), 3)

    training.loss(network, batch, generator=seeded())
    config = training.config
    noise = {name: getattr(config, name) for name in ("sigma", "tau", "M", "restrict_M")}
    x, t = perturb(batch, generator=seeded(), **noise)
    assert torch.equal(found[0][0], x)
    assert torch.equal(found[0][1], t)
    assert training.loss.gamma == config.gamma
    assert len(training.loss.references) == 2000


def test_the_network_is_that_of_the_config(moons: DataSet) -> None:
    training = training_of(moons, width=24, depth=3, gamma=0.3)
    network, moments = training.network, moons.moments
    assert (network.gamma, network.scale) == (0.3, math.sqrt(2))
    assert (network.first.out_features, len(network.blocks)) == (24, 3)
    assert torch.equal(network.center, moments.center)
    assert network.spread.item() == pytest.approx(moments.spread)
    for block in network.blocks:  # each begins as the identity
        h = torch.randn(5, 24, generator=seeded())
        assert torch.equal(block(h, torch.randn(5, 64, generator=seeded())), h)


def test_the_seed_draws_the_weights_and_nothing_else(moons: DataSet) -> None:
    before = torch.get_rng_state()
    first, other = (training_of(moons, seed=seed).network for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first.first.weight, other.first.weight)


def test_the_published_rule_takes_the_noise_that_is_given(moons: DataSet) -> None:
    config = TrainConfig.for_data(moons, sigma=0.05, tau=0.1)
    rule = constants(moons.train, sigma=0.05, tau=0.1)
    assert (config.M, config.gamma, config.T) == (rule.M, rule.gamma, rule.T)
    assert (config.sigma, config.tau) == (0.05, 0.1)
    assert config.M != TrainConfig.for_data(moons).M
    own = TrainConfig.for_data(moons, M=7, gamma=0.5, T=3.0)
    assert (own.M, own.gamma, own.T) == (7, 0.5, 3.0)


def test_the_rate_rises_over_the_warm_up(moons: DataSet) -> None:
    training = training_of(moons, learning_rate=0.02, warmup=4)
    rates = []
    for _ in range(7):
        training.advance()
        rates.append(training.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.005, 0.01, 0.015, 0.02, 0.02, 0.02, 0.02])


def constant_gradient(training: Training, value: float) -> None:
    """Puts a loss in place whose gradient has the same value in each parameter."""

    def losses(network: nn.Module, batch: Tensor, generator: torch.Generator) -> Losses:
        loss = value * sum(parameter.sum() for parameter in training.network.parameters())
        return torch.ones(1), loss[None]

    training.loss = SimpleNamespace(per_query=losses)


def test_gradients_are_clipped_and_begin_at_zero(moons: DataSet) -> None:
    training = training_of(moons, clip_norm=0.5)
    parameters = list(training.network.parameters())
    whole = math.sqrt(sum(p.numel() for p in parameters))
    for value in (1.0, 1.0, 0.1 / whole):
        constant_gradient(training, value)
        norm = training.advance().norm
        assert norm == pytest.approx(value * whole, rel=1e-5)
        taken = torch.cat([p.grad.flatten() for p in parameters]).norm()
        assert taken == pytest.approx(min(value * whole, 0.5), rel=1e-5)


def test_the_average_forgets_at_the_configs_rate(moons: DataSet) -> None:
    training = training_of(moons, ema_halflife=40, ema_rampup=0, learning_rate=0.1, warmup=1)
    constant_gradient(training, 1.0)
    expected: Tensor | None = None
    for _ in range(3):
        training.advance()
        now = training.network.first.weight.detach().clone()
        decay = 0.5 ** (16 / 40)
        expected = now if expected is None else decay * expected + (1 - decay) * now
        torch.testing.assert_close(training.average.module.first.weight, expected)


def test_every_row_is_drawn(moons: DataSet) -> None:
    few = replace(moons, train=moons.train[:3])
    training = Training(TrainConfig.for_data(few, **(TINY | {"batch_size": 100})), few)
    batches = []

    def losses(network: nn.Module, batch: Tensor, generator: torch.Generator) -> Losses:
        batches.append(batch)
        loss = sum(parameter.sum() for parameter in training.network.parameters())
        return torch.ones(1), loss[None]

    training.loss = SimpleNamespace(per_query=losses)
    training.advance()
    assert batches[0].shape == (100, 2)
    assert {tuple(row) for row in batches[0].tolist()} == {tuple(row) for row in few.train.tolist()}


def test_threads_checkpoints_and_curves(
    moons: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, points, first_steps = [], [], []
    advance = Training.advance

    def watched(training: Training, stop: Callable[[], bool]) -> Step:
        used.append(torch.get_num_threads())
        return advance(training, stop)

    @contextmanager
    def curves(folder: Path, step: int):
        first_steps.append(step)
        yield SimpleNamespace(
            numbers=lambda values, step: points.append((step, values)),
            pictures=lambda images, step: None,
        )

    monkeypatch.setattr(Training, "advance", watched)
    monkeypatch.setattr(trainer, "reports", curves)
    before = torch.get_num_threads()
    config = TrainConfig.for_data(moons, steps=13, threads=before + 1, **TINY)
    run = train(config, moons, tmp_path, console=QUIET)
    assert used == [before + 1] * 13
    assert torch.get_num_threads() == before
    names = [path.name for path in checkpoint.Checkpoints(tmp_path / "checkpoints").paths()]
    assert names == [f"step_{step:08d}.safetensors" for step in (13, 10, 5)]
    assert [step for step, _ in points] == [5, 10, 13]
    means = [sum(each) / len(each) for each in (run.losses[:5], run.losses[:10], run.losses[3:])]
    assert [values["loss"] for _, values in points] == pytest.approx(means)
    assert [values["images"] for _, values in points] == [80, 160, 208]
    assert [values["learning_rate"] for _, values in points] == [1e-3, 1e-3, 1e-3]
    assert all(0 < values["targets_share"] < 1 for _, values in points)
    train(replace(config, steps=14), moons, tmp_path, resume=True, console=QUIET)
    assert first_steps == [0, 13]


def test_a_curve_goes_on_after_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard drops the points that a killed run wrote from the next step on."""
    from torch.utils import tensorboard

    real, options = tensorboard.SummaryWriter, []

    def writer(*arguments: object, **given: object) -> object:
        options.append(given)
        return real(*arguments, **given)

    monkeypatch.setattr(tensorboard, "SummaryWriter", writer)
    with reports(tmp_path, 7) as curve:
        curve.numbers({"loss": 1.0}, 8)
    assert options == [{"purge_step": 8}]


def test_the_model_is_the_average_and_ready_to_use(moons: DataSet, tmp_path: Path) -> None:
    config = TrainConfig.for_data(moons, steps=5, **TINY)
    train(config, moons, tmp_path, console=QUIET)
    network, stored = load_model(tmp_path)
    assert stored == config
    assert not network.training
    (path,) = (tmp_path / "checkpoints").iterdir()
    tensors, _ = checkpoint.read(path)
    last, average = (tensors[f"{name}.first.weight"] for name in ("network", "average.module"))
    assert torch.equal(network.first.weight, average)
    assert not torch.equal(last, average)


def test_checkpoints_alone_are_a_run(moons: DataSet, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="already holds a run"):
        train(TrainConfig.for_data(moons, **TINY), moons, tmp_path, console=QUIET)


def test_a_second_signal_acts_as_before() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    own = signal.getsignal(signal.SIGINT)
    try:
        with trainer._stop_on_signal() as stopped:
            signal.raise_signal(signal.SIGINT)
            assert stopped.is_set()
            assert not seen
            signal.raise_signal(signal.SIGINT)
            assert seen == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
