# SPDX-License-Identifier: Apache-2.0
"""Are settings read with their types, from presets, files and the command line, in that order?"""

from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from commands import pfgm

from pfgm_kernels.training import settings
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.data import DataSet


def test_values_have_the_types_of_their_keys() -> None:
    words = [
        "batch_size=64",
        "D=inf",
        "gamma=1",
        "compile=true",
        "event_shape=[3,4]",
        "network=a.b:c",
    ]
    found = settings.overrides(TrainConfig, words)
    assert found == {
        "batch_size": 64,
        "D": math.inf,
        "gamma": 1.0,
        "compile": True,
        "event_shape": (3, 4),
        "network": "a.b:c",
    }
    assert isinstance(found["gamma"], float)
    assert settings.overrides(TrainConfig, ["steps=3", "steps=4"]) == {"steps": 4}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("batchsize=64", "unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("lerning_rate=1", "did you mean 'learning_rate'?"),
        ("d=3", "unknown key 'd'"),
        ("zzzzzzzzzzzz=3", "expected one of data, event_shape, M"),
        ("batch_size=many", "batch_size is ill-typed: Value 'many'"),
        ("batch_size=2.5", "batch_size is ill-typed: Value '2.5'"),
        ("gamma=", "gamma is ill-typed"),
        ("compile=perhaps", "compile is ill-typed"),
        ("a.b=3", "unknown key 'a'"),
        ("batch_size", "settings are KEY=VALUE, as in batch_size=64, got 'batch_size'"),
        ("=3", "settings are KEY=VALUE"),
        ("event_shape=[3", "event_shape=[3: "),
        ("batch_size=0", "batch_size expects an integer ≥ 1, got 0"),
        ("precision=fp8", "precision expects one of float32, bfloat16, float16, got 'fp8'"),
        ("event_shape=[3,4]", "event_shape expects that of the data, (2,), got (3, 4)"),
    ],
)
def test_a_wrong_setting_is_one_sentence(tmp_path: Path, word: str, expected: str) -> None:
    result = pfgm("train", "--data", "two_moons", "--out", tmp_path / "run", word)
    assert result.exit_code == 2
    assert result.stderr.startswith("pfgm: ")
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("name", settings.PRESETS)
def test_presets_are_settings(name: str) -> None:
    """Typed, of data that there is, and together a run that can be."""
    values = settings.read(TrainConfig, name)
    data = values.pop("data", "/photos")
    shapes = {"digits": (8, 8), "mnist": (28, 28), "cifar10": (3, 32, 32), "/photos": (3, 20, 24)}
    shape = shapes[data]
    images = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, math.prod(shape))
    config = TrainConfig.for_data(
        DataSet(data, images.reshape(-1, *shape), images, None, None), **values
    )
    networks = {"digits": "perceptron", "cifar10": "ddpmpp"}
    assert config.network == networks.get(data, "unet")
    if config.network == "unet":
        assert (config.predicts, config.method, config.D) == ("denoiser", "pfgmpp", 128)
    for key, value in values.items():
        assert getattr(config, key) == value
        assert key in {field.name for field in fields(TrainConfig)}


def test_the_presets_there_are() -> None:
    assert set(settings.PRESETS) == {"digits", "mnist", "cifar10", "cifar10-pfgmpp", "folder"}


def test_words_go_before_options_before_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: two_moons\nsteps: 9\nseed: 1\nbatch_size: 8\nwidth: 8\ndepth: 1\n")
    out = tmp_path / "run"
    result = pfgm("train", "--config", path, "--out", out, "--steps", 2, "--seed", 2, "seed=3")
    assert result.exit_code == 0, result.output
    config = TrainConfig.read(out)
    assert (config.data, config.batch_size, config.steps, config.seed) == ("two_moons", 8, 2, 3)
    stored = settings.load(out / "config.yaml")
    assert set(stored) == {"versions"} | {field.name for field in fields(TrainConfig)}
    assert set(stored["versions"]) == {"pfgm_kernels", "git", "torch", "python"}
    assert re.fullmatch(r"[0-9a-f]{40}\+?|none", stored["versions"]["git"])
    assert stored["versions"]["torch"] == torch.__version__
    result = pfgm("train", "--out", out, "--resume", "steps=4", "width=16")
    assert "another run: expected width = 8, got 16" in result.stderr
    assert pfgm("train", "--out", out, "--resume", "steps=4").exit_code == 0
    assert TrainConfig.read(out).steps == 4


def test_files_that_are_no_settings(tmp_path: Path) -> None:
    path, out = tmp_path / "mine.yaml", tmp_path / "run"
    for text, expected in (
        ("steps: [", "damaged file .*mine.yaml: expected YAML"),
        ("- 3", "expected keys with values, got none"),
        ("stps: 3", "mine.yaml: unknown key 'stps'; did you mean 'steps'?"),
        ("a: !!python/object:os.system 3", "damaged file .*mine.yaml"),
    ):
        path.write_text(text)
        result = pfgm("train", "--data", "two_moons", "--config", path, "--out", out)
        assert result.exit_code == 2
        assert re.search(expected.replace("?", r"\?"), result.stderr), result.stderr
    missing = pfgm("train", "--config", tmp_path / "other.yaml", "--out", out)
    assert "other.yaml; it does not exist" in missing.stderr
    unknown = pfgm("train", "--config", "mnits", "--out", out)
    assert (
        "expects one of cifar10, cifar10-pfgmpp, digits, folder, mnist or a .yaml file"
        in unknown.stderr
    )


def test_a_run_of_before_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for arguments in (("--resume",), ("--data", "two_moons")):
        result = pfgm("train", "--out", tmp_path, *arguments)
        assert result.exit_code == 2
        assert any(
            words in result.stderr for words in ("of an older version", "already holds a run")
        )
    with pytest.raises(ValueError, match=r"holds a run of an older version, with a config\.json"):
        TrainConfig.read(tmp_path)
