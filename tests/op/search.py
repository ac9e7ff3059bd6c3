# SPDX-License-Identifier: Apache-2.0
"""A random search for problems that miss the accuracy contract: where many distances are equal,
clusters lie far apart, references coincide, D is huge, and anything else that is valid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from oracle import CUT, FLOAT64, GRADIENT, LOG_MASS, float32_contract
from torch import Tensor

from pfgm_kernels import ReferenceSet

Random = np.random.Generator

DIMENSIONS = ((1, 2, 3), (4, 8, 16, 17, 20, 24), (25, 32, 40, 64, 65, 100), (128, 200, 256), (257,))
LARGE = (300, 784, 1030)
COUNTS = (1, 2, 3, 5, 16, 17, 60, 64, 65, 100, 150, 240, 241, 300)
DS = (0, 1, 1, 1, 1, 2, 2.5, 8, 40, 128, 128, 1e3, 1e4, 1e6, 1e9, 1e11, 1e12, math.inf, math.inf)
ROWS = 12


@dataclass(frozen=True)
class Problem:
    """Queries x (B, d) and t (B,), references x0 (N, d): float32, float64 or 8-bit codes / 255."""

    name: str
    x: Tensor
    t: Tensor
    x0: Tensor
    D: float
    g_v: Tensor  # (B, d), the cotangents
    g_m: Tensor  # (B,)

    @property
    def references(self) -> Tensor | ReferenceSet:
        """What is given to the op."""
        return ReferenceSet.from_images(self.x0) if self.x0.dtype == torch.uint8 else self.x0

    @property
    def values(self) -> Tensor:
        """What the references stand for."""
        if self.x0.dtype != torch.uint8:
            return self.x0
        return (self.x0.double() / 127.5 - 1).float()


def normal(r: Random, n: int, d: int) -> np.ndarray:
    return r.normal(size=(n, d))


def clusters(r: Random, n: int, d: int) -> np.ndarray:
    """Tight or coinciding ones, up to 100 of their width apart, of even or uneven size."""
    count = int(r.integers(2, 6))
    share = r.dirichlet(np.full(count, r.choice([0.3, 5])))
    centres = r.choice([1, 6, 60]) * r.normal(size=(count, d)) / r.choice([1, math.sqrt(d)])
    width = r.choice([0, 1e-6, 1e-3, 0.03, 1])
    return centres[r.choice(count, size=n, p=share)] + width * r.normal(size=(n, d))


def crowds(r: Random, n: int, d: int) -> np.ndarray:
    """Copies of few references, and some of their own."""
    copied = r.normal(size=(int(r.integers(1, 5)), d))
    share = r.dirichlet(np.full(len(copied), r.choice([0.3, 5])))
    x0 = copied[r.choice(len(copied), size=n, p=share)]
    return np.where(r.random((n, 1)) < r.choice([0, 0.1, 0.5]), r.normal(size=(n, d)), x0)


def far(r: Random, n: int, d: int) -> np.ndarray:
    """Some, or all but some, are far off, where they coincide or not."""
    x0 = r.normal(size=(n, d))
    away = 10 ** r.uniform(1, 4) * r.normal(size=d) / math.sqrt(d)
    moved = r.random(n) < r.choice([0.1, 0.9])
    return np.where(moved[:, None], away + r.choice([0, 1e-3, 1]) * x0, x0)


def offset(r: Random, n: int, d: int) -> np.ndarray:
    return 10 ** r.uniform(0, 3.5) * r.choice([-1, 1], size=d) + r.normal(size=(n, d))


def sphere(r: Random, n: int, d: int) -> np.ndarray:
    x0 = r.normal(size=(n, d))
    return x0 / np.linalg.norm(x0, axis=1, keepdims=True) * r.choice([1, math.sqrt(d)])


def simplex(r: Random, n: int, d: int) -> np.ndarray:
    """Unit vectors and their negatives: equal distances, one value among zeros."""
    x0 = np.zeros((n, d))
    x0[np.arange(n), r.integers(d, size=n)] = r.choice([1, -1], size=n)
    return x0


def grid(r: Random, n: int, d: int) -> np.ndarray:
    return r.integers(-3, 4, size=(n, d)) * r.choice([0.1, 0.25, 1])


def few_values(r: Random, n: int, d: int) -> np.ndarray:
    values = r.choice([-1, 0, 0.5, 1, 0.3, 2], size=int(r.integers(2, 4)), replace=False)
    return values[(r.random((n, d)) < r.choice([0.5, 0.1, 0.02])) * r.integers(1, len(values))]


def rearranged(r: Random, n: int, d: int) -> np.ndarray:
    """The same values in other orders: all norms are equal."""
    return r.permuted(np.tile(r.normal(size=d), (n, 1)), axis=1)


def duplicates(r: Random, n: int, d: int) -> np.ndarray:
    x0 = r.normal(size=(n, d))
    chosen = r.random(n) < r.choice([0.02, 0.3, 0.9])
    near = x0[0] + 10 ** r.uniform(-7, -1) * r.normal(size=(n, d))
    return np.where(chosen[:, None], near, x0)


def lines(r: Random, n: int, d: int) -> np.ndarray:
    """Evenly spaced ones along a line or a curve."""
    along = np.linspace(0, r.choice([1, 12]), n)[:, None]
    return along * r.normal(size=d) if r.random() < 0.5 else np.cos(along * r.uniform(0.5, 2, d))


def images(r: Random, n: int, d: int) -> np.ndarray:
    """8-bit values, neighbours alike."""
    walk = r.normal(size=(n, d)).cumsum(1) * r.choice([5, 40])
    return np.clip(np.round(128 + walk - walk.mean(1, keepdims=True)), 0, 255) / 127.5 - 1


GEOMETRIES: tuple[Callable[[Random, int, int], np.ndarray], ...] = (
    normal,
    clusters,
    clusters,
    crowds,
    far,
    offset,
    sphere,
    simplex,
    grid,
    few_values,
    few_values,
    rearranged,
    duplicates,
    lines,
    images,
)


def queries(r: Random, x0: np.ndarray) -> np.ndarray:
    """One of each kind a row: on a reference, near one, amid all, between two, far away."""
    n, d = x0.shape
    spread = x0.std() + 1e-3
    one, other = x0[r.integers(n, size=ROWS)], x0[r.integers(n, size=ROWS)]
    noise = r.normal(size=(ROWS, d)) * spread
    mean = np.broadcast_to(x0.mean(0), (ROWS, d))
    size = 10 ** r.uniform(-4, 1, (ROWS, 1))
    kinds = (one, one + size * noise, mean, mean + size * noise, (one + other) / 2, x0.mean())
    away = mean + 10 ** r.uniform(0, 3, (ROWS, 1)) * noise
    return np.choose(r.integers(7, size=(ROWS, 1)), [*kinds, away])


def heights(r: Random, x: np.ndarray, x0: np.ndarray, k: float) -> np.ndarray:
    """t: any, beside the data's width, and where the logits spread by about 1."""
    squares = np.stack([np.square(x0 - row).sum(1) for row in x])
    gap = np.quantile(squares, r.choice([0.1, 0.5, 0.9]), axis=1) - squares.min(1)
    spread = 10 ** r.uniform(-1.5, 1.5, len(x))
    if math.isinf(k):
        transition = np.sqrt(gap / 2 / spread)
    else:
        transition = np.sqrt(np.maximum(0, k / 2 * gap / spread - squares.min(1)))
    anything = 10 ** r.uniform(-5, 4, len(x))
    relative = np.sqrt(np.median(squares, 1)) * 10 ** r.uniform(-2, 2, len(x))
    t = np.choose(r.integers(4, size=len(x)), [anything, relative, transition, transition])
    t = np.where((t > 1e-5) & (t < 1e9), t, anything)
    return t * r.choice([1, 1, -1], size=len(x))


