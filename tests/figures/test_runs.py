# SPDX-License-Identifier: Apache-2.0
"""Do the pictures show what they are given, each thing in its place?"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pfgm_kernels import figures
from pfgm_kernels.figures import runs
from pfgm_kernels.flow import Trajectory

PATH = Path("picture.png")
SIZE, BORDER = figures.PIXELS_PER_PIXEL, 3


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures in place of their files."""
    found: list = []
    monkeypatch.setattr(runs, "save", lambda figure, path: found.append(figure))
    return found


def grey(values: list[float], height: int = 2, width: int = 3) -> Tensor:
    return torch.tensor(values)[:, None, None].expand(-1, height, width)


def centers(picture: np.ndarray, height: int = 2, width: int = 3) -> np.ndarray:
    """The middle of each image of a picture, (rows, columns, 3)."""
    tall, wide = (SIZE * n + 2 * BORDER for n in (height, width))
    return picture[tall // 2 :: tall, wide // 2 :: wide]


def test_images_stand_in_rows_in_their_colours() -> None:
    red, half = torch.tensor([1.0, -1.0, -1.0]), torch.zeros(3)
    images = torch.stack([red, half, -red])[:, :, None, None].expand(-1, -1, 2, 3)
    expected = [[[1, 0, 0], [0.5, 0.5, 0.5]], [[0, 1, 1], [1, 1, 1]]]
    np.testing.assert_array_equal(centers(figures.tile(images, columns=2)), expected)
    beyond = figures.tile(grey([5.0, -5.0]), columns=2)
    np.testing.assert_array_equal(centers(beyond)[0, :, 0], [0, 1])  # ink, and paper


def test_samples_are_a_square_or_points(drawn: list) -> None:
    figures.draw_samples(grey([0.0] * 9), PATH)
    assert centers(drawn[0].axes[0].images[0].get_array()).shape == (3, 3, 3)
    points = torch.randn(20, 2)
    figures.draw_samples(points, PATH)
    assert not drawn[1].axes[0].images
    np.testing.assert_array_equal(drawn[1].axes[0].collections[0].get_offsets(), points)


def test_samples_stand_left_of_real_images(drawn: list) -> None:
    figures.draw_comparison(grey([1.0] * 20), grey([-1.0] * 10), PATH)
    for axes, title, rows, value in zip(
        drawn[0].axes, ("samples", "real, held out"), (2, 1), (0.0, 1.0), strict=True
    ):
        assert axes.get_title() == title
        picture = centers(axes.images[0].get_array())
        assert picture.shape == (rows, 10, 3)
        assert (picture == value).all()


@pytest.mark.parametrize("count", [4, 120])
def test_the_mean_loss_ends_where_the_losses_do(drawn: list, count: int) -> None:
    losses = [1.0 + i for i in range(count)]
    figures.draw_loss(losses, PATH, window=50)
    window = min(50, count)
    single, mean = drawn[0].axes[0].lines
    np.testing.assert_array_equal(single.get_xdata(), range(1, count + 1))
    np.testing.assert_array_equal(single.get_ydata(), losses)
    np.testing.assert_array_equal(mean.get_xdata(), range(window, count + 1))
    expected = np.arange(count - window + 1) + (window + 1) / 2
    np.testing.assert_allclose(mean.get_ydata(), expected)


def test_lines_keep_to_the_box_and_states_to_their_own_range(drawn: list) -> None:
    times = [8.0, 1.0, 0.2, 0.0]
    path = torch.tensor([[4.0, 0.0], [1.0, 0.5], [0.5, 0.5], [0.25, 0.5]])[:, None]
    path = torch.cat([path, torch.full_like(path, 9.0)], 1)  # the second never comes near
    states = torch.tensor([40.0, -8.0, 0.5, -1.0])[:, None, None, None].expand(4, 1, 2, 2)
    figures.draw_trajectories(
        Trajectory(path[-1], 0, times, path),
        torch.tensor([[1.0, -1.0]]),
        Trajectory(states[-1], 0, times, states),
        PATH,
    )
    left, right = drawn[0].axes
    lines = left.collections[0]
    np.testing.assert_allclose(lines.get_array(), [1.0, 0.2])  # coloured by t
    inside = [[[1, 0.5, 1], [0.5, 0.5, 0.2]], [[0.5, 0.5, 0.2], [0.25, 0.5, 0]]]
    np.testing.assert_allclose(np.array(lines._segments3d), inside, rtol=1e-6)
    # Even in log t from 8 to 0.03, the nearest of the states, then the last one.
    even = [8 * (0.03 / 8) ** (i / 7) for i in range(8)]
    nearest = [min(range(4), key=lambda i, t=t: abs(times[i] - t)) for t in even]
    shown = centers(right.images[0].get_array(), 2, 2)[0, :, 0]
    ink = [
        (1 - states[i, 0, 0, 0].item() / max(1, abs(states[i, 0, 0, 0].item()))) / 2
        for i in [*nearest, 3]
    ]
    np.testing.assert_allclose(shown, ink, atol=1e-6)
    labels = [label.get_text() for label in right.get_xticklabels()]
    assert labels == [f"{times[i]:.2g}" for i in [*nearest, 3]]
    assert math.isclose(right.get_xticks()[0], (2 * SIZE + 2 * BORDER) / 2)
