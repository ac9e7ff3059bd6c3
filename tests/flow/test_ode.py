# SPDX-License-Identifier: Apache-2.0
"""Do the solvers integrate Eq. (4), to their order and with the evaluations they state?"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pfgm_kernels import poisson_field
from pfgm_kernels.flow import Substitution, encode, sample, sample_prior

SOLVERS = ("euler", "heun", "heun_euler", "rk45")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def sources(count: int, d: int) -> Tensor:
    return torch.randn(count, d, dtype=torch.float64, generator=seeded())


def exact_field(x0: Tensor):
    """Eq. (12)'s field by direct differences in float64: the oracle's closed form."""

    def field(x: Tensor, t: Tensor) -> Tensor:
        difference = torch.cat([x0 - x[:, None], -t[:, None, None].expand(-1, len(x0), 1)], 2)
        logits = -(x.shape[1] + 1) / 2 * difference.square().sum(2).log()
        mean = (logits.softmax(1)[:, :, None] * difference).sum(1)
        return mean / mean.norm(dim=1, keepdim=True)

    return field


class Counted:
    def __init__(self, field) -> None:
        self.field, self.calls = field, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        assert not torch.is_grad_enabled()
        assert t.shape == x.shape[:1]
        assert t.dtype == x.dtype
        return self.field(x, t)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("event", [(2,), pytest.param((1, 3, 3), marks=pytest.mark.exhaustive)])
def test_one_source_is_reached_exactly(solver, event):
    x0 = sources(1, math.prod(event)).view(1, *event)
    x = sample_prior(50, event, T=40, max_radius=400, generator=seeded(), dtype=torch.float64)
    options = {"solver": solver, "steps": 3, "rtol": 1e-7}

    def field(x: Tensor, t: Tensor) -> Tensor:
        return poisson_field(x, t, x0)

    # Field lines are straight: at t_min a share t_min / T of the way is left.
    share = 0.5 / 40
    stopped = sample(field, x, T=40, t_min=0.5, final_step=False, **options).x
    tolerance = 1e-5 if solver == "rk45" else 1e-11
    assert (stopped - (x0 + share * (x - x0))).abs().max() <= tolerance
    ended = sample(field, x, T=40, t_min=0.5, **options).x
    assert (ended - x0).abs().max() <= 1e-11  # the final step is one to the posterior mean
    back = encode(field, stopped, T=40, t_min=0.5, **options).x
    assert (back - x).abs().max() <= 80 * tolerance


@pytest.mark.parametrize(
    ("solver", "steps", "final_step", "nfe"),
    [
        ("euler", 1, False, 1),
        ("euler", 7, True, 8),
        ("heun", 7, False, 14),
        ("heun", 7, True, 15),
        ("heun_euler", 7, False, 13),
        ("heun_euler", 1, True, 2),
        ("rk45", 7, False, None),
        ("rk45", 7, True, None),
    ],
)
def test_evaluations_are_counted(solver, steps, final_step, nfe):
    field = Counted(exact_field(sources(5, 2)))
    x = sample_prior(9, (2,), T=10, generator=seeded(), dtype=torch.float64)
    trajectory = sample(field, x, T=10, solver=solver, steps=steps, final_step=final_step)
    assert trajectory.nfe == field.calls
    assert trajectory.nfe == (nfe or field.calls)
    assert trajectory.nfe > 1 or steps == 1
    assert trajectory.path is None


@pytest.mark.parametrize("solver", SOLVERS)
def test_times_path_and_progress_tell_the_same_story(solver):
    field = exact_field(sources(5, 2))
    x = sample_prior(9, (2,), T=10, generator=seeded(), dtype=torch.float64)
    fractions: list[float] = []
    options = {"T": 10, "t_min": 0.01, "solver": solver, "steps": 6, "keep_path": True}
    down = sample(field, x, progress=fractions.append, **options)
    assert down.path.shape == (len(down.times), 9, 2)
    assert down.times[0] == 10
    assert down.times[-2:] == [0.01, 0.0]
    assert down.times == sorted(down.times, reverse=True)
    assert torch.equal(down.path[0], x)
    assert torch.equal(down.path[-1], down.x)
    assert len(fractions) == len(down.times)
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert fractions[-1] == 1
    if solver != "rk45":
        ratios = [later / t for t, later in zip(down.times[:-2], down.times[1:-1], strict=True)]
        assert ratios == pytest.approx([1e-3 ** (1 / 6)] * 6)

    up = encode(field, down.path[-2], **options)
    assert up.times[0] == 0.01
    assert up.times[-1] == 10
    assert up.times == sorted(up.times)
    assert torch.equal(up.path[-1], up.x)


@pytest.mark.exhaustive
def test_errors_fall_with_the_order_of_the_solver():
    # On [0.1, T], where the field of several sources is smooth; errors against a fine rk45.
    field = exact_field(sources(7, 3))
    x = sample_prior(64, (3,), T=10, max_radius=50, generator=seeded(), dtype=torch.float64)
    interval = {"T": 10, "t_min": 0.1, "final_step": False}
    truth = sample(field, x, rtol=1e-9, **interval).x
    for solver, order in (("euler", 1), ("heun", 2)):
        # The median: where a line passes close to a separatrix the limit sets in at finer steps.
        errors = [
            (sample(field, x, solver=solver, steps=n, **interval).x - truth).norm(dim=1).median()
            for n in (80, 160, 320)
        ]
        observed = [math.log2(a / b) for a, b in pairwise(errors)]
        assert observed == pytest.approx([order] * 2, abs=0.1)
    assert errors[-1] > 1e-7  # so that the truth is the finer one


def test_the_step_of_rk45_follows_the_worst_sample():
    field = exact_field(sources(7, 3))
    x = sample_prior(32, (3,), T=10, max_radius=50, generator=seeded(), dtype=torch.float64)
    interval = {"T": 10, "t_min": 0.1, "final_step": False}
    truth = sample(field, x, rtol=1e-9, **interval)
    coarse = sample(field, x, rtol=1e-5, **interval)
    assert 1e-7 < (coarse.x - truth.x).abs().max() < 2e-3
    assert coarse.nfe < truth.nfe / 3
    # Copies of the easiest sample, which a mean over the batch would let dilute the others' error.
    alone = [sample(field, row[None], rtol=1e-5, **interval).nfe for row in x]
    easiest = x[alone.index(min(alone))].expand(500, 3)
    diluted = sample(field, torch.cat([x, easiest]), rtol=1e-5, **interval)
    assert coarse.nfe > min(alone)
    assert diluted.nfe == coarse.nfe
    torch.testing.assert_close(diluted.x[:32], coarse.x, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("count", "d"), [(12, 2), (60, 2), (40, 64)])
def test_encode_after_sample_returns_the_latent(count, d):
    x0 = 0.5 * sources(count, d)
    T = 40.0
    x = sample_prior(60, (d,), T=T, generator=seeded(), dtype=torch.float64)
    x = x[x.norm(dim=1) <= 10 * T]
    assert len(x) > 15
    options = {"T": T, "t_min": 1e-2, "rtol": 1e-6}

    def field(x: Tensor, t: Tensor) -> Tensor:
        return poisson_field(x, t, x0)

    data = sample(field, x, final_step=False, **options).x
    assert (data[:, None] - x0).norm(dim=2).min(1).values.max() < 0.2  # it did go to the data
    latent = encode(field, data, **options).x
    assert ((latent - x).norm(dim=1) / x.norm(dim=1)).max() < 1e-3


@pytest.mark.parametrize("solver", [None, "rk45"])
@pytest.mark.parametrize("offset", [0.0, 1e-12, 1e-9])
def test_encode_starts_from_a_data_point(offset, solver):
    x0 = sources(5, 2)
    trajectory = encode(exact_field(x0), x0 + offset, T=40, t_min=1e-2, solver=solver)
    assert torch.isfinite(trajectory.x).all()
    # On a source of several, the line goes straight up at first, then bends away from the others.
    assert trajectory.x.norm(dim=1).max() < 40 * 40


def test_float32_keeps_its_dtype_and_follows_float64():
    x0 = sources(6, 4)
    x = sample_prior(30, (4,), T=10, max_radius=40, generator=seeded(), dtype=torch.float64)
    for solver in SOLVERS:
        options = {"T": 10, "solver": solver, "steps": 25}
        wide = sample(lambda x, t: poisson_field(x, t, x0), x, **options).x
        narrow = sample(lambda x, t: poisson_field(x, t, x0.float()), x.float(), **options).x
        assert narrow.dtype == torch.float32
        # The few lines next to a separatrix may part.
        assert ((narrow - wide).norm(dim=1) < 1e-2).double().mean() > 0.9


def network_field(x0: Tensor, gamma: float):
    """What a network learns with `FieldLoss`'s default scale, on data in [-1, 1]^d."""
    scale = math.sqrt(x0.shape[1])
    return lambda x, t: poisson_field(x, t, x0, gamma=gamma, scale=scale)


