# SPDX-License-Identifier: Apache-2.0
"""Measures of how close two sets of images are, each of arrays of features or distances.

Arrays may be of any floating type; all is computed in float64, a block of rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from pfgm_kernels._checks import integer

BLOCK = 1024  # of rows: 24 MiB of images with 3,072 values, 8 MiB of distances
NEIGHBOURS = 3
COPY = 1 / 3
ROUNDING = 1e-12
Z95 = 1.959963984540054


class Moments(NamedTuple):
    """Of features (n, f): the mean (f,), and R (·, f) with RᵀR the unbiased covariance."""

    mean: np.ndarray
    root: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """What ``frechet_distance`` needs of features (n, f). Raises ValueError for n < 2.

    R comes of QR decompositions of the centred rows: the covariance, which would square what is
    small, is never formed.
    """
    _matrices(features, least=2)
    count, width = features.shape
    total, root = np.zeros(width), np.zeros((0, width))
    for rows in _ranges(count):
        total += features[rows].sum(axis=0, dtype=np.float64)
    for rows in _ranges(count):
        root = np.asarray(
            np.linalg.qr(np.concatenate([root, features[rows] - total / count]), mode="r")
        )
    return Moments(total / count, root / math.sqrt(count - 1))


def frechet_distance(a: np.ndarray | Moments, b: np.ndarray | Moments) -> float:
    """Distance of the Gaussians with the means and covariances of features a (n, f) and b (m, f).

        |mean_a - mean_b|² + tr(C_a + C_b - 2 (C_a C_b)^(1/2))        Heusel et al. 2017, "GANs
                                                                    trained by a two time-scale …"
    The eigenvalues of C_a C_b are the squares of the singular values of R_a R_bᵀ, so the trace of
    the root is the sum of these: singular covariances, as of n ≤ f images, lose no digits.

    The estimate is biased upward, the more the fewer images there are: compare equal n only.
    Raises ValueError for fewer than two rows or unequal f.
    """
    a, b = (x if isinstance(x, Moments) else moments(x) for x in (a, b))
    _matrices(a.root, b.root, least=1)
    mean = a.mean - b.mean
    roots = np.linalg.svd(a.root @ b.root.T, compute_uv=False)
    variances = np.square(a.root).sum() + np.square(b.root).sum()
    return max(float(mean @ mean + variances - 2 * roots.sum()), 0.0)


def inception_score(probabilities: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over ``splits`` parts of probabilities (n, classes), in order.

        exp(E_x KL(p(y | x) ‖ p(y))),   p(y) = E_x p(y | x)          Salimans et al. 2016, "Improved
                                                                    techniques for training GANs"
    From 1, where all images get the same probabilities, to the number of classes, or of the rows of
    a part: the estimate is biased downward, the more the fewer these are. Published figures are of
    ten parts of 5,000. Raises ValueError for fewer rows than splits.
    """
    _matrices(probabilities, least=integer("splits", splits))
    scores = []
    for part in np.array_split(probabilities.astype(np.float64), splits):
        ratio = np.divide(part, part.mean(axis=0), out=np.ones_like(part), where=part > 0)
        scores.append(math.exp((part * np.log(ratio)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    real: np.ndarray, samples: np.ndarray, k: int = NEIGHBOURS
) -> tuple[float, float]:
    """Share of samples within the real images' manifold, and of real images within the samples'.

        (1/|A|) Σ_{a ∈ A} [ there is a b ∈ B with |a - b| ≤ |b - its k-th nearest in B| ]

    with A, B = samples, real for the precision, and real, samples for the recall: Kynkäänniemi et
    al. 2019, "Improved precision and recall metric …", where k = 3. Features real (n, f) and
    samples (m, f); both depend on n and m, so take as many of one as of the other. Raises
    ValueError for fewer than k + 1 rows or unequal f.
    """
    _matrices(real, samples, least=integer("k", k) + 1)
    return _covered(samples, real, k), _covered(real, samples, k)


def nearest(
    queries: np.ndarray,
    references: np.ndarray,
    k: int = 1,
    progress: Callable[[float], None] = lambda done: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Distances (n, k), ascending, and indices (n, k) of the nearest of references (m, d).

    Found by products, then measured by direct differences. ``progress`` gets the share done.
    """
    _matrices(queries, references, least=1)
    _matrices(references, least=k)
    squared = np.full((len(queries), k), np.inf)
    found = np.zeros((len(queries), k), np.int64)
    for rows, columns, block in _blocks(queries, references, progress):
        places = np.arange(columns.start, columns.start + block.shape[1])
        joined = np.concatenate([squared[rows], block], axis=1)
        indices = np.concatenate([found[rows], np.broadcast_to(places, block.shape)], axis=1)
        best = np.argpartition(joined, k - 1, axis=1)[:, :k]
        squared[rows] = np.take_along_axis(joined, best, axis=1)
        found[rows] = np.take_along_axis(indices, best, axis=1)
    distances = np.empty_like(squared)
    for column in range(k):
        for rows in _ranges(len(queries)):
            near = references[found[rows, column]].astype(np.float64)
            distances[rows, column] = np.linalg.norm(queries[rows] - near, axis=1)
    order = np.argsort(distances, axis=1, kind="stable")
    return np.take_along_axis(distances, order, 1), np.take_along_axis(found, order, 1)


def copy_ratio(distances: np.ndarray) -> np.ndarray:
    """How much nearer samples are to one training image than to the rest: (n,), from 0 to 1.

        |x - its nearest| / |x - its second nearest|        Yoon et al. 2023, "Diffusion
                                        probabilistic models generalize when they fail to memorize"
    of the two least distances (n, 2). They call a sample a copy where that is up to ``COPY``: one
    between training images is about as far from the second of them as from the first, however close
    these lie. Not found are copies of what the training set has several of, not quite equal.
    """
    first, second = distances.T
    return np.divide(first, second, out=np.zeros_like(first), where=second > 0)


def interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n independent draws (Wilson 1927)."""
    z = Z95**2 / n
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(share * (1 - share) * z + z**2 / 4) / (1 + z)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _covered(probes: np.ndarray, manifold: np.ndarray, k: int) -> float:
    """Share of probes that lie in a ball around a point of the manifold, up to its k-th nearest."""
    radii = nearest(manifold, manifold, k + 1)[0][:, k]  # the nearest is the point itself
    inside = np.zeros(len(probes), bool)
    for rows, columns, squared in _blocks(probes, manifold):
        # Equal points have to be within a ball without extent, whatever their products round to.
        slack = ROUNDING * np.square(manifold[columns].astype(np.float64)).sum(axis=1)
        inside[rows] |= (squared <= np.square(radii[columns]) + slack).any(axis=1)
    return float(inside.mean())


def _blocks(
    a: np.ndarray, b: np.ndarray, progress: Callable[[float], None] = lambda done: None
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Rows of a, rows of b, and the squared distances between them, a block at a time."""
    for columns in _ranges(len(b)):
        right = b[columns].astype(np.float64)
        right_squares = np.square(right).sum(axis=1)
        for rows in _ranges(len(a)):
            left = a[rows].astype(np.float64)
            squared = np.square(left).sum(axis=1)[:, None] + right_squares - 2 * (left @ right.T)
            yield rows, columns, squared.clip(min=0)
        progress(min(columns.stop, len(b)) / len(b))


def _ranges(count: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, count, BLOCK)]


def _matrices(*arrays: np.ndarray, least: int) -> None:
    for array in arrays:
        if array.ndim != 2 or len(array) < least:
            raise ValueError(f"expected at least {least} rows of features, got {array.shape}")
    if len({array.shape[1] for array in arrays}) > 1:
        widths = " and ".join(str(array.shape[1]) for array in arrays)
        raise ValueError(f"expected features of the same number, got {widths}")
