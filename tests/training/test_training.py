# SPDX-License-Identifier: Apache-2.0
"""Does training learn, depend on its seed alone, and lose nothing when it is interrupted?"""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from pfgm_kernels import files, poisson_displacement
from pfgm_kernels.cli import app
from pfgm_kernels.training import checkpoint, data, settings
from pfgm_kernels.training.checkpoint import VERSION, Checkpoints
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.networks.perceptron import FieldNetwork
from pfgm_kernels.training.trainer import Step, Training, load_model, train

TINY = {"width": 8, "depth": 1, "batch_size": 16, "warmup": 4, "checkpoint_every": 5}


@pytest.fixture(scope="module")
def moons() -> DataSet:
    return data.load("two_moons")


def newest(folder: Path) -> tuple[dict[str, Tensor], dict]:
    found = Checkpoints(folder / "checkpoints").newest()
    assert found is not None
    return found[1:]


def assert_same_state(first: Path, second: Path) -> None:
    """Every tensor and every other value of the newest checkpoints, bit for bit."""
    (tensors, state), (other_tensors, other_state) = newest(first), newest(second)
    assert state == other_state
    assert tensors.keys() == other_tensors.keys()
    assert any(name.startswith("optimizer.") for name in tensors)
    for name in tensors:
        assert torch.equal(tensors[name], other_tensors[name]), name


def test_resume_is_bit_exact(moons: DataSet, tmp_path: Path) -> None:
    """Through the warm-up, and not at a multiple of checkpoint_every."""
    config = TrainConfig.for_data(moons, steps=23, **TINY)
    whole = train(config, moons, tmp_path / "whole")
    parts = [
        train(replace(config, steps=steps), moons, tmp_path / "parts", resume=steps > 3)
        for steps in (3, 14, 23)
    ]
    assert [run.first_step for run in parts] == [0, 3, 14]
    assert whole.losses == [loss for run in parts for loss in run.losses]
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    names = ["config.yaml", "model.safetensors"]
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_seed_alone_decides(moons: DataSet, tmp_path: Path) -> None:
    config = TrainConfig.for_data(moons, steps=5, **TINY)
    torch.manual_seed(1)
    first = train(config, moons, tmp_path / "a")
    torch.manual_seed(2)
    assert train(config, moons, tmp_path / "b").losses == first.losses
    assert_same_state(tmp_path / "a", tmp_path / "b")
    other = train(replace(config, seed=1), moons, tmp_path / "c")
    assert other.losses[0] != first.losses[0]


def test_training_learns_the_field(moons: DataSet, tmp_path: Path) -> None:
    """The averaged network's posterior mean comes near the exact one, from the data to far out."""
    config = TrainConfig.for_data(
        moons, steps=400, width=64, depth=2, warmup=20, ema_halflife=8_800, checkpoint_every=400
    )
    run = train(config, moons, tmp_path)
    assert run.finished
    assert sum(run.losses[-20:]) < 0.1 * sum(run.losses[:20])
    network, _ = load_model(tmp_path)
    generator = torch.Generator().manual_seed(5)
    for noise in (0.05, 0.3, 1.0):
        x = moons.held_out + noise * torch.randn(500, 2, generator=generator)
        t = noise * torch.randn(500, generator=generator).abs()
        v, _ = poisson_displacement(x, t, moons.references)
        with torch.no_grad():
            field = network(x, t)
        predicted = -field[:, :-1] / field[:, -1:] * t[:, None]
        error = (predicted - v).square().mean().sqrt()
        stay, collapse = v, moons.train.mean(0) - x - v  # what no training at all would predict
        trivial = min(stay.square().mean().sqrt(), collapse.square().mean().sqrt())
        assert error < 0.5 * trivial, noise


def test_network_is_a_field() -> None:
    """Its t-component and its norm follow from the displacement, as Eq. (12) has them."""
    torch.manual_seed(0)
    network = FieldNetwork((2, 3), width=16, depth=2, gamma=0.7)
    x, t = torch.randn(50, 2, 3), torch.rand(50) * 10 + 1e-3
    with torch.no_grad():
        field = network(x, t).double()
    v = -field[:, :-1] / field[:, -1:] * t.double()[:, None]
    radius = torch.cat([v, t.double()[:, None]], dim=1).norm(dim=1)
    assert field.shape == (50, 7)
    assert (field[:, -1] < 0).all()
    expected = math.sqrt(6) * radius / (radius + 0.7)
    torch.testing.assert_close(field.norm(dim=1), expected, rtol=1e-5, atol=0)
    assert torch.isfinite(network(1e6 * x, torch.zeros(50))).all()


