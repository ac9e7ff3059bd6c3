# SPDX-License-Identifier: Apache-2.0
"""Are samples drawn from the run's own prior, along its own ODE?"""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from torch import Tensor

from pfgm_kernels.flow import sample_prior
from pfgm_kernels.training.generate import generate
from pfgm_kernels.training.trainer import TrainConfig

CONFIG = TrainConfig(data="points", event_shape=(2, 3), M=100, gamma=1.0, T=7.0, threads=3)


def field(x: Tensor, t: Tensor) -> Tensor:
    """Of one source at 1; its lines are straight."""
    assert torch.get_num_threads() == 3
    return torch.cat([1 - x.flatten(1), -t[:, None]], 1)


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize(("solver", "steps", "nfe"), [("euler", 4, 5), ("heun", 3, 7)])
def test_the_whole_way_is_the_configs(seed: int, solver: str, steps: int, nfe: int) -> None:
    options = {"seed": seed, "solver": solver, "steps": steps, "console": Console(quiet=True)}
    result = generate(field, CONFIG, 11, keep_path=True, **options)
    generator = torch.Generator().manual_seed(seed)
    prior = sample_prior(11, (2, 3), T=7.0, generator=generator)
    assert result.path is not None
    assert torch.equal(result.path[0], prior)
    assert result.times[0] == 7.0
    assert result.nfe == nfe
    torch.testing.assert_close(result.x, torch.ones(11, 2, 3), rtol=0, atol=1e-4)
    assert generate(field, CONFIG, 11, **options).path is None
