# SPDX-License-Identifier: Apache-2.0
"""Does the demo measure what it says, and leave everything that it promises?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pfgm_kernels import demo, figures, poisson_field
from pfgm_kernels.demo import check_op, exact_field, peak_extra_memory, published_field
from pfgm_kernels.files import locked
from pfgm_kernels.flow import perturb
from pfgm_kernels.training import data
from pfgm_kernels.training.config import TrainConfig


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


def test_demo_leaves_what_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole demo with a network that has learned next to nothing."""
    real = TrainConfig.for_data
    tiny = {"steps": 3, "width": 16, "depth": 1}
    monkeypatch.setattr(demo.TrainConfig, "for_data", lambda *a, **k: real(*a, **k, **tiny))
    monkeypatch.setattr(demo, "SAMPLES", 400)
    monkeypatch.setattr(demo, "SOLVER_STEPS", 8)
    monkeypatch.setattr(demo, "QUERIES", 16)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("left by an earlier demo")
    (tmp_path / "run" / "checkpoints" / "more").mkdir(parents=True)
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="run is in use"):
        demo.run(tmp_path)
    assert (tmp_path / "run" / "config.json").read_text() == "left by an earlier demo"
    with locked(tmp_path), pytest.raises(ValueError, match=f"{tmp_path} is in use"):
        demo.run(tmp_path)
    assert demo.run(tmp_path)
    assert not (tmp_path / "run" / "checkpoints" / "more").exists()
    for name in ("samples.png", "loss.png", "trajectories.png"):
        assert 5_000 < (tmp_path / name).stat().st_size < 300_000
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["samples"] == 400
    assert metrics["nfe"] == 17
    assert metrics["classifier_held_out_accuracy"] >= 0.97
    assert metrics["sample_frechet_distance"] > metrics["held_out_frechet_distance"]
    assert sum(metrics["class_shares"]) == pytest.approx(1)
    assert [item["name"] for item in metrics["op"]] == ["poisson_field", "published formula"]
    assert set(metrics["seconds"]) == {"check", "train", "sample", "evaluate", "draw"}


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