@pytest.mark.parametrize("gamma", [0.1, 5.0])
@pytest.mark.parametrize("d", [1, 2, 64])
def test_the_substitution_is_the_identity_on_the_exact_field(d, gamma):
    x0 = sources(10, d).clamp(-1, 1)
    field, substitution = network_field(x0, gamma), Substitution(gamma, below=5.0)
    for t in (4.9, 0.3, 1e-2):
        x = x0 + 3 * t * sources(10, d)
        values = field(x, torch.full((10,), t, dtype=torch.float64))
        result = substitution.t_component(
            x, torch.full((10,), t, dtype=torch.float64), values[:, :-1]
        )
        torch.testing.assert_close(result, values[:, -1], rtol=1e-8, atol=0)


def test_the_substitution_replaces_a_wrong_component_at_small_t():
    x0 = sources(10, 8).clamp(-1, 1)
    x = sample_prior(20, (8,), T=40, max_radius=400, generator=seeded(), dtype=torch.float64)
    exact = network_field(x0, 5.0)

    def network(x: Tensor, t: Tensor) -> Tensor:
        wrong = 0.5 * (t < 1)  # relative to its size, as small as the component is there
        return torch.cat([exact(x, t)[:, :-1], (exact(x, t)[:, -1] * (1 + wrong))[:, None]], 1)

    options = {"T": 40, "t_min": 0.05, "solver": "heun", "steps": 40, "final_step": False}
    truth = sample(exact, x, **options)
    cured = sample(network, x, substitution=Substitution(5.0, below=1.0), **options)
    assert cured.nfe == truth.nfe
    torch.testing.assert_close(cured.x, truth.x, rtol=1e-7, atol=1e-7)
    partly = sample(network, x, substitution=Substitution(5.0, below=0.1), **options)
    assert (partly.x - truth.x).abs().max() > 1e-4


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_substitution_survives_a_network_that_overshoots(solver):
    x0 = sources(10, 8).clamp(-1, 1)
    x = sample_prior(20, (8,), T=40, max_radius=400, generator=seeded(), dtype=torch.float64)
    exact = network_field(x0, 0.1)

    def network(x: Tensor, t: Tensor) -> Tensor:
        factor = torch.where(torch.arange(len(x)) % 2 == 0, 1.3, 1.0)
        return exact(x, t) * factor[:, None]

    assert (network(x, torch.ones(20, dtype=torch.float64))[::2, :-1].norm(dim=1) > 8**0.5).all()
    substitution = Substitution(0.1, below=5.0)
    result = sample(network, x, T=40, solver=solver, substitution=substitution).x
    truth = sample(exact, x, T=40, solver=solver).x
    # The rows that do not overshoot are right, the others stay near the data all the same.
    torch.testing.assert_close(result[1::2], truth[1::2], rtol=0, atol=1e-2)
    assert (result[::2].norm(dim=1) < 3 * 8**0.5).all()


