# SPDX-License-Identifier: Apache-2.0
"""Does the demo measure what it says, and leave everything that it promises?"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from pfgm_kernels import demo, figures, poisson_field
from pfgm_kernels.demo import check_op, exact_field, peak_extra_memory, published_field
from pfgm_kernels.files import locked
from pfgm_kernels.flow import Trajectory, perturb, sample_prior
from pfgm_kernels.training import data
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.evaluation import Evaluation, Quality
from pfgm_kernels.training.reports import read_stats
from pfgm_kernels.training.trainer import Run


def test_formulas_agree() -> None:
    """The published formula, in float64 and at large noise, against the exact field."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(40, 3, 2, generator=generator)
    x, t = perturb(x0, sigma=0.5, M=50, generator=generator)
    exact = exact_field(x, t, x0, gamma=2.0)
    assert exact.shape == (40, 7)
    published = published_field(x.double(), t.double(), x0.double(), gamma=2.0)
    torch.testing.assert_close(published, exact, rtol=1e-5, atol=1e-5)
    ours = poisson_field(x, t, x0, gamma=2.0, scale=6**0.5)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_exact_field_is_exact() -> None:
    """In float64 throughout, the height of a query too."""
    generator = torch.Generator().manual_seed(1)
    x0, x = torch.randn(30, 20, generator=generator), torch.randn(5, 20, generator=generator)
    t = 7 + torch.rand(5, generator=generator)
    found = exact_field(x, t, x0, gamma=2.0)
    difference = x0.double() - x.double()[:, None]
    s = difference.square().sum(2) + t.double().square()[:, None]
    weights = (s ** (-21 / 2)) / (s ** (-21 / 2)).sum(1, keepdim=True)
    row = torch.cat([(weights[:, :, None] * difference).sum(1), -t.double()[:, None]], 1)
    expected = 20**0.5 * row / (row.norm(dim=1, keepdim=True) + 2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_queries_are_the_runs_and_the_worst_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    digits, noises = data.load("digits"), []
    config = TrainConfig.for_data(digits, sigma=0.02, tau=0.05)

    def watched(x0: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        noises.append(options)
        return perturb(x0, **options)

    def wrong(*arguments: object, **options: object) -> torch.Tensor:
        field = poisson_field(*arguments, **options)
        return field * (1 + 5e-6 * (torch.arange(len(field)) == 3))[:, None]

    monkeypatch.setattr(demo, "QUERIES", 8)
    monkeypatch.setattr(demo, "perturb", watched)
    monkeypatch.setattr(demo.pfgm_kernels, "poisson_field", wrong)
    with pytest.raises(RuntimeError, match=r"got [45]\.\de-06"):
        check_op(digits, config)
    del noises[0]["generator"]
    assert noises == [{"sigma": 0.02, "tau": 0.05, "M": config.M}]


def test_the_time_is_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 1, 1, 3, 3, 12, 12, 12, 12, 20])  # 1, 2, 9, 0 and 8 seconds
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(clock))
    assert demo._median_seconds(lambda: None) == 2


@pytest.mark.exhaustive
def test_wrong_op_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = data.load("digits")
    config = TrainConfig.for_data(digits)

    def wrong(*arguments: object, **options: object) -> torch.Tensor:
        return poisson_field(*arguments, **options) * (1 + 2e-6)

    monkeypatch.setattr(demo, "QUERIES", 8)
    assert check_op(digits, config)[0].worst_relative_error < 1e-6
    monkeypatch.setattr(demo.pfgm_kernels, "poisson_field", wrong)
    with pytest.raises(RuntimeError, match="expected a relative error under 1e-6"):
        check_op(digits, config)


def test_peak_memory_is_seen() -> None:
    """A hundred MiB that are gone again when the call returns."""
    peak, nothing = (
        peak_extra_memory(lambda: bytearray(b"x") * (100 << 20)),
        peak_extra_memory(lambda: None),
    )
    if peak is None or nothing is None:
        pytest.skip("this system does not let a process start its peak memory anew")
    assert 95 < peak < 130
    assert nothing < 10


