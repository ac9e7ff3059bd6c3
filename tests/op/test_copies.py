# SPDX-License-Identifier: Apache-2.0
"""Are references of which there are many copies noticed, wherever the copies lie?

Their products round alike, so that no sum averages that out.
"""

from __future__ import annotations

import pytest
import torch
from cases import seeded
from oracle import assert_displacement, assert_log_mass, float32_contract, solve


@pytest.mark.parametrize(
    ("d", "distance", "D", "height"),
    [(8, 0.3, 1000, 10), (32, 3.3, 60, 1), (40, 3.3, 300, 1), (150, 3.3, 60, 1), (300, 0.3, 60, 3)],
)
@pytest.mark.parametrize("jitter", [0.0, 1e-7])
def test_copies_in_every_other_row(backend, d, distance, D, height, jitter):
    """A sample of every other row sees none of them."""
    x0 = torch.randn(2048, d, generator=seeded())
    rows = 1 + 2 * torch.randperm(1024, generator=seeded(1))[:900]
    noise = jitter * torch.randn(900, d, generator=seeded(2))
    x0[rows] = x0[rows[0]] * (1 + noise)
    x = x0[rows[:1]] + distance * torch.randn(4, d, generator=seeded(10))
    t = height * (x - x0[rows[0]]).norm(dim=1)
    truth = solve(x, t, x0, D)
    v, log_mass = backend.displacement(x, t, x0, D=D)
    assert_displacement(v, truth, float32_contract(backend.name))
    assert_log_mass(log_mass, truth)


def test_copies_among_very_many(backend):
    """Fewer than one in 128, which would be many whatever the copies."""
    x0 = torch.randn(9000, 40, generator=seeded())
    x0[torch.randperm(9000, generator=seeded(1))[:70]] = x0[0].clone()
    x = x0[:1] + torch.randn(4, 40, generator=seeded(10))
    t = 3 * (x - x0[0]).norm(dim=1)
    truth = solve(x, t, x0, 300)
    v, log_mass = backend.displacement(x, t, x0, D=300)
    assert_displacement(v, truth, float32_contract(backend.name))
    assert_log_mass(log_mass, truth)
