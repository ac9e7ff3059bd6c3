# SPDX-License-Identifier: Apache-2.0
"""Are held-out data as likely as the flow says, and does `pfgm likelihood` say so?"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import pfgm
from rich.console import Console
from torch import Tensor

from pfgm_kernels import log_density, poisson_field
from pfgm_kernels.training import data
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.likelihood import likelihood, with_noise

QUIET = Console(quiet=True)


def test_the_exact_field_of_points() -> None:
    """Its flow has the density of the data set, in closed form; each point is of its class."""
    moons = data.load("two_moons")
    for D, conditional in ((1.0, False), (9.0, True)):
        config = replace(TrainConfig.for_data(moons, D=D, conditional=conditional), T=500.0)
        references = moons.references_by_class() if conditional else moons.references

        def field(x: Tensor, t: Tensor, references: Any = references, **labels: Tensor) -> Tensor:
            return poisson_field(x, t, references, D=len(labels) * 8 + 1, **labels)

        options: dict[str, Any] = {"sigma_min": 0.1, "rtol": 1e-3, "exact": True, "console": QUIET}
        found = likelihood(field, config, moons, 4, batch=3, **options)
        labels = {"labels": moons.held_out_labels[found.rows]} if conditional else {}
        x = moons.held_out[found.rows]
        expected = log_density(x, 0.1 * D**0.5, references, D=D, **labels)
        assert len({*found.rows.tolist()}) == 4
        torch.testing.assert_close(found.log_p, expected, rtol=0, atol=0.01)
        torch.testing.assert_close(found.bits, -found.log_p / (2 * math.log(2)))
        assert found.mean == pytest.approx(found.bits.mean().item())
        assert found.error == pytest.approx(found.bits.std().item() / 4**0.5)


def test_bits_of_images() -> None:
    """A field whose flow is that of a Gaussian, and the steps of 8 bits, whatever their range."""
    digits = replace(data.load("digits"), low=0.0, high=2.0)
    config = TrainConfig.for_data(digits, D=math.inf, method="pfgmpp", T=500.0)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:  # the posterior mean of N(0, 3²)
        return x * (9 / (9 + t * t))[:, None, None]

    options: dict[str, Any] = {"sigma_min": 0.01, "rtol": 1e-5, "console": QUIET}
    config = replace(config, predicts="denoiser")
    found = likelihood(denoiser, config, digits, 40, **options)
    again = likelihood(denoiser, config, digits, 40, **options)
    other = likelihood(denoiser, config, digits, 40, **options, seed=1)
    assert torch.equal(again.log_p, found.log_p)
    assert other.rows.tolist() != found.rows.tolist()
    variance = 9 + 0.01**2
    clean = digits.decode(digits.held_out[found.rows]).double().flatten(1)
    nats = (clean.square() / variance + math.log(2 * math.pi * variance)).sum(1) / 2
    bits = nats / (64 * math.log(2)) - math.log2(2 / 255)
    torch.testing.assert_close(found.bits, bits, rtol=0, atol=2e-3)


def test_noise_fills_the_steps() -> None:
    digits = data.load("digits")
    images = torch.arange(256, dtype=torch.uint8).repeat(64, 1)[:, :64].reshape(64, 8, 8)
    x = with_noise(digits, images, torch.Generator().manual_seed(0))
    offset = (x.double() - digits.decode(images).double()) / (2 / 255)
    assert -0.5001 < offset.min() < -0.49
    assert 0.49 < offset.max() < 0.5001
    assert offset.mean().abs() < 0.02
    points = torch.randn(5, 2)
    assert with_noise(data.load("two_moons"), points, torch.Generator()) is points


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    options = ("--steps", 4, "width=16", "depth=1", "checkpoint_every=2", "--conditional")
    assert pfgm("train", "--data", "digits", "--out", folder, *options).exit_code == 0
    return folder


def test_the_command(run: Path, tmp_path: Path) -> None:
    quick = ("likelihood", "--model", run, "--rtol", 0.05, "--sigma-min", 0.1)
    out = tmp_path / "new" / "bits.json"
    result = pfgm(*quick, "--count", 12, "--batch", 5, "--seed", 3, "--out", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    each = torch.tensor(found["bits_per_dim_of_each"], dtype=torch.float64)
    mean, error = each.mean().item(), each.std().item() / 12**0.5
    assert f"{mean:.4g} ± {error:.2g} bits per dimension of 12 held-out" in result.stdout
    assert str(out) in result.stdout
    assert (found["count"], len(found["rows"])) == (12, 12)
    assert found["bits_per_dim"] == pytest.approx(mean)
    assert found["standard_error"] == pytest.approx(error)
    source = {"model": str(run), "data": "digits", "sigma_min": 0.1, "rtol": 0.05, "seed": 3}
    assert found["source"] == found["source"] | source
    one = pfgm(*quick, "--count", 1, "--step", 2)
    assert one.exit_code == 0, one.output
    assert "bits per dimension of 1 held-out" in one.stdout
    assert "±" not in one.stdout


def test_what_is_refused(run: Path, tmp_path: Path) -> None:
    for options, expected in (
        (("--data", "two_moons"), "data expects images of shape (8, 8), as the run's are, got po"),
        (("--count", 0), "count expects an integer ≥ 1, got 0"),
        (("--batch", 0), "batch expects an integer ≥ 1, got 0"),
        (("--sigma-min", 0), "sigma_min expects a finite number > 0"),
        (("--rtol", 0), "rtol expects a finite number > 0"),
        (("--step", 3), "expected one of 4, 2"),
    ):
        result = pfgm("likelihood", "--model", run, "--out", tmp_path / "x.json", *options)
        assert result.exit_code == 2
        assert expected in result.stderr
        assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
    digits = data.load("digits")
    config = TrainConfig.for_data(digits, conditional=True)
    options: dict[str, Any] = {"sigma_min": 0.1, "rtol": 0.1, "console": QUIET}
    with pytest.raises(ValueError, match="data expects labels from 0 to 9, got others or none"):
        likelihood(config.model(), config, replace(digits, held_out_labels=None), 5, **options)
    with pytest.raises(ValueError, match="data expects some held out, got none of digits"):
        likelihood(config.model(), config, replace(digits, held_out=digits.train[:0]), 5, **options)
