# SPDX-License-Identifier: Apache-2.0
"""Is each of the article's pictures made, in either format, with something in all of its axes?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from pfgm_kernels import figures
from pfgm_kernels.cli import app
from pfgm_kernels.figures import canvas
from pfgm_kernels.training import data

REDUCED = 0.15
LONG = {"trajectories", "weights", "far-field", "shell", "four-sources"}  # a second or more each


@pytest.fixture(scope="module")
def digits() -> data.DataSet:
    return data.load("digits")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, beside their files."""
    found: list[Figure] = []
    save = canvas.save
    monkeypatch.setattr(figures, "save", lambda f, path: (found.append(f), save(f, path)))
    return found


def inside(picture: np.ndarray, figure: Figure) -> list[np.ndarray]:
    """Of each axes the pixels (n, 3), without a margin in which its frame is."""
    found = []
    for axes in figure.axes:
        box = axes.get_window_extent()
        x0, y0, x1, y1 = (round(v * canvas.DPI / figure.dpi) for v in box.extents)
        margin_x, margin_y = (x1 - x0) // 12, (y1 - y0) // 12
        rows = slice(len(picture) - y1 + margin_y, len(picture) - y0 - margin_y)
        found.append(picture[rows, x0 + margin_x : x1 - margin_x].reshape(-1, 3))
    return found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] if name in LONG else [])
        for name in figures.NAMES
    ],
)
def test_no_picture_is_blank(
    name: str, drawn: list[Figure], digits: data.DataSet, tmp_path: Path
) -> None:
    before = dict(matplotlib.rcParams), torch.get_rng_state()
    for ending in figures.FORMATS:
        figures.draw_figure(name, tmp_path / f"{name}.{ending}", digits, REDUCED)
    assert dict(matplotlib.rcParams) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])

    picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 40
    for pixels in inside(picture, drawn[0]):
        colors, counts = np.unique(pixels, axis=0, return_counts=True)
        assert len(colors) > 20
        assert counts.max() < 0.97 * counts.sum()
    shapes = ElementTree.parse(tmp_path / f"{name}.svg").iter("{http://www.w3.org/2000/svg}path")
    assert len([*shapes]) > 50


def test_a_frame_alone_is_found_blank() -> None:
    figure = canvas.sheet(4, 4)
    figure.add_subplot()
    figure.canvas.draw()  # type: ignore[attr-defined]
    side = round(4 * canvas.DPI)
    (pixels,) = inside(np.zeros((side, side, 3), np.uint8), figure)
    assert 0.4 * side * side < len(pixels) < 0.8 * side * side


@pytest.mark.parametrize("ending", figures.FORMATS)
def test_a_picture_is_the_same_each_time(ending: str, digits: data.DataSet, tmp_path: Path) -> None:
    path = tmp_path / f"bias.{ending}"
    contents = []
    for _ in range(2):
        figures.draw_figure("bias", path, digits, 0.1)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", figures.OF_IMAGES)
def test_images_of_ones_own(
    name: str, drawn: list[Figure], digits: data.DataSet, tmp_path: Path
) -> None:
    figures.draw_figure(name, tmp_path / "a.svg", replace(digits, name="/my/photos"), 0.02)
    titles = [axes.get_title(side) for axes in drawn[0].axes for side in ("left", "center")]
    assert any(title.endswith(": images") for title in titles)


def pfgm(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_draws_what_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, Path, str]] = []
    monkeypatch.setattr(figures, "draw_figure", lambda n, path, d: asked.append((n, path, d.name)))
    assert pfgm("figures", "--out", tmp_path).exit_code == 0
    assert asked == [(name, tmp_path / f"{name}.png", "digits") for name in figures.NAMES]
    asked.clear()
    result = pfgm("figures", "--out", tmp_path, "--format", "svg", "bias", "shell")
    assert result.exit_code == 0
    assert f"2 pictures: {tmp_path}" in result.output
    assert [path.name for _, path, _ in asked] == ["bias.svg", "shell.svg"]


def test_the_command_lists_all_and_refuses_others(tmp_path: Path) -> None:
    words = pfgm("figures", "--help").output.replace(",", " ").replace(".", " ").split()
    assert {*figures.NAMES, *figures.FORMATS} <= {*words}
    for arguments, message in (
        (("shell", "sehll"), "unknown figure 'sehll'; expected one of four-sources, far-field, "),
        (("--format", "pdf"), "--format expects one of png, svg, got 'pdf'"),
        (
            ("--data", "two_moons"),
            "--data expects images (digits, mnist, cifar10 or a path), got two_moons",
        ),
        (("--data", "cifar"), "unknown data set 'cifar'"),
    ):
        result = pfgm("figures", "--out", tmp_path, *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_whatever_the_default_device(tmp_path: Path, digits: data.DataSet) -> None:
    with torch.device("meta"):
        figures.draw_figure("hemisphere", tmp_path / "a.png", digits, REDUCED)
    figures.draw_figure("hemisphere", tmp_path / "b.png", digits, REDUCED)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
