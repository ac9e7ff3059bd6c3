# SPDX-License-Identifier: Apache-2.0
"""Do the measures give the known answers of simple cases, and those of independent formulas?"""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.stats import binomtest, entropy

from pfgm_kernels.training.evaluation import metrics
from pfgm_kernels.training.evaluation.metrics import (
    copy_ratio,
    frechet_distance,
    inception_score,
    interval,
    moments,
    nearest,
    precision_recall,
)


@pytest.fixture(autouse=True, params=[7, 1024])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are taken in many blocks, the last one not full, or in a single one."""
    monkeypatch.setattr(metrics, "BLOCK", request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def white(rng: np.random.Generator, n: int, f: int) -> np.ndarray:
    """Rows with mean 0 and covariance 1, to rounding."""
    x = rng.standard_normal((n, f))
    x -= x.mean(axis=0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T


def by_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(cov_a)
    mean = a.mean(axis=0) - b.mean(axis=0)
    return float(mean @ mean + np.trace(cov_a + cov_b - 2 * sqrtm(root @ cov_b @ root).real))


def test_frechet_distance_of_diagonal_gaussians(rng: np.random.Generator) -> None:
    """|difference of means|² + Σ (s - r)² for standard deviations s and r."""
    x = white(rng, 500, 3)
    a = x * [1.0, 2.0, 0.5] + [0.0, 1.0, 0.0]
    b = x[:, ::-1] * [3.0, 2.0, 0.0] + [4.0, 0.0, 0.0]
    assert frechet_distance(a, b) == pytest.approx(16 + 1 + 4 + 0 + 0.25, rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_of_correlated_gaussians(rng: np.random.Generator) -> None:
    a, b = (rng.standard_normal((400, 8)) @ rng.standard_normal((8, 8)) + i for i in range(2))
    expected = by_sqrtm(a, b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(moments(a), b) == frechet_distance(a, b)
    single = frechet_distance(a.astype(np.float32), b.astype(np.float32))
    assert single == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_singular_covariances(rng: np.random.Generator) -> None:
    """Fewer rows than features, and features that are constant or the same: no digits are lost."""
    few, other = rng.standard_normal((12, 40)), rng.standard_normal((9, 40))
    # In 21 dimensions lies all there is of them: there the covariances have full rank in part.
    centred = np.concatenate([few - few.mean(0), other - other.mean(0)])
    values = np.linalg.svd(centred[:12] @ centred[12:].T, compute_uv=False) / math.sqrt(11 * 8)
    expected = np.square(few.mean(0) - other.mean(0)).sum() + few.var(0, ddof=1).sum()
    expected += other.var(0, ddof=1).sum() - 2 * values.sum()
    assert frechet_distance(few, other) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-12)
    x = white(rng, 60, 4)
    wide = np.repeat(x, 3, axis=1)  # each feature thrice: three times the distance
    shifted = 1.5 * x + 1
    three = frechet_distance(wide, np.repeat(shifted, 3, axis=1))
    assert three == pytest.approx(3 * (4 + 4 * 0.25), rel=1e-10)
    assert frechet_distance(np.ones((5, 3)), np.zeros((4, 3))) == pytest.approx(3)


def test_frechet_distance_of_what_lies_far_from_the_origin(rng: np.random.Generator) -> None:
    x = white(rng, 100, 3)
    assert frechet_distance(x + 1e6, 2 * x + 1e6) == pytest.approx(3, rel=1e-6)


def test_inception_score() -> None:
    even = np.eye(5)[np.arange(50) % 5]
    assert inception_score(even) == (pytest.approx(5), pytest.approx(0, abs=1e-12))
    assert inception_score(np.tile([0.2, 0.8], (30, 1))) == (pytest.approx(1), pytest.approx(0))
    # In order: parts of one class each are as bad as a single class.
    assert inception_score(np.eye(5)[np.arange(50) // 10], splits=5)[0] == pytest.approx(1)


def test_inception_score_by_entropies(rng: np.random.Generator) -> None:
    """The divergence is the entropy of the mean less the mean of the entropies."""
    p = rng.dirichlet([0.3] * 6, size=32)
    p[3] = [0, 1, 0, 0, 0, 0]
    scores = [
        math.exp(entropy(part.mean(axis=0)) - entropy(part, axis=1).mean())
        for part in np.array_split(p, 3)
    ]
    assert inception_score(p, 3) == (
        pytest.approx(np.mean(scores), rel=1e-12),
        pytest.approx(np.std(scores), rel=1e-9),
    )
    assert inception_score(p, 1) == (pytest.approx(inception_score(p, 1)[0]), 0)


def test_precision_and_recall_on_a_line() -> None:
    """Real points 0, 1, 2, 3, 10 have radii 1, 1, 1, 1, 7 for k = 1."""
    real = np.array([[0.0], [1], [2], [3], [10]])
    samples = np.array([[-1.0], [-1.1], [4.0], [17.0], [17.1], [40.0], [60.0]])
    precision, recall = precision_recall(real, samples, k=1)
    assert precision == pytest.approx(3 / 7)  # -1, 4 and 17
    # Samples' radii: 0.1, 0.1, 5.1, 0.1, 0.1, 20, 20; 4 reaches to -1.1 and 9.1.
    assert recall == pytest.approx(4 / 5)


def test_precision_and_recall_by_all_distances(rng: np.random.Generator) -> None:
    real, samples = rng.standard_normal((41, 4)), 0.8 * rng.standard_normal((37, 4)) + 0.5

    def covered(probes: np.ndarray, manifold: np.ndarray) -> float:
        radii = np.sort(cdist(manifold, manifold), axis=1)[:, 3]
        return (cdist(probes, manifold) <= radii).any(axis=1).mean()

    precision, recall = precision_recall(real, samples)
    assert precision == covered(samples, real)
    assert recall == covered(real, samples)
    assert 0 < precision != recall < 1


def test_crowds_of_equal_rows_cover_themselves(rng: np.random.Generator) -> None:
    """Their balls have no extent, and products do not give exactly 0 for their distance."""
    crowd = np.repeat(rng.standard_normal((40, 50)), 5, axis=0)
    assert precision_recall(crowd, crowd.copy()) == (1, 1)
    assert precision_recall(crowd, crowd + 1e-3) == (0, 0)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_nearest(rng: np.random.Generator, k: int, dtype: type) -> None:
    queries = rng.integers(0, 256, (23, 12)).astype(dtype)
    references = rng.integers(0, 256, (31, 12)).astype(dtype)
    references[7] = queries[3]
    done: list[float] = []
    distances, indices = nearest(queries, references, k, done.append)
    every = cdist(queries.astype(float), references.astype(float))
    np.testing.assert_allclose(distances, np.sort(every, axis=1)[:, :k], rtol=1e-12, atol=0)
    np.testing.assert_array_equal(np.take_along_axis(every, indices, axis=1), distances)
    assert distances[3, 0] == 0
    assert indices[3, 0] == 7
    assert done[-1] == 1
    assert done == sorted(done)


def test_distances_of_near_copies_keep_their_digits(rng: np.random.Generator) -> None:
    references = 1e4 + rng.standard_normal((20, 6))
    distances, indices = nearest(references + 1e-6, references)
    assert indices[:, 0].tolist() == [*range(20)]
    np.testing.assert_allclose(distances[:, 0], math.sqrt(6) * 1e-6, rtol=1e-4)


def test_copy_ratio() -> None:
    """A copy of what the training set has twice is a copy."""
    found = copy_ratio(np.array([[1.0, 3.0], [1.5, 2.0], [0.0, 5.0], [2.0, 2.0], [0.0, 0.0]]))
    assert found.tolist() == [1 / 3, 0.75, 0, 1, 0]


@pytest.mark.parametrize(("hits", "n"), [(0, 20), (3, 20), (20, 20), (500, 1000)])
def test_interval(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert interval(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_refusals() -> None:
    two, three = np.zeros((2, 3)), np.zeros((3, 4))
    with pytest.raises(ValueError, match=r"at least 2 rows of features, got \(1, 3\)"):
        frechet_distance(two[:1], two)
    with pytest.raises(ValueError, match="features of the same number, got 3 and 4"):
        frechet_distance(two, three)
    with pytest.raises(ValueError, match=r"at least 10 rows of features, got \(2, 3\)"):
        inception_score(two)
    with pytest.raises(ValueError, match=r"at least 4 rows of features, got \(3, 4\)"):
        precision_recall(three, three)
    with pytest.raises(ValueError, match="splits expects an integer ≥ 1, got 0"):
        inception_score(two, 0)
    with pytest.raises(ValueError, match="k expects an integer ≥ 1, got 0"):
        precision_recall(three, three, k=0)
    with pytest.raises(ValueError, match=r"at least 4 rows of features, got \(3, 4\)"):
        nearest(three, three, k=4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("block", [256], indirect=True)
def test_the_memory_is_that_of_blocks(rng: np.random.Generator) -> None:
    """All distances take 122 MiB, the references as numbers of 64 bits 61."""
    queries = rng.integers(0, 256, (2000, 1000)).astype(np.uint8)
    references = rng.integers(0, 256, (8000, 1000)).astype(np.uint8)
    tracemalloc.start()
    try:
        nearest(queries, references)
        moments(references[:, :10])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20
