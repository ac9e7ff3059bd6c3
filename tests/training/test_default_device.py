# SPDX-License-Identifier: Apache-2.0
"""Does training give the same bits whatever torch's default device is?"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from pfgm_kernels import figures
from pfgm_kernels.training import data
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.evaluation import evaluate
from pfgm_kernels.training.generate import Sampler, Sampling
from pfgm_kernels.training.interpolation import paths
from pfgm_kernels.training.likelihood import likelihood
from pfgm_kernels.training.networks.perceptron import FieldNetwork
from pfgm_kernels.training.trainer import load_model, train


def run(folder: Path) -> Tensor:
    """Trains, resumes and draws."""
    moons = data.load("two_moons")
    config = TrainConfig.for_data(moons, steps=4, width=8, depth=1, batch_size=8, threads=1)
    quiet = Console(quiet=True)
    train(config, moons, folder, console=quiet)
    longer = TrainConfig.for_data(moons, steps=6, width=8, depth=1, batch_size=8, threads=1)
    train(longer, moons, folder, resume=True, console=quiet)
    network, config = load_model(folder)
    sampler = Sampler(network, config, Sampling(steps=2))
    (part,) = sampler.generate(range(12), quiet, keep_path=True)
    result, (rough,) = part.result, Sampler(network, config, Sampling("rk45")).generate([3], quiet)
    assert result.path is not None
    image = replace(result, path=result.path[:, :2, :, None])
    figures.draw_trajectories(result, moons.train[:50], image, folder / "trajectories.png")
    found = likelihood(network, config, moons, 3, sigma_min=0.1, rtol=0.1, console=quiet)
    way = paths(network, config, moons, (0, 1), 2, sigma_min=0.1, rtol=0.1, console=quiet)
    return torch.cat(
        [result.x, rough.result.x, way.flatten(0, 1), found.log_p[:2, None].expand(2, 2)]
    )


def test_a_run(tmp_path: Path) -> None:
    expected = run(tmp_path / "plain")
    with torch.device("meta"):
        found = run(tmp_path / "meta")
    assert torch.equal(found, expected)


def test_data_and_evaluation() -> None:
    digits = data.load("digits")
    with torch.device("meta"):
        again = data.load("digits")
        judged = evaluate(again.decode(again.held_out[:50]), again).sample
        moments = again.moments
        center = torch.zeros(2, device="cpu")
        network = FieldNetwork((2,), width=8, depth=1, gamma=1.0, center=center)
    assert torch.equal(again.train, digits.train)
    assert judged.top_probability is not None
    assert judged.top_probability > 0.9
    assert torch.equal(moments.center, digits.moments.center)
    assert {p.device.type for p in (*network.parameters(), *network.buffers())} == {"cpu"}


def test_a_sampler_under_another_device() -> None:
    """In a process of its own, where nothing has been imported on the right one before."""
    code = (
        "import torch\n"
        "from pfgm_kernels.flow import sample\n"
        "field = lambda x, t: torch.cat([-x, -t[:, None]], 1)\n"
        "x = torch.ones(3, 2)\n"
        "with torch.device('meta'): first = sample(field, x, T=2.0, solver='rk45').x\n"
        "assert torch.equal(first, sample(field, x, T=2.0, solver='rk45').x)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
