# SPDX-License-Identifier: Apache-2.0
"""Is the field of two plates the published target, and does it carry one plate to the other?"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pfgm_kernels import ReferenceSet, poisson_field
from pfgm_kernels.flow import sample, two_plate_field


def published(x: Tensor, t: Tensor, p: Tensor, q: Tensor, L: float, gamma: float) -> Tensor:
    """The target of Kolesov et al. 2025 in float64, their code's way: in d + 1 dimensions with the
    plates at 0 and L, powers of distances, each plate's sum normalised; here t comes last.
    """
    points = torch.cat([x, t[:, None]], 1).double()

    def toward(plate: Tensor, height: float) -> Tensor:
        sources = torch.cat([plate, torch.full((len(plate), 1), height)], 1).double()
        differences = sources - points[:, None]
        distances = differences.norm(dim=2)
        weights = (distances.amin(1, keepdim=True) / distances) ** points.shape[1]
        vector = ((weights / weights.sum(1, keepdim=True))[:, :, None] * differences).sum(1)
        return math.sqrt(points.shape[1]) * vector / (vector.norm(dim=1, keepdim=True) + gamma)

    return toward(q, L) - toward(p, 0.0)


def inputs(d: int, L: float, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(d)
    p, q, x = (torch.randn(n, d, dtype=dtype, generator=generator) for n in (30, 40, 12))
    return [x, L * torch.linspace(0.05, 0.95, 12, dtype=dtype), p, 1 + 2 * q]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize(("d", "L"), [(2, 6.0), (40, 60.0), (3072, 500.0)])
def test_the_published_target(d, L, gamma, dtype, tolerance):
    x, t, p, q = inputs(d, L, dtype)
    expected = published(x, t, p, q, L, gamma)
    for references in ((p, q), (ReferenceSet(p), ReferenceSet(q))):
        found = two_plate_field(x, t, *references, L=L, gamma=gamma, scale=math.sqrt(d + 1))
        assert found.dtype == dtype
        error = (found.double() - expected).norm(dim=1) / expected.norm(dim=1)
        assert error.max() < tolerance


def test_gradients():
    x, t, p, q = (a[:5].requires_grad_() for a in inputs(3, 8.0, torch.float64))
    arguments = {"L": 8.0, "gamma": 0.5, "scale": 2.0}
    assert torch.autograd.gradcheck(
        lambda *a: two_plate_field(*a, **arguments), (x, t, p, q), check_forward_ad=True
    )


def test_one_charge_on_each_plate():
    """By hand, halfway: the vectors toward q and away from p are one and the same."""
    p, q = torch.zeros(1, 1), torch.tensor([[6.0]])
    field = two_plate_field(torch.tensor([[3.0]]), 4.0, p, q, L=8.0)
    torch.testing.assert_close(field, torch.tensor([[1.2, 1.6]]))


@pytest.mark.parametrize("D", [1, 128, math.inf])
def test_options(D):
    """A plate that is out of reach leaves the other's field, with the same D, event and backend."""
    x, t, p, q = (a.view(-1, 2, 2) if a.dim() == 2 else a for a in inputs(4, 5.0, torch.float64))
    options = {"D": D, "gamma": 1e-3, "scale": 3.0, "backend": "eager"}
    found = two_plate_field(x, t, p, q, L=5.0, **options)
    expected = poisson_field(x, t - 5, q, **options) - poisson_field(x, t, p, **options)
    assert found.equal(expected)
    assert (found[:, -1] > 0).all()
    torch.testing.assert_close(
        two_plate_field(x, 2.0, p, q, L=5.0, **options),
        two_plate_field(x, torch.full_like(t, 2.0), p, q, L=5.0, **options),
    )


def test_lines_lead_from_one_plate_to_the_other():
    """A sampler that starts on q ends on p: of two charges each, on the one that faces its own."""
    p = torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    q = p + torch.tensor([0.5, 1.0])
    start = q.repeat_interleave(3, 0) + 1e-2 * torch.randn(
        6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    trajectory = sample(
        lambda x, t: two_plate_field(x, t, p, q, L=3.0), start, T=2.99, t_min=1e-3, steps=400
    )
    assert (trajectory.x - p.repeat_interleave(3, 0)).norm(dim=1).max() < 0.1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"L": 0}, ValueError, "L expects a finite number > 0, got 0"),
        ({"L": math.inf}, ValueError, "L expects a finite number > 0, got inf"),
        ({"L": "5"}, TypeError, "L expects a real number, got str"),
        ({"t": "1"}, TypeError, "t expects a real number, got str"),
        ({"q": torch.ones(4, 3)}, ValueError, r"x expects shape .*\(3,\) as in x0, got \(2, 2\)"),
        ({"gamma": -1}, ValueError, "gamma expects a finite number ≥ 0, got -1"),
    ],
)
def test_refusals(arguments, error, message):
    good = {"x": torch.ones(2, 2), "t": 1.0, "p": torch.ones(3, 2), "q": torch.ones(4, 2), "L": 3.0}
    with pytest.raises(error, match=message):
        two_plate_field(**good | arguments)
