# SPDX-License-Identifier: Apache-2.0
"""Is a step what its numbers say, and is one that is not sound skipped?"""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from pfgm_kernels.training import data, state
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.reports import read_stats
from pfgm_kernels.training.state import Step, Training, seed_of
from pfgm_kernels.training.trainer import train

TINY: dict[str, Any] = {"width": 8, "depth": 1, "batch_size": 16, "warmup": 4}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def moons() -> DataSet:
    return data.load("two_moons")


def training_of(moons: DataSet, **options: Any) -> Training:
    return Training(TrainConfig.for_data(moons, **(TINY | options)), moons)


def gradients(training: Training) -> Tensor:
    return torch.cat([p.grad.flatten().clone() for p in training.network.parameters()])


def test_seeds_of_steps_and_parts_differ() -> None:
    seeds = {seed_of(*each) for each in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0)]}
    assert len(seeds) == 5
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_a_step_is_of_the_seed_and_its_number_alone(moons: DataSet) -> None:
    """Whatever was drawn before it, and dropout's draws as well."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        training = training_of(moons, clip_norm=1e9)
        training.network.last.insert(0, torch.nn.Dropout(0.5))
        torch.rand(seed)
        training.step = 7
        before = torch.get_rng_state()
        training.advance()
        assert torch.equal(torch.get_rng_state(), before)
        found.append(gradients(training))
    assert torch.equal(*found)


def test_each_part_of_each_step_draws_its_own(moons: DataSet) -> None:
    drawn = []
    for seed in (0, 1):
        training = training_of(moons, seed=seed)

        def losses(network: Any, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
            drawn.append((batch, torch.rand(4, generator=generator), torch.rand(4)))
            return torch.ones(1), torch.ones(1)

        training.loss = SimpleNamespace(per_query=losses)
        for training.step, part in ((0, 0), (0, 1), (1, 0)):
            training._loss(part)
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert not any(torch.equal(*each) for each in zip(first, second, strict=True))


def test_parts_make_one_batch(moons: DataSet) -> None:
    """The gradient of accumulated parts is that of all their queries at once."""
    training = training_of(moons, accumulation=4, clip_norm=1e9)
    seen = []
    loss = training.loss.perturb

    def watched(batch: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append(loss(batch, **options))
        return seen[-1]

    training.loss.perturb = watched
    weights = {name: value.clone() for name, value in training.network.state_dict().items()}
    value = training.advance().loss
    assert [len(x) for x, _ in seen] == [4] * 4
    parts = gradients(training)
    whole = training_of(moons, clip_norm=1e9)
    whole.network.load_state_dict(weights)
    x, t = (torch.cat(each) for each in zip(*seen, strict=True))
    whole.loss.perturb = lambda batch, **options: (x, t)
    assert whole.advance().loss == pytest.approx(value, rel=1e-6)
    assert (gradients(whole) - parts).norm() < 1e-6 * parts.norm()
    with pytest.raises(ValueError, match=r"batch_size expects a multiple of 3 .* got 16"):
        training_of(moons, accumulation=3)


def test_the_average_has_the_configs_half_life(moons: DataSet) -> None:
    """Short at first, then the one given: after so many images half of it is left."""
    training = training_of(moons, ema_halflife=160.0, ema_rampup=0.5)
    decays = []
    for training.step in range(40):
        decays.append(training.decay)
    expected = [0.5 ** (16 / min(160.0, 0.5 * 16 * (step + 1))) for step in range(40)]
    assert decays == pytest.approx(expected)
    assert math.prod(decays[-10:]) == pytest.approx(0.5)
    plain = training_of(moons, ema_halflife=160.0, ema_rampup=0)
    assert plain.decay == pytest.approx(0.5**0.1)


@pytest.mark.parametrize("where", ["loss", "gradient", "spike"])
def test_a_step_that_is_not_sound_is_skipped(moons: DataSet, where: str) -> None:
    """No weight, average or moment changes; it is counted, and the next one is taken."""
    training = training_of(moons)
    training.recent = [1.0] * state.RECENT
    sound = training._loss
    weights = {name: value.clone() for name, value in training.state()[0].items()}

    def broken(part: int) -> Tensor:
        loss = sound(part)
        if where == "loss":
            return loss * math.nan
        if where == "spike":
            return loss / loss.detach() * 101
        return loss + torch.sqrt(training.network.first.weight.sum() * 0)

    training._loss = broken
    done = training.advance()
    assert done.skipped
    assert (training.step, training.skipped, training.in_a_row) == (1, 1, 1)
    for name, value in training.state()[0].items():
        assert torch.equal(value, weights[name]), name
    training._loss = lambda part: sound(part) if where != "spike" else broken(part) * 0.98
    assert not training.advance().skipped
    assert (training.step, training.skipped, training.in_a_row) == (2, 1, 0)
    assert not torch.equal(training.network.first.weight, weights["network.first.weight"])


def test_a_loss_is_no_spike_before_there_are_enough(moons: DataSet) -> None:
    training = training_of(moons)
    training.recent = [1e-9] * (state.RECENT - 1)
    assert not training.advance().skipped
    assert training.advance().skipped
    assert not training_of(moons, spike=math.inf)._is_spike(1e30)


def test_skipped_steps_are_told_and_end_a_run(
    moons: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Training.advance

    def now_and_then(training: Training, *arguments: Any) -> Step:
        if training.step in (3, 4) or training.step >= 12:
            nan = training.network.first.weight.sum()[None] * math.nan
            training.loss = SimpleNamespace(per_query=lambda *a, **k: (torch.ones(1), nan))
        else:
            training.loss = loss
        return advance(training, *arguments)

    config = TrainConfig.for_data(moons, steps=99, checkpoint_every=4, **TINY)
    loss = Training(config, moons).loss
    monkeypatch.setattr(Training, "advance", now_and_then)
    text = io.StringIO()
    last = f"the last good checkpoint is {tmp_path}/checkpoints/step_00000012.safetensors"
    with pytest.raises(FloatingPointError, match=f"20 steps in a row were .* step 32: .*{last}"):
        train(config, moons, tmp_path, console=Console(file=text, width=200))
    assert text.getvalue().count("Skipped step") == 22
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000008.safetensors", "step_00000012.safetensors"]
    stats = read_stats(tmp_path / "stats.jsonl")
    told = [(8, 2), (10, 2), (12, 2), (20, 10), (30, 20)]
    assert [(line["step"], line["skipped"]) for line in stats] == told


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_network_alone_computes_in_16_bits(moons: DataSet, precision: str) -> None:
    options = {"predicts": "denoiser", "clip_norm": 1e9}
    training, plain = (
        training_of(moons, precision=precision, **options),
        training_of(moons, **options),
    )
    seen, targets = [], []
    training.network.network.first.register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    plain.advance()
    perturb = training.loss.perturb

    def watched(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        targets.append(torch.is_autocast_enabled("cpu"))
        return perturb(*arguments, **options)

    training.loss.perturb = watched
    done = training.advance()
    assert not done.skipped
    assert seen == [getattr(torch, precision)]
    assert targets == [False]
    assert training.scaler.is_enabled() == (precision == "float16")
    expected = gradients(plain)
    assert 0 < (gradients(training) - expected).norm() < 0.1 * expected.norm()
    assert {p.dtype for p in training.network.parameters()} == {torch.float32}


def test_the_scale_of_float16_comes_back(moons: DataSet) -> None:
    training = training_of(moons, precision="float16", predicts="denoiser")
    training.advance()
    training.scaler.update(2.0**30)
    assert training.advance().skipped
    tensors, values = training.state()
    other = training_of(moons, precision="float16", predicts="denoiser")
    other.restore(Path("file"), tensors, json.loads(json.dumps(values)))
    assert other.scaler.get_scale() == training.scaler.get_scale() == 2.0**29
    assert (other.step, other.skipped, other.in_a_row) == (2, 1, 1)


def test_batches_in_other_parts_are_another_run(moons: DataSet) -> None:
    """Each part draws its own: with more of them, or fewer, the steps to come would be others."""
    tensors, values = training_of(moons, accumulation=2).state()
    for accumulation in (1, 4):
        other = training_of(moons, accumulation=accumulation)
        weights = {name: value.clone() for name, value in other.state()[0].items()}
        message = rf"^file is of batches in 2 parts: .* accumulation, got 1 \* {accumulation}$"
        with pytest.raises(ValueError, match=message):
            other.restore(Path("file"), tensors, dict(values))
        assert all(torch.equal(value, weights[name]) for name, value in other.state()[0].items())


def test_stats_are_a_line_a_report(moons: DataSet, tmp_path: Path) -> None:
    """A resumed run drops what a killed one reported of later steps, also half a line."""
    config = TrainConfig.for_data(moons, steps=20, **TINY)
    train(config, moons, tmp_path, console=QUIET)
    path = tmp_path / "stats.jsonl"
    first = read_stats(path)
    assert [line["step"] for line in first] == [10, 20]
    assert set(first[0]) > {"loss", "gradient_norm", "learning_rate", "skipped", "targets_share"}
    path.write_text(path.read_text() + json.dumps(first[1] | {"step": 30}) + '\n{"step": 4')
    train(replace(config, steps=33), moons, tmp_path, resume=True, console=QUIET)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30, 33]
    assert lines[:2] == first


@pytest.mark.exhaustive
def test_a_compiled_network_trains_alike(moons: DataSet) -> None:
    found = []
    for compiled in (False, True):
        training = training_of(moons, compile=compiled, predicts="denoiser")
        training.advance()
        found.append(gradients(training))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_device_that_is_missing(moons: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda expects a GPU"):
        training_of(moons, device="cuda")
    assert training_of(moons, device="auto").device == torch.device("cpu")
    with pytest.raises(ValueError, match="device expects one of auto, cpu, cuda, got 'gpu'"):
        training_of(moons, device="gpu")


def test_a_report_is_of_its_own_step(moons: DataSet, tmp_path: Path) -> None:
    """Of rate and average: those that the step was taken with, not those of the next."""
    options = TINY | {"warmup": 40, "learning_rate": 0.4, "ema_halflife": 1e9, "ema_rampup": 1.0}
    train(TrainConfig.for_data(moons, steps=20, **options), moons, tmp_path, console=QUIET)
    lines = read_stats(tmp_path / "stats.jsonl")
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.1, 0.2])
    assert [line["average_decay"] for line in lines] == pytest.approx([0.5**0.1, 0.5**0.05])
    assert [line["images"] for line in lines] == [160, 320]