def draw(r: Random) -> Problem:
    geometry = GEOMETRIES[r.integers(len(GEOMETRIES))]
    d = int(r.choice(DIMENSIONS[r.integers(len(DIMENSIONS))]))
    n = int(r.choice(COUNTS))
    if r.random() < 0.04:
        d, n = int(r.choice(LARGE)), 150
    elif r.random() < 0.06:
        n = int(r.choice([600, 1100]))
    D = float(r.choice(DS))
    x0 = geometry(r, n, d)
    dtype = r.choice(["float32", "float32", "float32", "float64", "uint8"])
    if dtype == "uint8":
        low, high = x0.min(), x0.max()
        codes = np.round((x0 - low) / max(high - low, 1e-9) * r.choice([1, 10, 255]))
        x0 = codes / 127.5 - 1
        references = torch.from_numpy(codes.astype(np.uint8))
    else:
        x0 = x0 * r.choice([1, 1, 1, 0.01, 100])
        references = torch.from_numpy(x0).to(getattr(torch, dtype))
        x0 = references.double().numpy()
    x = torch.from_numpy(queries(r, x0)).to(torch.float64 if dtype == "float64" else torch.float32)
    t = torch.from_numpy(heights(r, x.double().numpy(), x0, d + D))
    g_v = torch.from_numpy(r.normal(size=x.shape)).to(x.dtype)
    g_m = torch.from_numpy(r.normal(size=len(x)) * 10 ** r.uniform(-2, 2))
    name = f"{geometry.__name__} d={d} N={n} D={D:g} {dtype}"
    return Problem(name, x, t, references, D, g_v, g_m)


