# SPDX-License-Identifier: Apache-2.0
"""Does the command line do what it says, and answer bad input with one sentence?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import assert_refused, pfgm
from PIL import Image

import pfgm_kernels
from pfgm_kernels import choice
from pfgm_kernels.training.checkpoint import read
from pfgm_kernels.training.settings import load


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on the digits."""
    folder = tmp_path_factory.mktemp("digits")
    result = pfgm("train", "--data", "digits", "--out", folder, "--steps", 3, "--seed", 4)
    assert result.exit_code == 0, result.output
    assert str(folder / "model.safetensors") in result.stdout.replace("\n", "")
    return folder


def test_report() -> None:
    result = pfgm("report")
    assert result.exit_code == 0
    assert result.stdout == f"{pfgm_kernels.report()}\n"
    assert "eager" in result.stdout


@pytest.mark.parametrize(
    ("verdict", "code"), [("proven: all right", 0), ("FAILED: tails", 1), (None, 2)]
)
def test_report_after_a_check(monkeypatch: pytest.MonkeyPatch, verdict: str, code: int) -> None:
    asked = []

    def report(check: bool) -> choice.Report:
        asked.append(check)
        verdicts = {} if verdict is None else {"triton, d > 128, float, forward": verdict}
        return choice.Report({"eager": "available", "extension": "g++"} | verdicts)

    monkeypatch.setattr(pfgm_kernels, "report", report)
    result = pfgm("report", "--check")
    assert result.exit_code == code
    assert str(verdict or "eager") in result.stdout
    assert ("expects a GPU" in result.stderr) == (verdict is None)
    pfgm("report")
    assert asked == [True, False]


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "pfgm_kernels.cli", "report"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"{pfgm_kernels.report()}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["report"],
        pytest.param(["train", "--help"], marks=pytest.mark.exhaustive),
        pytest.param(["train"], marks=pytest.mark.exhaustive),
    ],
)
def test_a_closed_pipe_ends_it_quietly(tmp_path: Path, arguments: list[str]) -> None:
    """By SIGPIPE, as any other command: a shell calls that 141."""
    if arguments == ["train"]:
        arguments = ["train", "--data", "two_moons", "--steps", "1", "--out", str(tmp_path)]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pfgm_kernels.cli", *arguments]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert result.returncode == -signal.SIGPIPE
    assert result.stderr == b""


def test_a_full_disk_behind_the_output_is_named() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "pfgm_kernels.cli", "report"]
        result = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 2
    assert result.stderr == "pfgm: [Errno 28] No space left on device: standard output\n"


def test_train_leaves_a_whole_run(digits: Path) -> None:
    config = load(digits / "config.yaml")
    assert (config["data"], config["steps"], config["seed"]) == ("digits", 3, 4)
    assert config["event_shape"] == [8, 8]
    assert [path.name for path in (digits / "checkpoints").iterdir()] == [
        "step_00000003.safetensors"
    ]
    weights, _ = read(digits / "model.safetensors")
    checkpoint, state = read(digits / "checkpoints" / "step_00000003.safetensors")
    assert state["step"] == 3
    for name, weight in weights.items():
        assert torch.equal(weight, checkpoint[f"average.module.{name}"])
    assert list((digits / "tensorboard").iterdir())


def test_train_on_a_folder_of_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A resumed run finds it again from any folder, and one given anew is the same by any path."""
    (tmp_path / "photos").mkdir()
    for index in range(20):
        Image.new("RGB", (3, 2), (index, 10 * index, 255)).save(tmp_path / f"photos/{index}.png")
    monkeypatch.chdir(tmp_path)
    start = ("train", "--data", "photos", "--out", tmp_path / "run")
    assert pfgm(*start, "--steps", 1).exit_code == 0
    config = load(tmp_path / "run" / "config.yaml")
    assert (config["data"], config["event_shape"]) == (str(tmp_path / "photos"), [3, 2, 3])
    (tmp_path / "photos" / "20.png").write_bytes(b"hello")
    assert_refused(pfgm(*start, "--steps", 2, "--resume"), "photos/20.png: expected an image")
    (tmp_path / "photos" / "20.png").unlink()
    assert pfgm(*start, "--steps", 2, "--resume").exit_code == 0
    monkeypatch.chdir("/")
    assert pfgm("train", "--out", tmp_path / "run", "--steps", 3, "--resume").exit_code == 0


def test_resume_keeps_what_is_not_given(tmp_path: Path) -> None:
    start = ("train", "--data", "two_moons", "--out", tmp_path, "--seed", 5)
    assert pfgm(*start, "--steps", 2, "--checkpoint-every", 1).exit_code == 0
    result = pfgm("train", "--out", tmp_path, "--steps", 4, "--resume")
    assert result.exit_code == 0, result.output
    assert "Resuming after step 2" in result.stdout
    config = load(tmp_path / "config.yaml")
    assert (config["seed"], config["steps"], config["checkpoint_every"]) == (5, 4, 1)
    assert_refused(
        pfgm("train", "--data", "swiss_roll", "--out", tmp_path, "--resume"),
        "another run: expected data = 'two_moons', got 'swiss_roll'",
    )
    assert_refused(
        pfgm("train", "--out", tmp_path, "--seed", 6, "--resume"), "expected seed = 5, got 6"
    )


def test_train_refuses(digits: Path, tmp_path: Path) -> None:
    assert_refused(pfgm("train", "--data", "digits", "--out", digits), "already holds a run")
    unknown = pfgm("train", "--data", "digit", "--out", tmp_path)
    assert_refused(unknown, "'digit'", "expected one of digits, two_moons")
    assert_refused(pfgm("train", "--out", tmp_path), "expected --data with one of digits")
    assert_refused(pfgm("train", "--out", tmp_path, "--resume"), f"{tmp_path} holds no run")
    zero = pfgm("train", "--data", "digits", "--out", tmp_path, "--steps", 0)
    assert_refused(zero, "steps expects an integer ≥ 1, got 0")
    assert not list(tmp_path.iterdir())


def test_a_message_of_several_lines_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(check: bool) -> None:
        raise ValueError("first\n  second")

    monkeypatch.setattr(pfgm_kernels, "report", broken)
    assert_refused(pfgm("report"), "pfgm: first second")


def test_damaged_run_is_refused(digits: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "model.safetensors"):
        (tmp_path / name).write_bytes((digits / name).read_bytes())
    options = ("sample", "--model", tmp_path, "--out", tmp_path / "samples.png")
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:1000])
    refused = f"damaged checkpoint {tmp_path / 'model.safetensors'}: expected a whole"
    assert_refused(pfgm(*options), refused, "got one of 1000 bytes")
    for text, expected in (("{", "expected YAML"), ("[1]", "expected keys with values")):
        (tmp_path / "config.yaml").write_text(text)
        assert_refused(pfgm(*options), f"damaged file {tmp_path / 'config.yaml'}: {expected}")


def test_wrong_usage_is_explained() -> None:
    assert pfgm("train").exit_code == 2
    assert "--out" in pfgm("train").stderr
    assert "report" in pfgm("--help").stdout
    assert pfgm("trian").exit_code == 2


@pytest.mark.parametrize("option", [("--conditional",), ("--config", "digits")])
def test_what_a_resumed_run_does_not_take(tmp_path: Path, option: tuple[str, ...]) -> None:
    result = pfgm("train", "--out", tmp_path, "--resume", *option)
    assert result.exit_code == 2
    assert "--resume expects the run's own settings" in " ".join(result.output.split())