def test_published_rule() -> None:
    """A mean norm of 30 in 3,072 dimensions gives M = 287 and T = 38.57 (Xu et al. 2022)."""
    points = torch.full((4, 3072), 30 / math.sqrt(3072))
    config = TrainConfig.for_data(DataSet("grey", points, points, None, None))
    assert config.M == 287
    assert pytest.approx(38.57, abs=0.005) == config.T


def test_numbers_of_numpy(tmp_path: Path) -> None:
    plain = TrainConfig("digits", (8, 8), M=7, T=2.0, steps=3, sigma=0.5, seed=4, gamma=0.25)
    config = TrainConfig(
        "digits",
        np.array([8, 8]),
        M=np.int64(7),
        T=np.float32(2),
        steps=torch.tensor(3),
        sigma=np.array(0.5),
        seed=np.uint8(4),
        gamma=np.float16(0.25),
    )
    config.write(tmp_path)
    assert config == plain == TrainConfig.read(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("steps: 3", "steps: three"))
    with pytest.raises(
        ValueError, match=r"damaged file .*yaml: settings: steps is ill-typed: Value 'three'"
    ):
        TrainConfig.read(tmp_path)
    for name, value in (("steps", True), ("steps", 2.0), ("T", "2"), ("sigma", None), ("M", 1j)):
        with pytest.raises(TypeError, match=f"{name} expects (an integer|a real number), got"):
            replace(plain, **{name: value})
    for name, value in (("threads", 0), ("T", -1), ("gamma", math.inf), ("learning_rate", 0)):
        with pytest.raises(ValueError, match=f"{name} expects .*{value}"):
            replace(plain, **{name: value})


def test_config_comes_back(moons: DataSet, tmp_path: Path) -> None:
    config = TrainConfig.for_data(moons, seed=7, **TINY)
    config.write(tmp_path)
    assert TrainConfig.read(tmp_path) == config
    values = asdict(config) | {"event_shape": [2], "versions": settings.versions()}
    assert settings.load(tmp_path / "config.yaml") == values
    assert values["versions"]["pfgm_kernels"] == VERSION
    with pytest.raises(ValueError, match="batch_size expects an integer ≥ 1, got 0"):
        replace(config, batch_size=0)


def test_model_of_a_run_that_goes_on(moons: DataSet, tmp_path: Path) -> None:
    """It is of a step before the last: the one that is there is used, and a warning says so."""
    config = TrainConfig.for_data(moons, steps=3, **TINY)
    train(config, moons, tmp_path / "a run")
    replace(config, steps=9).write(tmp_path / "a run")
    command = f"pfgm train --out '{tmp_path}/a run' --resume"
    with pytest.warns(UserWarning, match=f"of step 3 of 9: `{command}` finishes the run"):
        load_model(tmp_path / "a run")
    (tmp_path / "a run" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"not finished: `{command}` finishes it"):
        load_model(tmp_path / "a run")


@pytest.mark.parametrize("version", ["0.0.9", "7.1", VERSION, None])
def test_another_version_is_named(moons: DataSet, tmp_path: Path, version: str | None) -> None:
    """Where a config, a checkpoint or a model holds a key more or less than this one writes."""
    writer = version or "of an older version, which files did not name"
    message = re.escape(f"was written by pfgm_kernels {writer}, this is {VERSION}: expected the ")
    config = TrainConfig.for_data(moons, steps=2, **TINY)
    train(config, moons, tmp_path)
    path = tmp_path / "config.yaml"
    text = path.read_text()
    signed = {} if version is None else {"version": version}
    told = {} if version is None else {"versions": {"pfgm_kernels": version}}
    values = settings.load(path)
    del values["versions"]
    values |= told
    path.write_bytes(settings.dump(values))
    assert TrainConfig.read(tmp_path) == config
    without = {key: value for key, value in values.items() if key != "tau"}
    for changed, what in (
        (values | {"colour": 3}, r"missing \[\], unknown \['colour'\]"),
        (without, r"missing \['tau'\], unknown \[\]"),
    ):
        path.write_bytes(settings.dump(changed))
        with pytest.raises(ValueError, match=f"{path} {message}keys .*, {what}$"):
            TrainConfig.read(tmp_path)
    path.write_text(text)

    for name in ("checkpoints/step_00000002.safetensors", "model.safetensors"):

        def read_again(name: str = name) -> None:
            if name == "model.safetensors":
                load_model(tmp_path)
            else:
                train(config, moons, tmp_path, resume=True)

        tensors, state = checkpoint.read(tmp_path / name)
        state = {key: value for key, value in state.items() if key != "version"} | signed
        checkpoint.write(tmp_path / name, tensors, state | {"momentum": 1})
        with pytest.raises(ValueError, match=rf"{name} {message}.*unknown \['momentum'\]"):
            read_again()
        checkpoint.write(tmp_path / name, tensors | {"more": torch.zeros(2)}, state)
        written_by = re.escape(f"(written by pfgm_kernels {writer}, this is {VERSION})")
        with pytest.raises(ValueError, match=f"{name} is of another network: .*{written_by}"):
            read_again()
        checkpoint.write(tmp_path / name, tensors, state)
        read_again()


