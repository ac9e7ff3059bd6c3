# SPDX-License-Identifier: Apache-2.0
"""Does `pfgm sample` write what was asked for, where others read it, and go on where it stopped?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import assert_refused, pfgm
from lives import environments
from PIL import Image
from rich.console import Console
from torch import Tensor

from pfgm_kernels import figures
from pfgm_kernels.cli.options import seeds_of
from pfgm_kernels.files import locked
from pfgm_kernels.training import data, generate
from pfgm_kernels.training.evaluation import read_images
from pfgm_kernels.training.generate import Part, Sampler, Sampling
from pfgm_kernels.training.samples import collect
from pfgm_kernels.training.trainer import load_model

QUICK = ("--solver", "euler", "--steps", 3)
HOW = Sampling("euler", 3)

# What each of two processes does, as torchrun starts them.
WORKER = """
import sys
from pfgm_kernels.cli import app
from pfgm_kernels.training.ranks import joined
with joined("cpu"):
    for out in sys.argv[3:]:
        quick = ["--solver", "euler", "--steps", "3", "--seeds", "0-44", "--out", out]
        app(["sample", "--model", sys.argv[1], *quick], standalone_mode=False)
        app(["sample", "--model", sys.argv[2], *quick[:-1], out + ".npz"], standalone_mode=False)
"""


def trained(tmp_path_factory: pytest.TempPathFactory, *options: object) -> Path:
    folder = tmp_path_factory.mktemp("run")
    size = ("width=32", "depth=1", "checkpoint_every=2")
    assert pfgm("train", "--out", folder, "--steps", 6, *options, *size).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory, "--data", "digits")


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory, "--data", "digits", "--conditional")


@pytest.fixture(scope="module")
def moons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory, "--data", "two_moons")


def drawn(run: Path, seeds: list[int], how: Sampling = HOW, step: int | None = None) -> Tensor:
    """As the data set stores its own."""
    sampler = Sampler(*load_model(run, step=step), how)
    return collect(sampler, seeds, Console(quiet=True))[0]


def pixels(path: Path) -> Tensor:
    with Image.open(path) as picture:
        assert picture.mode == "L"
        return torch.from_numpy(np.asarray(picture).copy())


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that are drawn."""
    found: list[int] = []
    draw = Sampler.generate

    def watch(sampler: Sampler, seeds: list[int], *rest: object) -> Iterator[Part]:
        for part in draw(sampler, seeds, *rest):
            found.extend(part.seeds)
            yield part

    monkeypatch.setattr(Sampler, "generate", watch)
    return found


def test_seeds() -> None:
    assert seeds_of("0-3") == [0, 1, 2, 3]
    assert seeds_of("7, 3,10-12,4294967295") == [7, 3, 10, 11, 12, 4294967295]
    for text in ("", "a", "3-", "-3", "1,,2", "5-2", "1,0-3", "0-4294967296", "0-10000000", "1.5"):
        with pytest.raises(ValueError, match=r"--seeds expects numbers and ranges as in 3,5,10-12"):
            seeds_of(text)


