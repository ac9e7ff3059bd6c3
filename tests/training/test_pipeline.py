# SPDX-License-Identifier: Apache-2.0
"""Does a run that is saved for diffusers load there, and draw what the run draws?"""

from __future__ import annotations

import json
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import pfgm
from torch import Tensor

from pfgm_kernels.flow import grid, sample, sample_prior
from pfgm_kernels.flow._queries import root_of
from pfgm_kernels.flow.grid import T_MIN
from pfgm_kernels.training import checkpoint, methods
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.pipeline import (
    PoissonFlowModel,
    PoissonFlowPipeline,
    PoissonFlowScheduler,
)
from pfgm_kernels.training.pipeline.export import export, pipeline_of
from pfgm_kernels.training.trainer import MODEL, load_model

FILES = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}
UNET = {"network": "unet", "predicts": "denoiser", "method": "pfgmpp"}
RUNS: dict[str, dict[str, Any]] = {
    "denoiser": UNET | {"D": 128.0, "T": 300.0, "sigma_data": 0.3},
    "diffusion": UNET | {"D": math.inf},
    "classes": UNET | {"D": 64.0, "classes": 3, "event_shape": (3, 8, 4)},
    "field": {"network": "unet", "predicts": "field", "gamma": 2.0, "event_shape": (1, 8, 8)},
    "mean": {"width": 24, "depth": 2, "D": 2.5, "gamma": 0.5},
    "points": {"network": "perceptron", "predicts": "field", "event_shape": (2,), "width": 16},
}
SEEDS = (3, 0, 2**32 - 1, 5)


def config_of(name: str, **changes: Any) -> TrainConfig:
    known = {"data": "own", "event_shape": (8, 8), "M": 100, "gamma": 1.0, "T": 20.0, "seed": 7}
    return TrainConfig(**known | RUNS[name] | changes)


