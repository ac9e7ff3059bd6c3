# SPDX-License-Identifier: Apache-2.0
"""Does a random search find a problem that misses the contract?

Ten seeds of 2,000 problems each: --hypothesis-profile=thorough; a hundredth of that where kernels
are interpreted or emulated.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import settings
from oracle import differentiate, one_thread, solve
from search import draw, expected, misses, problems

from pfgm_kernels import poisson_displacement, poisson_field

THOROUGH = settings().max_examples > 1000
SEEDS, PROBLEMS = (10, 2000) if THOROUGH else (1, 200)
SHARE_OF_SLOW = 100


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_problem_misses(backend, seed):
    count = PROBLEMS // SHARE_OF_SLOW if backend.interpreted else PROBLEMS
    found = []
    for i, problem in enumerate(problems(seed, count)):
        if backend.reason() is None:
            found += [f"{i}: {problem.name}: {miss}" for miss in misses(backend, problem)]
    assert not found, f"{len(found)} misses of seed {seed}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("seed", "number", "on_gpus"), [(21, 624, False), (71, 155, False), (0, 1, True)]
)
def test_a_problem_that_missed_once(backend, seed, number, on_gpus):
    """Of longer searches, and of one while many references with one copy each were not seen."""
    if backend.interpreted and not on_gpus:
        pytest.skip("kernels of the CPU missed, and a call of these takes seconds")
    with one_thread():  # so that the references are in one part
        assert not misses(backend, draw(np.random.default_rng((seed, number))))


def test_the_search_sees_a_miss():
    """Of v and log_mass that have float32's digits only, and of a field that points elsewhere."""

    class Coarse:
        name = "eager"

        def displacement(self, x, t, x0, D):
            v, log_mass = poisson_displacement(x, t, x0, D=D, backend="eager")
            return v * (1 + 3e-5), log_mass + 3e-6

        def field(self, x, t, x0, D):
            return poisson_field(x, t, x0, D=D, backend="eager").roll(1, 1)

    problem = next(p for p in problems(0, 100) if p.D == 1 and len(p.x0) > 50)
    seen = " ".join(misses(Coarse(), problem))
    for name in ("displacement", "log mass", "field", "gradient of x"):
        assert name in seen


@pytest.mark.parametrize("D", [2.5, math.inf])
def test_the_search_agrees_with_the_oracle(D):
    problem = next(p for p in problems(1, 1000) if p.x.shape[1] < 64 and p.D == D)
    truth = solve(problem.x, problem.t, problem.values, D)
    gradients = differentiate(truth, problem.x, problem.values, problem.g_v, problem.g_m, D)
    ours = expected(problem, "eager")
    for name, value in {
        "displacement": truth.v,
        "log mass": truth.log_mass,
        "field": truth.field(),
        "gradient of x": gradients.dx,
        "gradient of t": gradients.dt,
        "gradient of x0": gradients.dx0,
    }.items():
        error = (torch.from_numpy(ours[name].value) - value).reshape(len(value), -1).norm(dim=1)
        assert (error <= torch.from_numpy(ours[name].allowed)).all(), name