def test_another_run_is_refused(moons: DataSet, tmp_path: Path) -> None:
    config = TrainConfig.for_data(moons, steps=5, **TINY)
    with pytest.raises(ValueError, match="nothing to resume"):
        train(config, moons, tmp_path, resume=True)
    train(config, moons, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="already holds a run"):
        train(config, moons, tmp_path)
    with pytest.raises(ValueError, match="another run: expected seed = 0, got 3"):
        train(replace(config, seed=3), moons, tmp_path, resume=True)
    with pytest.raises(ValueError, match="steps expects at least the 5 that are done, got 4"):
        train(replace(config, steps=4), moons, tmp_path, resume=True)
    with pytest.raises(ValueError, match="another run: expected width = 8, got 16"):
        train(replace(config, width=16), moons, tmp_path, resume=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_checkpoint_of_another_network(moons: DataSet, tmp_path: Path) -> None:
    for name, width in (("narrow", 8), ("wide", 16)):
        config = TrainConfig.for_data(moons, steps=5, **(TINY | {"width": width}))
        train(config, moons, tmp_path / name)
    for file in ("checkpoints/step_00000005.safetensors", "model.safetensors"):
        (tmp_path / "wide" / file).write_bytes((tmp_path / "narrow" / file).read_bytes())
    message = r"is of another network: expected .* of shape \(16.*, got .* of shape \(8"
    with pytest.raises(ValueError, match=message):
        train(replace(config, steps=6), moons, tmp_path / "wide", resume=True)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "wide")


def test_damaged_checkpoint_is_passed_over(moons: DataSet, tmp_path: Path) -> None:
    """Training goes on from the one before it, and comes to the same end."""
    config = TrainConfig.for_data(moons, steps=10, **TINY)
    train(config, moons, tmp_path / "whole")
    train(config, moons, tmp_path / "damaged")
    last = tmp_path / "damaged" / "checkpoints" / "step_00000010.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged checkpoint"):
        run = train(config, moons, tmp_path / "damaged", resume=True)
    assert run.first_step == 5
    assert_same_state(tmp_path / "whole", tmp_path / "damaged")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """The step ends, a checkpoint is saved, a sentence says how to go on, and it does go on."""
    before = signal.getsignal(number)
    advance = Training.advance

    def advance_and_interrupt(training: Training, stop: Callable[[], bool]) -> Step:
        if training.step == 6:
            signal.raise_signal(number)
        return advance(training, stop)

    arguments = ["train", "--data", "two_moons", "--out", str(tmp_path), "--steps", "9"]
    with monkeypatch.context() as context:
        context.setattr(Training, "advance", advance_and_interrupt)
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 130
    assert "Stopped after step 7 of 9; a checkpoint is saved, --resume continues" in result.stdout
    assert signal.getsignal(number) is before
    assert newest(tmp_path)[1]["step"] == 7
    finish = re.escape(f"`pfgm train --out {tmp_path} --resume` finishes it")
    message = rf"model\.safetensors; it does not exist, the run is not finished: {finish}"
    with pytest.raises(FileNotFoundError, match=message):
        load_model(tmp_path)
    assert CliRunner().invoke(app, [*arguments, "--resume"]).exit_code == 0
    assert signal.getsignal(number) is before
    assert newest(tmp_path)[1]["step"] == 9
    load_model(tmp_path)


def test_divergence_saves_nothing(moons: DataSet, tmp_path: Path) -> None:
    config = TrainConfig.for_data(moons, steps=30, learning_rate=1e30, **TINY)
    with pytest.raises(
        FloatingPointError,
        match=r"20 steps in a row .* step 21: the loss is (nan|inf).* no checkpoint was saved",
    ):
        train(config, moons, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_full_disk_loses_no_checkpoint(
    moons: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig.for_data(moons, steps=20, **TINY)
    replace_file, calls = os.replace, []

    def replace_twice(source: str, target: Path) -> None:
        calls.append(target)
        if len(calls) > 3:  # config.yaml and the checkpoints of steps 5 and 10
            raise OSError(28, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr(files.os, "replace", replace_twice)
    message = rf"No space left on device: '{tmp_path}/checkpoints/step_00000015.safetensors'"
    with pytest.raises(OSError, match=message):
        train(config, moons, tmp_path)
    assert newest(tmp_path)[1]["step"] == 10
    assert not list(tmp_path.rglob("*.partial"))
