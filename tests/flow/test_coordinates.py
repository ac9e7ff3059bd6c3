# SPDX-License-Identifier: Apache-2.0
"""Are the posterior means of flow matching and VP diffusion ours in other coordinates?"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pfgm_kernels import posterior_mean
from pfgm_kernels.flow import query_of_flow_matching, query_of_vp

S = torch.tensor([0.001, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def paths() -> dict[str, tuple]:
    """The function, and the factors of x0 and of the noise at S, as the papers have them."""
    return {
        "flow matching": (query_of_flow_matching, 1 - S, S),
        "vp": (query_of_vp, S, (1 - S * S).sqrt()),
    }


def gaussian_mean(x: Tensor, a: Tensor, b: Tensor, x0: Tensor) -> Tensor:
    """E[x0 | x] where x ~ N(a x0, b² I), in float64 by direct differences."""
    differences = x[:, None] - a[:, None, None, None] * x0
    logits = -differences.flatten(2).square().sum(2) / (2 * b[:, None] ** 2)
    return torch.einsum("bn,nij->bij", logits.softmax(1), x0)


@pytest.mark.parametrize("path", paths())
def test_the_posterior_mean_is_the_papers(path):
    function, a, b = paths()[path]
    x0 = torch.randn(40, 2, 3, dtype=torch.float64, generator=seeded())
    noise = torch.randn(5, 2, 3, dtype=torch.float64, generator=seeded())
    x = a[:, None, None] * x0[:5] + b[:, None, None] * noise
    query, t = function(x, S)
    torch.testing.assert_close(t, b / a, rtol=1e-14, atol=0)
    found = posterior_mean(query, t, x0, D=math.inf)
    torch.testing.assert_close(found, gaussian_mean(x, a, b, x0), rtol=1e-9, atol=1e-9)


def test_the_velocity_of_flow_matching():
    """u = E[ε − x0 | x] = (x − E[x0 | x]) / s, by the ODE in our coordinates: dx/dt · dt/ds."""
    x0 = torch.randn(40, 2, 3, dtype=torch.float64, generator=seeded())
    x, s = torch.randn(1, 2, 3, dtype=torch.float64, generator=seeded()), 0.4
    query, t = query_of_flow_matching(x, s)
    mean = posterior_mean(query, t, x0, D=math.inf)
    slope = (query - mean) / t.view(-1, 1, 1)
    # x = (1 − s) query(s): dx/ds = −query + (1 − s) slope dt/ds with dt/ds = 1 / (1 − s)².
    velocity = -query + slope / (1 - s)
    torch.testing.assert_close(velocity, (x - mean) / s, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [query_of_flow_matching, query_of_vp])
def test_float32_keeps_the_ends(function):
    """1 − α² and 1 − s near 1, where float32 would lose all digits of them."""
    s = torch.tensor([1e-7, 0.5, 1 - 2**-24, 0.9999])
    x, t = function(torch.ones(4, 4), s)
    assert x.dtype == t.dtype == torch.float32
    exact_x, exact_t = function(torch.ones(4, 4, dtype=torch.float64), s)
    torch.testing.assert_close(x.double(), exact_x, rtol=1e-7, atol=0)
    torch.testing.assert_close(t.double(), exact_t, rtol=1e-7, atol=0)
    if function is query_of_vp:
        assert t[2].item() == pytest.approx(math.sqrt(2 * 2**-24), rel=1e-6)
    assert function(torch.ones(4, 4).half(), s)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("function", "name"), [(query_of_flow_matching, "s"), (query_of_vp, "alpha")]
)
def test_bad_input_is_named(function, name):
    x = torch.zeros(3, 2)
    for value, error, message in (
        (0, ValueError, "expects a finite number > 0, got 0"),
        (1.0, ValueError, r"expects a number between 0 and 1, got 1\.0"),
        (math.nan, ValueError, "expects a real number, got NaN"),
        ("0.5", TypeError, "expects a real number, got str"),
        (torch.ones(2), ValueError, r"expects .* or shape \(3,\), got \(2,\)"),
    ):
        with pytest.raises(error, match=f"{name} {message}"):
            function(x, value)
    with pytest.raises(TypeError, match="x expects a tensor, got list"):
        function([[0.0]], 0.5)