@pytest.mark.parametrize("solver", ["euler", "heun", "rk45"])
def test_a_picture(
    digits: Path, tmp_path: Path, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the seeds in the order in which they are given; one that is there is replaced."""
    shown, draw = [], figures.draw_samples
    monkeypatch.setattr(figures, "draw_samples", lambda *a: shown.append(a[0]) or draw(*a))
    out = tmp_path / "new" / "samples.png"
    for seeds in ([3, 0, 5], [7]):
        given = ",".join(map(str, seeds))
        options = ("--seeds", given, "--solver", solver, "--steps", 4, "--out", out)
        result = pfgm("sample", "--model", digits, *options)
        assert result.exit_code == 0, result.output
        assert f"{len(seeds)} samples, " in result.stdout
        evaluations = float(result.stdout.split("samples, ")[1].split()[0])
        assert evaluations == {"euler": 5, "heun": 9}.get(solver, evaluations) > 0
        stored = drawn(digits, seeds, Sampling(solver, 4))
        assert stored.dtype == torch.uint8
        assert torch.equal(shown[-1], data.load("digits").decode(stored))
        with Image.open(out) as picture:
            assert picture.size[0] > 300


def test_a_folder_that_others_read(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    result = pfgm("sample", "--model", digits, *QUICK, "--seeds", "0-24,1000000", "--out", out)
    assert result.exit_code == 0, result.output
    assert "26 images" in result.stdout
    expected = drawn(digits, [*range(25), 1000000])
    names = sorted(path.name for path in out.glob("*.png"))
    assert names == [*(f"{seed:06d}.png" for seed in range(25)), "1000000.png"]
    for name, image in zip(names, expected, strict=True):
        assert torch.equal(pixels(out / name), image)
    loaded = data.load(out)
    assert sorted(torch.cat([loaded.train, loaded.held_out]).tolist()) == sorted(expected.tolist())
    assert torch.equal(read_images(out, data.load("digits")), expected)


def test_a_folder_goes_on(digits: Path, tmp_path: Path, watched: list[int]) -> None:
    """After a process that was killed while it wrote, with more seeds, with none left to draw."""
    sample = ("sample", "--model", digits, *QUICK, "--out", tmp_path)
    assert pfgm(*sample, "--seeds", "0-9").exit_code == 0
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    for seed in (4, 7):
        (tmp_path / f"{seed:06d}.png").unlink()
    (tmp_path / "0123.partial").write_bytes(b"half")
    watched.clear()
    assert pfgm(*sample, "--seeds", "2-12").exit_code == 0
    assert sorted(watched) == [4, 7, 10, 11, 12]
    for name, content in files.items():
        assert (tmp_path / name).read_bytes() == content
    assert not list(tmp_path.glob("*.partial"))
    watched.clear()
    assert pfgm(*sample, "--seeds", "0-12").exit_code == 0
    assert not watched


def test_an_interrupted_folder_has_whole_files(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Sampler._draw

    def interrupted(sampler: Sampler, seeds: list[int], *rest: object) -> object:
        if seeds[0] == 8:
            raise KeyboardInterrupt
        return draw(sampler, seeds, *rest)

    sample = ("sample", "--model", digits, *QUICK, "--seeds", "0-11", "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "_draw", interrupted)
        result = pfgm(*sample, "--batch", 4)
    assert result.exit_code == 130
    text = " ".join(result.output.split())
    assert f"4 of 12 images are left to draw in {tmp_path}; the same command goes on" in text
    assert len(list(tmp_path.glob("*.png"))) == 8
    assert pfgm(*sample, "--batch", 4).exit_code == 0
    how = Sampling("euler", 3, batch=4)
    for seed, image in enumerate(drawn(digits, [*range(12)], how)):
        assert torch.equal(pixels(tmp_path / f"{seed:06d}.png"), image)


def test_a_folder_of_other_samples(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample = ("sample", "--seeds", "0-3", "--out", out)
    assert pfgm(*sample, "--model", digits, *QUICK).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for options, expected in (
        (("--steps", 4, "--solver", "euler"), "holds other samples: expected steps = 3, got 4"),
        ((*QUICK, "--batch", 4), "expected batch = 16, got 4"),
        ((*QUICK, "--churn", "1,0.5"), "expected churn = [], got [1.0, 0.5]"),
        ((*QUICK, "--step", 2), "holds other samples: expected model = "),
    ):
        assert_refused(pfgm(*sample, "--model", digits, *options), expected, "another folder")
    with locked(out):
        assert_refused(pfgm(*sample, "--model", digits, *QUICK), f"{out} is in use")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "sampling.json").write_text("{")
    damaged = pfgm(*sample, "--model", digits, *QUICK)
    assert_refused(damaged, f"damaged file {out / 'sampling.json'}: expected JSON")
    (tmp_path / "000002.png").write_bytes(b"of another")
    foreign = pfgm(*sample[:-1], tmp_path, "--model", digits, *QUICK)
    assert_refused(foreign, "expects to be empty or of the same samples, got 000002.png and no")


def test_arrays_that_others_read(digits: Path, conditional: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples.npz"
    for run, labels in ((digits, None), (conditional, [4, 2, 9, 0, *range(10), *range(10)])):
        seeds = "4,2,9,0,10-29"
        assert pfgm("sample", "--model", run, *QUICK, "--seeds", seeds, "--out", out).exit_code == 0
        expected = drawn(run, [4, 2, 9, 0, *range(10, 30)])
        with np.load(out) as arrays:
            assert arrays["seeds"].tolist() == [4, 2, 9, 0, *range(10, 30)]
            assert arrays["images"].dtype == np.uint8
            assert np.array_equal(arrays["images"], expected.numpy())
            assert ("labels" in arrays) == (labels is not None)
            assert labels is None or arrays["labels"].tolist() == labels
        loaded = data.load(out)
        assert loaded.is_image
        assert len(loaded.train) + len(loaded.held_out) == 24
        assert (loaded.train_labels is None) == (labels is None)
        assert torch.equal(read_images(out, data.load("digits")), expected)


def test_classes(conditional: Path, tmp_path: Path) -> None:
    """Each in turn by the seed, or those asked for; a folder's are those of its files."""
    sample = ("sample", "--model", conditional, *QUICK)
    out = tmp_path / "out"
    for seeds in ("3,5,8-14", "19"):
        given = ("--seeds", seeds, "--labels", "6,1", "--out", out)
        assert pfgm(*sample, *given).exit_code == 0
    expected = [[f"{s:06d}.png", 1 if s % 2 else 6] for s in (3, 5, *range(8, 15), 19)]
    assert json.loads((out / "dataset.json").read_text()) == {"labels": expected}
    loaded = data.load(out, held_out=0)
    assert loaded.train_labels.tolist() == [label for _, label in expected]
    assert (
        pfgm(*sample, "--seeds", "13", "--labels", "1", "--out", tmp_path / "a.npz").exit_code == 0
    )
    with np.load(tmp_path / "a.npz") as arrays:
        assert torch.equal(torch.from_numpy(arrays["images"][0]), pixels(out / "000013.png"))
        assert arrays["labels"].tolist() == [1]
    assert_refused(pfgm(*sample, "--labels", "10"), "labels expects classes of 0 to 9, got 10")
    assert_refused(pfgm(*sample, "--labels", "x"), "--labels expects integers as in 1,2, got 'x'")


def test_a_checkpoint(digits: Path, tmp_path: Path) -> None:
    """Of a step, its averaged weights; the run need not be finished."""
    (tmp_path / "checkpoints").mkdir()
    for name in ("config.yaml", "checkpoints/step_00000002.safetensors"):
        (tmp_path / name).write_bytes((digits / name).read_bytes())
    out = tmp_path / "a.npz"
    options = ("sample", "--model", tmp_path, *QUICK, "--seeds", "1,2", "--out", out)
    assert pfgm(*options, "--step", 2).exit_code == 0
    with np.load(out) as arrays:
        assert np.array_equal(arrays["images"], drawn(digits, [1, 2], step=2).numpy())
        assert not np.array_equal(arrays["images"], drawn(digits, [1, 2]).numpy())
    finished, _ = load_model(digits)
    last, _ = load_model(digits, step=6)
    for name, weight in finished.state_dict().items():
        assert torch.equal(weight, last.state_dict()[name])
    missing = pfgm("sample", "--model", digits, "--out", out, "--step", 3)
    assert_refused(missing, f"{digits} holds no checkpoint of step 3: expected one of 6, 4, 2")
    damaged = tmp_path / "checkpoints" / "step_00000004.safetensors"
    damaged.write_bytes((tmp_path / "checkpoints" / "step_00000002.safetensors").read_bytes()[:999])
    assert_refused(pfgm(*options, "--step", 4), f"damaged checkpoint {damaged}")


def test_points(moons: Path, tmp_path: Path) -> None:
    sample = ("sample", "--model", moons, *QUICK, "--seeds", "0-29")
    assert pfgm(*sample, "--out", tmp_path / "points.png").exit_code == 0
    assert (tmp_path / "points.png").stat().st_size > 1000
    assert pfgm(*sample, "--out", tmp_path / "points.npz").exit_code == 0
    loaded = data.load(tmp_path / "points.npz", held_out=0)
    assert loaded.train.dtype == torch.float32
    assert torch.equal(loaded.train, drawn(moons, [*range(30)]))
    refused = pfgm(*sample, "--out", tmp_path / "points")
    assert_refused(refused, "a folder expects a run of images, got one of two_moons")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 3)))
    run = tmp_path / "run"
    assert pfgm("train", "--data", tmp_path / "x.npy", "--out", run, "--steps", 1).exit_code == 0
    spatial = pfgm("sample", "--model", run, "--out", tmp_path / "x.png")
    assert_refused(spatial, "a picture expects images (h, w) or (3, h, w), or points (2,)")