def finish(run: Path, config: TrainConfig, network: torch.nn.Module | None = None) -> Path:
    """A run that is finished, as far as its files tell."""
    config.write(run)
    state = {"version": checkpoint.VERSION, "step": config.steps}
    checkpoint.write(run / MODEL, config.model(network=network).state_dict(), state)
    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each of RUNS what `export` writes."""
    parent = tmp_path_factory.mktemp("runs")
    for name in RUNS:
        export(finish(parent / name, config_of(name)), parent / name / "diffusers")
    return {name: parent / name for name in RUNS}


def loaded(folder: Path, **options: Any) -> PoissonFlowPipeline:
    pipeline = PoissonFlowPipeline.from_pretrained(folder / "diffusers", **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def labels_of(config: TrainConfig) -> list[int] | None:
    return [2, 0, 1, 2] if config.classes else None


def drawn(run: Path, **options: Any) -> Tensor:
    """The samples of SEEDS as `pfgm sample` draws them."""
    model, config = load_model(run)
    x = sample_prior(len(SEEDS), config.event_shape, T=config.T, D=config.D, seeds=SEEDS)
    labels = {"labels": torch.tensor(labels_of(config))} if config.classes else {}
    options = {"T": config.T, "t_min": T_MIN * root_of(config.D)} | options | labels
    substitution = methods.substitution(config)
    return sample(methods.field_of(config, model), x, substitution=substitution, **options).x


@pytest.mark.parametrize("name", RUNS)
def test_a_loaded_pipeline_draws_what_its_run_draws(folders: dict[str, Path], name: str) -> None:
    pipeline, config = loaded(folders[name]), config_of(name)
    assert not pipeline.unet.training
    assert (pipeline.unet.substitution is not None) == (config.predicts == "field")
    options: dict[str, Any] = {"class_labels": labels_of(config), "output_type": "latent"}
    got = pipeline(4, generators(), num_inference_steps=3, **options).images
    assert torch.equal(got, drawn(folders[name], steps=3))
    assert len(pipeline.scheduler.timesteps) == 7
    pipeline.scheduler = PoissonFlowScheduler.from_config(
        pipeline.scheduler.config, solver="euler", rho=7.0, t_min=0.05
    )
    got = pipeline(4, generators(), num_inference_steps=5, **options).images
    times = grid(config.T, 0.05, 6, rho=7)
    assert torch.equal(got, drawn(folders[name], solver="euler", times=times, t_min=None))
    assert pipeline.scheduler.timesteps.tolist() == times.tolist()


@pytest.mark.parametrize("name", RUNS)
def test_a_folder_holds_json_and_safetensors_alone(folders: dict[str, Path], name: str) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    folder = folders[name] / "diffusers"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == FILES
    for file in files:
        if file.endswith(".json"):
            json.loads((folder / file).read_text(), parse_constant=refuse)
    assert len({(folder / file).stat().st_mode for file in files}) == 1  # as the umask says


def test_a_pipeline_saves_again(folders: dict[str, Path], tmp_path: Path) -> None:
    first = loaded(folders["diffusion"])
    first.save_pretrained(tmp_path / "diffusers")
    second = loaded(tmp_path)
    for part in ("unet", "scheduler"):
        configs = [dict(getattr(each, part).config) for each in (first, second)]
        for config in configs:
            config.pop("_name_or_path", None)
        assert configs[0] == configs[1]
        assert configs[0]["D"] == "inf"
    weights = second.unet.state_dict()
    assert first.unet.state_dict().keys() == weights.keys()
    assert all(torch.equal(each, weights[name]) for name, each in first.unet.state_dict().items())


def test_three_lines(folders: dict[str, Path]) -> None:
    pipeline = PoissonFlowPipeline.from_pretrained(folders["denoiser"] / "diffusers")
    images = pipeline(batch_size=2, num_inference_steps=2, generator=generators()[0]).images
    assert [image.size for image in images] == [(8, 8), (8, 8)]
    x = sample_prior(2, (8, 8), T=300.0, D=128, generator=generators()[0])
    field = methods.field_of(config_of("denoiser"), load_model(folders["denoiser"])[0])
    ends = sample(field, x, T=300.0, t_min=T_MIN * math.sqrt(128), steps=2).x
    stored = ((ends.double() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), stored.numpy())


def test_forms_of_images(folders: dict[str, Path]) -> None:
    pipeline = loaded(folders["classes"])
    options: dict[str, Any] = {"class_labels": 1, "num_inference_steps": 1}

    def images(form: str) -> Any:
        return pipeline(2, generators()[:2], output_type=form, **options).images

    pt, array, ends = images("pt"), images("np"), images("latent")
    assert pt.shape == (2, 3, 8, 4)
    assert pt.dtype == torch.float32
    assert torch.equal(pt, (ends.double() / 2 + 0.5).clamp(0, 1).float())
    assert array.dtype == np.float32
    assert np.array_equal(array, pt.movedim(1, -1).numpy())
    assert [(image.mode, image.size) for image in images("pil")] == [("RGB", (4, 8))] * 2
    (alone,) = pipeline(2, generators()[:2], output_type="pt", return_dict=False, **options)
    assert torch.equal(alone, pt)
    with pytest.raises(ValueError, match="output_type expects pil, np, pt, latent, got 'jpeg'"):
        images("jpeg")
    with pytest.raises(ValueError, match=r"output_type expects latent for events \(2,\), got 'pt'"):
        loaded(folders["points"])(output_type="pt")


def test_a_loop_of_ones_own(folders: dict[str, Path]) -> None:
    pipeline = loaded(folders["field"])
    unet, scheduler = pipeline.unet, pipeline.scheduler
    x = scheduler.sample_prior(4, unet.config.event_shape, generator=generators())
    scheduler.set_timesteps(3)
    states = []
    with torch.no_grad():
        for t in scheduler.timesteps:
            states.append(x)
            slope = unet(scheduler.scale_model_input(x, t), t.expand(4)).sample
            (x,) = scheduler.step(slope, t, x, return_dict=False)
    assert torch.equal(x, drawn(folders["field"], steps=3))
    # Once more, from the middle on, as the editing of images does: after the first whole step.
    y = states[2]
    with torch.no_grad():
        for t in scheduler.timesteps[2:]:
            y = scheduler.step(unet(y, t).sample, t, y).prev_sample
    assert torch.equal(y, x)


def test_a_timestep_out_of_turn() -> None:
    scheduler = PoissonFlowScheduler(T=10.0)
    scheduler.set_timesteps(2)
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"timestep expects one of scheduler.timesteps, got 3"):
        scheduler.step(x, 3.0, x)
    scheduler.step(x, 10.0, x)
    with pytest.raises(ValueError, match=r"timestep expects 0\.1, got 10"):
        scheduler.step(x, 10.0, x)
    with pytest.raises(ValueError, match="solver expects one of euler, heun, got 'rk45'"):
        PoissonFlowScheduler(T=10.0, solver="rk45")


def test_the_prior() -> None:
    scheduler = PoissonFlowScheduler(T=10.0, D=3.0)
    want = sample_prior(4, (2, 3), T=10.0, D=3, seeds=SEEDS)
    assert torch.equal(scheduler.sample_prior(4, (2, 3), generator=generators()), want)
    with pytest.raises(ValueError, match="generator expects one, or 3 in a list, got 4"):
        scheduler.sample_prior(3, (2, 3), generator=generators())
    with pytest.raises(ValueError, match="the prior of D = 3 is not Gaussian"):
        _ = scheduler.init_noise_sigma
    assert PoissonFlowScheduler(T=10.0, D=math.inf).init_noise_sigma == 10.0


def test_classes_are_asked_for(folders: dict[str, Path]) -> None:
    pipeline = loaded(folders["classes"])
    for wrong, words in (
        (None, "classes from 0 to 2, got None"),
        ([0, 3], "classes from 0 to 2, got"),
        (-1, "classes from 0 to 2, got -1"),
        ([0, 1, 2], r"an integer or 2, got torch.int64 of shape \(3,\)"),
        (0.5, "an integer or 2, got torch.float32"),
    ):
        with pytest.raises(ValueError, match=f"class_labels expects {words}"):
            pipeline(2, class_labels=wrong)
    with pytest.raises(ValueError, match="class_labels expects None"):
        loaded(folders["denoiser"])(2, class_labels=1)


@pytest.mark.parametrize("name", ["denoiser", "field", "mean"])
def test_weights_of_sixteen_bits(folders: dict[str, Path], name: str) -> None:
    pipeline = loaded(folders[name], torch_dtype=torch.float16)
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float16}
    got = pipeline(4, generators(), num_inference_steps=3, output_type="latent").images
    assert got.dtype == torch.float32
    want = drawn(folders[name], steps=3)
    error = torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want)
    assert 0 < error < 20 * 2**-11  # units of float16
    half = torch.ones(1, *want.shape[1:], dtype=torch.float16)
    assert pipeline.unet(half, 1.0).sample.dtype == torch.float32


def test_the_callback_may_change_what_goes_on(folders: dict[str, Path]) -> None:
    pipeline = loaded(folders["denoiser"])
    seen = []

    def callback(who: object, index: int, t: Tensor, more: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((index, float(t)))
        assert who is pipeline
        return {"latents": torch.full_like(more["latents"], 0.25)} if index == 4 else {}

    options: dict[str, Any] = {"output_type": "latent", "callback_on_step_end": callback}
    images = pipeline(2, num_inference_steps=2, **options).images
    assert seen == list(enumerate(pipeline.scheduler.timesteps.tolist()))
    assert (images == 0.25).all()


def test_pictures_have_the_bits_that_are_stored(folders: dict[str, Path]) -> None:
    """Also of what lies on the edge between two of the 256 values, or beyond the first or last."""
    edges = ((2 * torch.arange(256, dtype=torch.float64) + 1) / 255 - 1).float()
    x = torch.cat([edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1), 9 * edges])
    x = x.view(-1, 8, 8)
    images = loaded(folders["mean"])(
        len(x), num_inference_steps=1, callback_on_step_end=lambda *_: {"latents": x}
    ).images
    stored = ((x.double() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), stored.numpy())


def test_pictures_of_data_in_another_range() -> None:
    unet = PoissonFlowModel((1, 2), "perceptron", "mean", low=0.0, high=4.0)
    pipeline = PoissonFlowPipeline(unet.eval(), PoissonFlowScheduler(T=9.0))
    x = torch.tensor([[[1.0, 5.0]]])
    options: dict[str, Any] = {"callback_on_step_end": lambda *_: {"latents": x}}
    images = pipeline(num_inference_steps=1, output_type="pt", **options).images
    assert images.tolist() == [[[[0.25, 1.0]]]]


def test_samples_that_are_not_finite(folders: dict[str, Path]) -> None:
    pipeline = loaded(folders["mean"])
    with torch.no_grad():
        next(pipeline.unet.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="samples are not finite: 2 of 2"):
        pipeline(2, num_inference_steps=1)


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("unpickled", "w"))


def test_no_pickle_is_read(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline_of(*load_model(folders["mean"])).save_pretrained(tmp_path / "diffusers")
    weights = tmp_path / "diffusers/unet/diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.with_suffix(".bin").write_bytes(pickle.dumps(Trap()))
    for load in (
        lambda **options: loaded(tmp_path, **options),
        lambda **options: PoissonFlowModel.from_pretrained(tmp_path / "diffusers/unet", **options),
    ):
        with pytest.raises(OSError, match="safetensors"):
            load()
        with pytest.raises(ValueError, match="use_safetensors expects True"):
            load(use_safetensors=False)
    assert not Path("unpickled").exists()


def test_no_code_in_the_folder_is_run(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline_of(*load_model(folders["mean"])).save_pretrained(tmp_path / "diffusers")
    code = tmp_path / f"diffusers/unet/{PoissonFlowModel.__module__}.py"  # where diffusers looks
    code.write_text("open('executed', 'w')")
    with pytest.raises(ValueError, match="expects JSON and safetensors files, got code: "):
        loaded(tmp_path)
    assert not Path("executed").exists()


OWN = """
import torch