def test_the_guard_gives_the_right_sign_and_a_bounded_slope():
    substitution = Substitution(5.0, below=1.0)
    x = torch.zeros(4, 2, dtype=torch.float64)
    n = torch.tensor([1 - 1e-15, 1.0, 1.5, 1e200], dtype=torch.float64)
    field_x = n[:, None] * torch.tensor([[math.sqrt(2), 0.0]])
    result = substitution.t_component(x, 0.5, field_x)
    # R is at most √((‖x‖ + √d)² + t²) = 1.5 here.
    torch.testing.assert_close(result, torch.full_like(n, -math.sqrt(2) * 0.5 / 6.5))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda values: values * float("nan"), "2 of 3 samples: the field is NaN or Inf there"),
        (lambda values: values * 0, "2 of 3 samples: F_t is 0, or nearly there"),
    ],
)
def test_a_field_that_breaks_down_is_reported(solver, bad, message):
    exact = exact_field(sources(3, 2))

    def field(x: Tensor, t: Tensor) -> Tensor:
        values = exact(x, t)
        return torch.cat([values[:1], torch.where(t[1:, None] < 1, bad(values[1:]), values[1:])])

    x = sources(3, 2)
    with pytest.raises(FloatingPointError, match=message):
        sample(field, x, T=10, solver=solver)