def test_what_is_refused(digits: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "samples.png")
    assert_refused(pfgm("sample", "--model", tmp_path, *out), f"{tmp_path} holds no run")
    wrong_solver = pfgm("sample", "--model", digits, "--solver", "huen", *out)
    assert_refused(wrong_solver, "euler, heun, heun_euler, rk45", "'huen'")
    assert_refused(pfgm("sample", "--model", digits, "--seeds", "x", *out), "got 'x'")
    assert_refused(pfgm("sample", "--model", digits, "--steps", 0, *out), "got 0")
    churn = pfgm("sample", "--model", digits, "--churn", "1;2", *out)
    assert_refused(churn, "--churn expects numbers as in 1,2, got '1;2'")
    wrong_name = pfgm("sample", "--model", digits, "--out", tmp_path / "samples.gif")
    assert_refused(wrong_name, "--out expects a .png or .npz file or a folder")
    assert not list(tmp_path.iterdir())
    for name in ("config.yaml", "checkpoints/step_00000006.safetensors"):  # as if it were stopped
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((digits / name).read_bytes())
        unfinished = pfgm("sample", "--model", tmp_path, *out)
        assert_refused(unfinished, f"`pfgm train --out {tmp_path} --resume` finishes it")


def test_the_batch_is_the_devices(monkeypatch: pytest.MonkeyPatch, digits: Path) -> None:
    monkeypatch.setitem(generate.BATCH, "cpu", 5)
    _, config = load_model(digits)
    assert Sampler(lambda x, t: x, config).how.batch == 5


@pytest.fixture(scope="module")
def shared(
    digits: Path, moons: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """What two ranks wrote: a folder that was there in part, and arrays of points."""
    out = tmp_path_factory.mktemp("ranks")
    assert (
        pfgm("sample", "--model", digits, *QUICK, "--seeds", "3-20", "--out", out / "f").exit_code
        == 0
    )
    command = [sys.executable, "-c", WORKER, str(digits), str(moons), str(out / "f")]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | rank,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in environments(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "45 images" in outputs[0]
    assert "45 samples, 4 function evaluations each" in outputs[0]
    assert "45" not in outputs[1]
    return lambda name: out / name


@pytest.mark.exhaustive
def test_ranks_share_the_seeds(shared: Callable[[str], Path], digits: Path, moons: Path) -> None:
    """To the bit of one process."""
    for seed, image in enumerate(drawn(digits, [*range(45)])):
        assert torch.equal(pixels(shared("f") / f"{seed:06d}.png"), image)
    with np.load(shared("f.npz")) as arrays:
        assert np.array_equal(arrays["x"], drawn(moons, [*range(45)]).numpy())
