# SPDX-License-Identifier: Apache-2.0
"""Do the article's pictures show what their equations say?"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PathCollection

from pfgm_kernels import poisson_field
from pfgm_kernels.figures import (
    batches,
    canvas,
    descent,
    lines,
    neighbours,
    plane,
    prior,
    queries,
    ring,
)
from pfgm_kernels.training import data

REDUCED = 0.15


def segments(axes) -> list[np.ndarray]:
    return [
        line
        for each in axes.collections
        if isinstance(each, LineCollection)
        for line in each.get_segments()
    ]


def dots(axes) -> list[np.ndarray]:
    """The points of each scatter plot, in the order that they were drawn."""
    return [
        each.get_offsets().data for each in axes.collections if isinstance(each, PathCollection)
    ]


def image(axes) -> np.ndarray:
    return np.asarray(axes.images[0].get_array())


@pytest.mark.parametrize("D", [0, 1])
@pytest.mark.parametrize("toward", [False, True])
def test_lines_of_one_source_are_straight(D: float, toward: bool) -> None:
    source = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    n = 2 if D == 0 else 3
    start = torch.nn.functional.pad(source, (0, n - 2)) + 1.05 * torch.eye(n).double()
    found = lines.trace(start, source, D=D, step=0.1, count=15, toward=toward)
    reached = 1.05 + 0.1 * torch.arange(16, dtype=torch.float64) * (-1 if toward else 1)
    expected = start + (reached - 1.05)[:, None, None] * torch.eye(n, dtype=torch.float64)
    alive = reached > 0.1
    torch.testing.assert_close(found[alive], expected[alive])
    assert found[~alive].isnan().all()


def test_directions_share_the_angle() -> None:
    found = lines.directions(4, 0, math.pi)
    angles = torch.atan2(found[:, 1], found[:, 0]) / math.pi
    torch.testing.assert_close(angles, torch.tensor([1, 3, 5, 7], dtype=torch.float64) / 8)


@pytest.mark.parametrize(("D", "power"), [(0, 1), (1, 2)])
def test_the_strength_of_equal_sources(D: float, power: int) -> None:
    """‖F‖ is a mean over sources: r^−1 in the plane of d = 2, r^−2 with one more dimension."""
    axes = canvas.sheet(3, 3).add_subplot()
    sources = torch.zeros(5, 2, dtype=torch.float64)
    ends = {"across": (1.0, 3.0), "up": (0.0, 2.0), "decades": (-1.0, 1.0)}
    lines.draw_strength(axes, sources, D=D, detail=0.1, **ends)
    r = np.hypot(np.linspace(1, 3, 30), np.linspace(0, 2, 30)[:, None])
    np.testing.assert_allclose(image(axes), -power * np.log10(r), atol=1e-12)


def test_a_quarter_of_all_lines_is_each_source_s() -> None:
    axes = plane.four_sources(0.5).axes[0]
    found = segments(axes)
    assert len(found) == 48
    starts = np.array([line[0] for line in found]).reshape(4, 12, 2)
    np.testing.assert_allclose(starts.mean(axis=1), plane.FOUR.numpy(), atol=1e-9)
    assert all(np.abs(line[-1]).max() > 2 for line in found)  # none ends at another source


def test_both_fields_agree_outside_the_circle() -> None:
    left, right = plane.far_field(REDUCED).axes
    (circle,) = left.patches
    many = torch.from_numpy(dots(left)[0])
    one = torch.from_numpy(dots(right)[0])
    torch.testing.assert_close(one[0], many.mean(dim=0))
    for factor, low, high in ((1, 4.99, 5.001), (2, 0.1, 3)):
        angle = torch.linspace(0, 2 * math.pi, 1001, dtype=torch.float64)
        around = one + factor * circle.radius * torch.stack([angle.cos(), angle.sin()], dim=1)
        cosine = (poisson_field(around, 0.0, many, D=0) * poisson_field(around, 0.0, one, D=0)).sum(
            1
        )
        assert low < math.degrees(cosine.min().acos()) < high


def test_one_more_dimension_fills_the_ring() -> None:
    left, right = ring.shell(0.5).axes
    assert all(np.hypot(*line.T).min() > 0.99 for line in segments(left))
    size = len(image(left))
    assert image(left)[size // 2, size // 2] < -10  # log10 of what is 0
    inward = [line for line in segments(right) if np.abs(line[:, 0]).min() < 0.9]
    assert len(inward) >= 6
    assert all(line[-1][1] > 4 for line in inward)  # they rise
    # On the axis of a ring of radius 1 the field is t / (1 + t²)^(3/2).
    height = np.linspace(0, right.get_ylim()[1], size)[size // 3]
    middle = image(right)[size // 3, size // 2 - 1 : size // 2 + 1]
    np.testing.assert_allclose(middle, np.log10(height / (1 + height**2) ** 1.5), atol=1e-3)


def test_the_hemisphere_is_stretched_to_the_prior() -> None:
    left, right = prior.hemisphere().axes
    sphere, crossing = dots(left)[:2]
    angle = np.arctan2(sphere[:, 1], sphere[:, 0])
    np.testing.assert_allclose(np.diff(angle), math.pi / len(sphere), rtol=1e-9)
    np.testing.assert_allclose(crossing[:, 1], 1)
    tangent = np.cos(angle) / np.sin(angle)
    np.testing.assert_allclose(crossing[:, 0], tangent[np.abs(tangent) < 2.75])
    for d, curve, drawn in zip(prior.DIMENSIONS, right.lines, right.patches, strict=True):
        x, y = curve.get_xdata(), curve.get_ydata()
        assert abs(x[y.argmax()] - math.log10(d) / 2) < 0.02  # r = √d T
        values, edges, _ = drawn.get_data()
        expected = np.interp((edges[1:] + edges[:-1]) / 2, x, y)
        noise = np.sqrt(expected / (edges[1] - edges[0]) / 5000) + 0.01
        assert (np.abs(values - expected) < 5 * noise).all()


@pytest.mark.exhaustive
def test_lines_end_on_the_data_and_never_cross() -> None:
    left, right = descent.trajectories(0.5).axes
    found = left.lines[:-2]
    paths = np.stack([line.get_xdata() for line in found])
    times = found[0].get_ydata()
    assert times[0] == left.get_yticks()[1]
    assert times[-1] == 0
    assert (np.diff(paths[:, :-1], axis=0) > 0).all()  # at t = 0 two may meet
    ends = paths[:, -1]
    shares = [(np.abs(ends - mean) < 4 * deviation).mean() for mean, deviation, _ in descent.MODES]
    np.testing.assert_allclose(shares, [0.3, 0.2, 0.5], atol=0.12)
    np.testing.assert_allclose(image(left).max(axis=1), 1)
    # From t = 3 each mode looks like one source.
    x = np.linspace(*left.get_xlim(), image(left).shape[1])
    expected = sum(share / ((x - mean) ** 2 + 9) for mean, _, share in descent.MODES)
    np.testing.assert_allclose(image(left)[-1], expected / expected.max(), atol=0.01)
    (drawn,) = [c for c in right.collections if hasattr(c, "_segments3d")]
    radius = np.linalg.norm(np.array(drawn._segments3d), axis=2)
    assert radius[:, 0] == pytest.approx(2.4, rel=1e-3)
    assert (radius[:, -1] < 1.1).all()


@pytest.fixture(scope="module")
def digits() -> data.DataSet:
    return data.load("digits")


def some(digits: data.DataSet, count: int) -> queries.Queries:
    x0, references = digits.decode(digits.train[:count]), digits.references
    return queries.Queries(x0, references, torch.Generator().manual_seed(0))


def test_the_effective_number_is_that_of_the_weights(digits: data.DataSet) -> None:
    found = some(digits, 5)
    for m in (120, 160, 200, found.constants.M):
        x, t = found.at(m)
        x0 = digits.decode(digits.train).double().flatten(1)
        s = (x.double().flatten(1)[:, None] - x0).square().sum(2) + t.double().square()[:, None]
        w = (-65 / 2 * s.log()).softmax(dim=1)
        number = queries.effective_number(x, t, digits.references)
        torch.testing.assert_close(number, 1 / w.square().sum(1), rtol=1e-5, atol=0)
        one = neighbours._weights(x[:1], t[:1], digits.references, digits)
        torch.testing.assert_close(one, w[0], rtol=1e-5, atol=1e-12)


def test_exponents_begin_where_others_are_heard(digits: data.DataSet) -> None:
    found = some(digits, 40)
    exponents = found.exponents(7)
    assert exponents[-1] == found.constants.M
    torch.testing.assert_close(exponents.diff(), exponents.diff()[:1].expand(6))
    start = exponents[0].item()
    numbers = [
        queries.effective_number(*found.at(m), found.references).quantile(0.9)
        for m in (start, start + found.constants.M / 64)
    ]
    assert numbers[0] < 1.001 <= numbers[1]


def test_queries_have_the_level_of_m(digits: data.DataSet) -> None:
    found = some(digits, 500)
    x, t = found.at(100)
    level = 0.01 * 1.03**100
    assert (x - found.x0).std().item() == pytest.approx(level, rel=0.02)
    assert t.square().mean().sqrt().item() == pytest.approx(level, rel=0.1)
    assert (t > 0).all()


def test_more_references_are_less_biased(digits: data.DataSet) -> None:
    axes = batches.bias(digits, REDUCED).axes[0]
    *few, exact = [line.get_ydata() for line in axes.lines]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["128", "256", "512", "1,024", "all 1,437"]
    peaks = [each.max() for each in few]
    assert peaks == sorted(peaks, reverse=True)
    assert 4 < peaks[0] < 20
    assert (exact == 0).all()
    assert batches._sizes(50_000) == [128, 512, 2048, 8192, 32768]
    right = batches._angle(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert right.item() == pytest.approx(90)


def test_weights_are_shown_beside_their_images(digits: data.DataSet) -> None:
    above, below = neighbours.weights(digits, REDUCED).axes
    columns = np.array([each.get_array() for each in above.images]).reshape(12, 5, 8, 8, 3)
    labels = [text.get_text() for text in above.texts]
    assert labels[2] == "100 %"  # at first its own image is all there is
    np.testing.assert_allclose(columns[0, 1], columns[0, 2], atol=0.01)
    ink = 1 - columns[:, 2:].min(axis=(2, 3, 4))
    assert (np.diff(ink, axis=1) <= 0).all()  # the lighter the paler
    assert ink[0, 1] < 0.1
    assert ink[-1].min() > 0.8
    median = below.lines[0].get_ydata()
    assert median[0] == pytest.approx(1, abs=0.01)
    assert median[-1] > 0.9 * len(digits.train)


@pytest.mark.parametrize(
    ("weight", "text"),
    [(1, "100 %"), (0.123, "12 %"), (0.0123, "1.2 %"), (0.00123, "0.12 %"), (0.00001, "")],
)
def test_percent(weight: float, text: str) -> None:
    assert neighbours._percent(weight) == text