@pytest.mark.exhaustive
def test_demo_leaves_what_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole demo with a network that has learned next to nothing."""
    real = TrainConfig.for_data
    tiny = {"steps": 3, "width": 16, "depth": 1}
    monkeypatch.setattr(demo.TrainConfig, "for_data", lambda *a, **k: real(*a, **k, **tiny))
    monkeypatch.setattr(demo, "SAMPLES", 400)
    monkeypatch.setattr(demo, "SOLVER_STEPS", 8)
    monkeypatch.setattr(demo, "QUERIES", 16)
    judged, lines = [], []
    evaluate, draw = demo.evaluate, figures.draw_trajectories

    def watched_evaluate(samples: torch.Tensor, *arguments: object) -> Evaluation:
        judged.append(samples)
        return evaluate(samples, *arguments)

    def watched_draw(*arguments: object) -> None:
        lines.append(arguments)
        draw(*arguments)

    monkeypatch.setattr(demo, "evaluate", watched_evaluate)
    monkeypatch.setattr(figures, "draw_trajectories", watched_draw)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("left by an earlier demo")
    (tmp_path / "run" / "checkpoints" / "more").mkdir(parents=True)
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="run is in use"):
        demo.run(tmp_path)
    assert (tmp_path / "run" / "config.yaml").read_text() == "left by an earlier demo"
    with locked(tmp_path), pytest.raises(ValueError, match=f"{tmp_path} is in use"):
        demo.run(tmp_path)
    assert demo.run(tmp_path)
    assert not (tmp_path / "run" / "checkpoints" / "more").exists()
    assert judged[0].abs().max() == 1  # samples end at the data's range
    swiss_roll, points, digits, _ = lines[0]
    generator = torch.Generator().manual_seed(demo.SEED)
    assert torch.equal(swiss_roll.path[0], sample_prior(450, (2,), T=8.0, generator=generator))
    assert swiss_roll.times[0] == 8
    assert torch.equal(points, data.load("swiss_roll").train)
    assert digits.path.shape[1:] == (10, 8, 8)
    for name in ("samples.png", "loss.png", "trajectories.png"):
        assert 5_000 < (tmp_path / name).stat().st_size < 300_000
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["samples"] == 400
    assert metrics["nfe"] == 17
    share = read_stats(tmp_path / "run" / "stats.jsonl")[-1]["targets_share"]
    assert 0 < metrics["targets_share"] < 1
    assert metrics["targets_share"] == share  # of three steps one is reported
    assert f"all 1437 digits took {share:.1%} of a training step" in capsys.readouterr().out
    assert metrics["held_out_accuracy"] >= 0.97
    assert metrics["sample"]["frechet_distance"] > metrics["held_out"]["frechet_distance"]
    assert sum(metrics["class_shares"]) == pytest.approx(1)
    assert [item["name"] for item in metrics["op"]] == ["poisson_field", "published formula"]
    assert set(metrics["seconds"]) == {"check", "train", "sample", "evaluate", "draw"}


def test_an_interrupted_training_ends_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "QUERIES", 4)
    monkeypatch.setattr(demo, "train", lambda *a, **k: Run([], 0, finished=False, seconds=1.0))
    monkeypatch.setattr(demo, "Sampler", None)
    assert not demo.run(tmp_path)


SAMPLE, HELD_OUT = (
    Quality(
        frechet_distance=distance,
        precision=0.5,
        recall=0.5,
        inception_score=5.0,
        inception_score_deviation=0.5,
        copies_share=copies,
        copies_interval=(0.0, 1.0),
        top_probability=top,
    )
    for distance, copies, top in ((42.25, 0.25, 0.51), (3.5, 0.005, 0.96))
)
EVALUATION = Evaluation(
    features="perceptron",
    feature_count=128,
    samples=200,
    count=180,
    frechet_distance_of_all=40.0,
    sample=SAMPLE,
    held_out=HELD_OUT,
    classes=[0] * 30 + [2] * 170,
    class_shares=[0.15, 0.0, 0.85],
    held_out_class_shares=[0.3, 0.3, 0.4],
    held_out_accuracy=0.97,
    nearest=[0] * 200,
    nearest_ratio=[0.9] * 200,
)


def test_each_figure_stands_in_its_column() -> None:
    text = io.StringIO()
    Console(file=text, width=100).print(demo._summary(EVALUATION, nfe=61))
    lines = [re.sub(r"[│┃ ]+", " ", line).strip() for line in text.getvalue().splitlines()]
    for line in (
        "200 samples, 61 NFE",
        "mean top probability 0.510 0.960",
        "Fréchet distance 42.25 3.50",
        "shares of the classes 0.0% … 85.0%",
        "copies of training digits 25.0% 0.5%",
        "accuracy of the classifier 97.0%",
    ):
        assert line in lines


def test_pictures_are_sorted_by_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ten of each class in a row, of samples and of held-out digits; blank where they are fewer."""
    digits, shown = data.load("digits"), []
    monkeypatch.setattr(figures, "draw_comparison", lambda *arguments: shown.extend(arguments))
    for name in ("draw_loss", "draw_trajectories"):
        monkeypatch.setattr(figures, name, lambda *arguments: None)
    monkeypatch.setattr(demo, "sample", lambda *arguments, **options: None)
    x = torch.arange(200.0)[:, None, None].expand(-1, 8, 8)
    path = Trajectory(x, 0, [1.0, 0.0], torch.stack([x, x]))
    demo._draw(tmp_path, digits, path, EVALUATION, [1.0])
    samples, real, _ = shown
    assert samples[:, 0, 0].tolist() == [*range(10), *[-1] * 10, *range(30, 40), *[-1] * 70]
    labels = {
        image.numpy().tobytes(): label
        for image, label in zip(
            digits.decode(digits.held_out), digits.held_out_labels.tolist(), strict=True
        )
    }
    assert [labels[image.numpy().tobytes()] for image in real] == [i // 10 for i in range(100)]


def test_tile_puts_images_in_rows() -> None:
    """Three grey images in two columns: ink is dark, the fourth place is blank."""
    images = torch.stack([torch.full((2, 3), value) for value in (1.0, -1.0, 0.0)])
    size, border = figures.PIXELS_PER_PIXEL, 3
    picture = figures.tile(images, columns=2)
    height, width = 2 * size + 2 * border, 3 * size + 2 * border
    assert picture.shape == (2 * height, 2 * width, 3)
    centers = picture[height // 2 :: height, width // 2 :: width]
    assert (centers == np.array([[0.0, 1.0], [0.5, 1.0]])[:, :, None]).all()
    assert (picture[:border] == 1).all()
    with pytest.raises(ValueError, match=r"got \(4, 2\)"):
        figures.tile(torch.zeros(4, 2), columns=2)