def make(event_shape, num_classes):
    return Net()

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.rand(()))

    def forward(self, x, noise_condition):
        return self.gain * x
"""


def test_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets_to_export.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "nets_to_export:make"
    named = finish(tmp_path / "named", config_of("denoiser", network=name))
    export(named, named / "diffusers")
    given = sys.modules["nets_to_export"].make((8, 8), 0)
    unnamed = finish(tmp_path / "unnamed", config_of("denoiser", network="own"), given)
    with pytest.raises(ValueError, match=r"given from Python: expected network=package\.module:"):
        export(unnamed, unnamed / "diffusers")
    with pytest.raises(ValueError, match=f"network expects None, for the run's {name}, got x:y"):
        export(named, named / "again", network="x:y")
    export(unnamed, unnamed / "diffusers", network=name)
    for run in (named, unnamed):
        pipeline = loaded(run)
        assert pipeline.unet.config.network == name
        weights, _ = checkpoint.read(run / MODEL)
        assert torch.equal(pipeline.unet.model.network.gain, weights["network.gain"])
    monkeypatch.delitem(sys.modules, "nets_to_export")
    with pytest.raises(ValueError, match="expects nets_to_export to be imported"):
        loaded(named)
    assert "nets_to_export" not in sys.modules


def test_the_command(folders: dict[str, Path], tmp_path: Path) -> None:
    result = pfgm("export", "--model", folders["mean"], "--out", tmp_path / "a/b")
    assert result.exit_code == 0, result.output
    assert "PoissonFlowPipeline" in result.stdout
    assert str(tmp_path / "a/b") in result.stdout
    assert PoissonFlowPipeline.from_pretrained(tmp_path / "a/b").unet.config.width == 24
    again = pfgm("export", "--model", folders["mean"], "--out", tmp_path / "a")
    assert again.exit_code == 2
    assert again.stderr == f"pfgm: {tmp_path / 'a'} already holds something: name another folder\n"
    config_of("mean").write(tmp_path / "begun")
    unfinished = pfgm("export", "--model", tmp_path / "begun", "--out", tmp_path / "c")
    assert unfinished.exit_code == 2
    assert "the run is not finished" in unfinished.stderr
    assert unfinished.stderr.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_a_folder_is_whole_or_not_there(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PoissonFlowScheduler, "save_pretrained", full)
    with pytest.raises(OSError, match=r"No space left on device: .*out"):
        export(folders["mean"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