def test_rk45_gives_up_where_it_cannot_go_on(monkeypatch):
    def explosive(x: Tensor, t: Tensor) -> Tensor:  # dx/dlog t = −x²: infinite at log t = log T − 1
        return torch.cat([x.square(), -t[:, None]], 1)

    x = torch.ones(2, 1, dtype=torch.float64)
    message = r"rk45 does not get forward at t = 3.67\d*, after \d+ steps.*larger rtol"
    with pytest.raises(RuntimeError, match=message):
        sample(explosive, x, T=10, solver="rk45")
    monkeypatch.setattr("pfgm_kernels.flow.solvers.MAX_ADAPTIVE_STEPS", 12)
    with pytest.raises(RuntimeError, match="after 13 steps"):
        sample(explosive, x, T=10, solver="rk45")


@pytest.mark.parametrize("integrate", [sample, encode])
def test_the_default_solver_is_heun_and_rk45_where_a_tolerance_is_given(integrate):
    field, x = exact_field(sources(3, 2)), sources(3, 2)
    default = integrate(field, x, T=10)
    assert torch.equal(default.x, integrate(field, x, T=10, solver="heun").x)
    adaptive = integrate(field, x, T=10, solver="rk45").x
    for options in ({"rtol": 1e-4}, {"atol": 1e-4}):
        assert torch.equal(integrate(field, x, T=10, **options).x, adaptive)


def test_the_default_solver_reaches_the_data():
    """And `encode` comes back from there."""
    x0 = sources(7, 3)
    x = sample_prior(32, (3,), T=40, max_radius=200, generator=seeded(), dtype=torch.float64)
    assert (sample(exact_field(x0), x, T=40).x[:, None] - x0).norm(dim=2).min(1).values.max() < 1e-2
    data = sample(exact_field(x0), x, T=40, t_min=0.1, final_step=False).x
    latent = encode(exact_field(x0), data, T=40, t_min=0.1).x
    assert ((latent - x).norm(dim=1) / x.norm(dim=1)).median() < 1e-2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"T": 1e-3}, ValueError, "T expects a number > t_min = 0.001, got 0.001"),
        ({"T": math.inf}, ValueError, "T expects a finite number > 0, got inf"),
        ({"t_min": 0}, ValueError, "t_min expects a finite number > 0, got 0"),
        (
            {"solver": "rk4"},
            ValueError,
            "solver expects one of euler, heun, heun_euler, rk45, got 'rk4'",
        ),
        ({"solver": "heun", "steps": 0}, ValueError, "steps expects an integer ≥ 1, got 0"),
        ({"solver": "heun", "steps": 2.0}, TypeError, "steps expects an integer, got float"),
        ({"rtol": 0}, ValueError, "rtol expects a finite number > 0, got 0"),
        ({"atol": -1}, ValueError, "atol expects a finite number > 0, got -1"),
        ({"substitution": (5, 1)}, TypeError, "substitution expects a Substitution or None"),
        ({"x": torch.zeros(3)}, ValueError, r"x expects shape \(B, \*event\).*got \(3,\)"),
        ({"x": torch.zeros(0, 2)}, ValueError, r"x expects shape \(B, \*event\).*got \(0, 2\)"),
        ({"x": torch.zeros(3, 2).half()}, TypeError, "x expects a float32 or float64 tensor"),
        ({"x": torch.full((3, 2), math.nan)}, ValueError, "x expects finite values, got NaN"),
        ({"field_fn": lambda x, t: x}, ValueError, r"\(B, d \+ 1\) = \(3, 3\), got \(3, 2\)"),
        ({"field_fn": lambda x, t: None}, ValueError, r"\(3, 3\), got NoneType"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    arguments = {
        "field_fn": exact_field(sources(3, 2).float()),
        "x": torch.zeros(3, 2),
        "T": 10,
        **options,
    }
    for integrate in (sample, encode):
        with pytest.raises(error, match=message):
            integrate(**arguments)


def test_a_substitution_checks_its_constants():
    with pytest.raises(ValueError, match="gamma expects a finite number > 0, got 0"):
        Substitution(gamma=0, below=5)
    with pytest.raises(ValueError, match="below expects a finite number > 0, got -1"):
        Substitution(gamma=5, below=-1)