def problems(seed: int, count: int) -> Iterator[Problem]:
    """Each by a generator of its own, so that one of them can be drawn alone."""
    return (draw(np.random.default_rng((seed, i))) for i in range(count))


@dataclass(frozen=True)
class Expected:
    """An output's true value, rows of float64, and the error that each row is allowed."""

    value: np.ndarray
    allowed: np.ndarray


def expected(p: Problem, backend: str) -> dict[str, Expected]:
    """What the op must give, in extended precision where k needs it, and how far off each row may
    be: by the contract, gradients by ‖g_v‖ + 2 Σ_j |c_j| ‖x − x0_j‖ and its like, and by what
    float64 rounds.
    """
    D, d, float64 = p.D, p.x.shape[1], p.x.dtype == torch.float64
    half_k = (d + D) / 2
    wide = np.longdouble if 1e4 < D < math.inf else np.float64
    x, t, x0 = (a.double().numpy().astype(wide) for a in (p.x, p.t, p.values))
    g, g_m = p.g_v.double().numpy(), p.g_m.numpy()
    difference = x0 - x[:, None]  # (B, N, d)
    squares = np.einsum("bnd,bnd->bn", difference, difference)
    nearest = squares.min(1, keepdims=True)
    t_square = np.square(t)[:, None]
    if math.isinf(D):
        slope = np.broadcast_to(0.5 / t_square, squares.shape)
        logits, first = -(squares - nearest) * slope, -(nearest * slope)[:, 0]
    else:
        slope = half_k / (squares + t_square)
        logits = -half_k * np.log1p((squares - nearest) / (nearest + t_square))
        first = -half_k * np.log(nearest + t_square)[:, 0]
    weights = np.exp(logits)
    total = weights.sum(1, keepdims=True)
    weights /= total
    log_mass = (first + np.log(total[:, 0])).astype(np.float64)
    difference, weights, slope, squares, t = (
        a.astype(np.float64) for a in (difference, weights, slope, squares, t)
    )
    v = np.einsum("bn,bnd->bd", weights, difference)

    distances = np.sqrt(squares)
    # Weights that need not be summed may round when they are left out.
    left_out = np.where(weights < (1 + 1e-6) * CUT / weights.shape[1], weights, 0)
    # What float64 rounds: the logits' distances, and sums of the data about any of its points.
    eps = np.finfo(np.float64).eps
    rounding = 4 * eps * math.sqrt(d) * (slope * squares * (left_out == 0)).max(1)
    width = 16 * eps * (distances.max(1) + np.abs(x.astype(np.float64)).max(1) * float64)

    about_v = np.linalg.norm(difference - v[:, None], axis=2)
    tolerance = FLOAT64 if float64 else float32_contract(backend, named=d <= 16)
    lost = (left_out * distances).sum(1) + rounding * (weights * about_v).sum(1) + width
    v_allowed = tolerance * (weights * distances).sum(1) + lost
    vector = np.concatenate([v, -t[:, None]], 1)
    norm = np.linalg.norm(vector, axis=1)
    terms = (weights * np.hypot(distances, t[:, None])).sum(1)

    # A term that need not be summed counts 1 / GRADIENT times, and so does what rounds of others.
    g_norm = np.linalg.norm(g, axis=1)[:, None]
    heavy = weights + (left_out + weights * rounding[:, None]) / GRADIENT
    c = slope * weights * (np.einsum("bnd,bd->bn", difference - v[:, None], g) + g_m[:, None])
    c_terms = slope * (about_v * g_norm + np.abs(g_m)[:, None])
    c_size = np.abs(c) + c_terms * (heavy - weights)
    dx = -g + 2 * np.einsum("bn,bnd->bd", c, difference)
    dx_size = g_norm[:, 0] + 2 * (c_size * distances).sum(1)
    dt_factor = 2 * squares / t[:, None] if math.isinf(D) else -2 * t[:, None]
    dt = (c * dt_factor).sum(1)
    # Relative to what a_j is formed of: alone, it cancels where one reference has all the weight.
    pull = (distances + np.linalg.norm(v, axis=1)[:, None]) * g_norm + np.abs(g_m)[:, None]
    dt_size = (slope * pull * heavy * np.abs(dt_factor)).sum(1)
    dx0 = np.einsum("bn,bd->nd", weights, g) - 2 * np.einsum("bn,bnd->nd", c, difference)
    dx0_size = (heavy * g_norm + 2 * c_size * distances).sum(0)
    mass_rounding = 8 * eps * np.abs(log_mass) + (0 if math.isinf(D) else 4 * eps * half_k)
    return {
        "displacement": Expected(v, v_allowed),
        "log mass": Expected(log_mass, LOG_MASS + mass_rounding + rounding),
        "field": Expected(vector / norm[:, None], (tolerance * terms + lost) / norm),
        "gradient of x": Expected(dx, GRADIENT * dx_size),
        "gradient of t": Expected(dt, GRADIENT * dt_size),
        "gradient of x0": Expected(dx0, GRADIENT * dx0_size),
    }


def outputs(backend, p: Problem) -> Iterator[tuple[str, Tensor]]:
    """Each output and gradient by name."""
    references = p.references
    plain = isinstance(references, Tensor)
    x, t = p.x.clone().requires_grad_(), p.t.clone().requires_grad_()
    v, log_mass = backend.displacement(x, t, references, D=p.D)
    yield "displacement", v
    yield "log mass", log_mass
    yield "field", backend.field(p.x, p.t, references, D=p.D)
    dx, dt = torch.autograd.grad([v, log_mass], [x, t], [p.g_v, p.g_m], retain_graph=True)
    yield "gradient of x", dx
    yield "gradient of t", dt
    if plain:
        x0 = references.clone().requires_grad_()
        v, log_mass = backend.displacement(x, t, x0, D=p.D)
        yield "gradient of x0", torch.autograd.grad([v, log_mass], [x0], [p.g_v, p.g_m])[0]


def ratios(backend, p: Problem) -> dict[str, float]:
    """For each output the largest error of a row over what is allowed: above 1 is a miss."""
    truth, found = expected(p, backend.name), {}
    for name, actual in outputs(backend, p):
        value, allowed = truth[name].value, truth[name].allowed
        info = torch.finfo(actual.dtype)
        rounding = np.abs(value) * info.eps / 2 + info.smallest_normal * info.eps
        error = np.abs(actual.detach().double().numpy() - value) - rounding
        error = np.linalg.norm(np.maximum(error, 0).reshape(len(error), -1), axis=1)
        ratio = np.where(
            error > 0, error / np.maximum(allowed, 1e-300), np.nan_to_num(error, nan=np.inf)
        )
        found[name] = float(ratio.max())
    return found


def misses(backend, p: Problem) -> list[str]:
    """The outputs that miss the contract, and by what factor."""
    return [
        f"{name} by {ratio:.3g}" for name, ratio in ratios(backend, p).items() if not ratio <= 1
    ]
