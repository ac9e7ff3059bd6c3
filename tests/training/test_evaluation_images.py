# SPDX-License-Identifier: Apache-2.0
"""Are samples read and judged as what a file holds, and refused where they do not fit?"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.evaluation import read_images, stored


def data_of(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8, low: float = -1.0) -> DataSet:
    train = torch.zeros((3, *shape), dtype=dtype)
    return DataSet("small", train, train, None, None, low=low)


GREY, GREY_CHANNEL, COLOUR = data_of((4, 5)), data_of((1, 4, 5)), data_of((3, 4, 5))


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)


def as_events(images: np.ndarray, data: DataSet) -> Tensor:
    values = torch.from_numpy(images).permute(0, 3, 1, 2)
    return (values if data is COLOUR else values[:, :1]).reshape(-1, *data.event_shape)


def test_samples_are_stored_in_8_bits() -> None:
    """Values half-way between two steps go to one of these, what is beyond to the end."""
    steps = torch.arange(20.0).view(1, 4, 5)
    decoded = GREY.decode(steps.to(torch.uint8))
    assert torch.equal(stored(decoded + 0.4 * 2 / 255, GREY), steps.to(torch.uint8))
    assert torch.equal(stored(decoded - 0.4 * 2 / 255, GREY), steps.to(torch.uint8))
    beyond = torch.full((2, 4, 5), 7.0)
    beyond[0] = -1.5
    assert stored(beyond, GREY).flatten(1)[:, 0].tolist() == [0, 255]
    unsigned = data_of((4, 5), low=0.0)
    assert torch.equal(stored(unsigned.decode(steps.to(torch.uint8)), unsigned), steps.byte())
    assert torch.equal(stored(steps.byte(), GREY), steps.byte())


def test_points_are_stored_as_they_are() -> None:
    points = torch.tensor([[1.25, -7.5]], requires_grad=True)
    found = stored(points, data_of((2,), torch.float32))
    assert torch.equal(found, points.detach())
    assert not found.requires_grad


def test_samples_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"the event \(4, 5\) of small, got \(2, 5, 4\)"):
        stored(torch.zeros(2, 5, 4), GREY)
    with pytest.raises(ValueError, match=r"got \(0, 4, 5\)"):
        stored(torch.zeros(0, 4, 5), GREY)
    broken = torch.zeros(5, 4, 5)
    broken[1, 2, 3], broken[4] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="expects finite values, got 2 samples with others"):
        stored(broken, GREY)


@pytest.mark.parametrize("data", [GREY, GREY_CHANNEL, COLOUR], ids=["grey", "channel", "colour"])
def test_a_folder_of_images(tmp_path: Path, images: np.ndarray, data: DataSet) -> None:
    """In the order of their names; other files are passed over."""
    for i in (3, 0, 5, 1, 4, 2):
        pixels = images[i] if data is COLOUR else images[i, :, :, 0]
        Image.fromarray(pixels).save(tmp_path / f"{i:06d}.{'PNG' if i else 'bmp'}")
    (tmp_path / "notes.txt").write_text("not an image")
    assert torch.equal(read_images(tmp_path, data), as_events(images, data))
    assert torch.equal(read_images(tmp_path, data, 2), as_events(images[:2], data))


def test_colours_and_grey_turn_into_one_another(tmp_path: Path, images: np.ndarray) -> None:
    Image.fromarray(images[0, :, :, 0]).save(tmp_path / "0.png")
    expected = torch.from_numpy(images[:1, :, :, 0])[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(read_images(tmp_path, COLOUR), expected)
    Image.fromarray(np.repeat(images[0, :, :, :1], 3, axis=2)).save(tmp_path / "0.png")
    assert torch.equal(read_images(tmp_path, GREY), as_events(images[:1], GREY))
    Image.fromarray(images[0]).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="expects grey images as those of small, got colours"):
        read_images(tmp_path, GREY)


def test_each_image_is_judged(tmp_path: Path, images: np.ndarray) -> None:
    """None is held out, whatever the folders are called; a ZIP is as good as a folder."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i, name in enumerate(("test", "train", "val")):
            (tmp_path / "a" / name).mkdir(parents=True)
            Image.fromarray(images[i]).save(tmp_path / "a" / name / "0.png")
            archive.write(tmp_path / "a" / name / "0.png", f"{name}/0.png")
    for path in (tmp_path / "a", tmp_path / "a.zip"):
        assert torch.equal(read_images(path, COLOUR), as_events(images[:3], COLOUR))


@pytest.mark.parametrize("data", [GREY, GREY_CHANNEL, COLOUR], ids=["grey", "channel", "colour"])
@pytest.mark.parametrize("name", ["images", "arr_0"])
def test_an_npz_file(tmp_path: Path, images: np.ndarray, data: DataSet, name: str) -> None:
    expected = as_events(images, data)
    last = images if data is COLOUR else images[..., :1]
    for values in (expected.numpy(), last):
        np.savez(tmp_path / "samples.npz", seeds=np.arange(6), **{name: values})
        assert torch.equal(read_images(tmp_path / "samples.npz", data), expected)
        assert torch.equal(read_images(tmp_path / "samples.npz", data, 4), expected[:4])


def folder_of(
    *files: bytes | tuple[int, int], mode: str = "L", suffix: str = ".png"
) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        for i, content in enumerate(files):
            if isinstance(content, bytes):
                (path / f"{i}{suffix}").write_bytes(content)
            else:
                Image.new(mode, content).save(path / f"{i}{suffix}")
        return path

    return make


def npz_of(content: bytes | None = None, **arrays: np.ndarray) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        file = path / "x.npz"
        np.savez(file, **arrays)
        if content is not None:
            file.write_bytes(content)
        return file

    return make


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: path / "none", FileNotFoundError, "none is none, or does not exist"),
        (lambda path: Path("digits"), FileNotFoundError, "/digits is none, or does not exist"),
        (lambda path: path / "none.npz", FileNotFoundError, "none.npz is none, or does not exist"),
        (folder_of(), ValueError, r"expects images \(.png, .*\), got 0 other files"),
        (folder_of((5, 4), (4, 5)), ValueError, "1.png: expected 4 × 5 pixels as in 0.png, got 5"),
        (
            folder_of((4, 5)),
            ValueError,
            r"8 images of 4 × 5 pixels as .* of small, got uint8 .* 5,",
        ),
        (folder_of((5, 4), mode="I;16"), ValueError, "0.png: .* got 16 bits a channel"),
        (folder_of((5, 4), mode="F", suffix=".tif"), ValueError, "got 1 other files"),
        (folder_of(b""), ValueError, "damaged data file .*0.png"),
        (folder_of(b"\x89PNG\r\n\x1a\n"), ValueError, "damaged data file .*0.png"),
        (npz_of(b"PK"), ValueError, "damaged data file .*x.npz"),
        (npz_of(b""), ValueError, "damaged data file .*x.npz"),
        (npz_of(other=np.zeros(3)), ValueError, r"x.npz expects .* images, .* arr_0, got other"),
        (npz_of(arr_0=np.array([{}, {}])), ValueError, "expected an array of numbers, got object"),
        (npz_of(arr_0=np.zeros((2, 4, 5))), ValueError, r"uint8 .* float32 of shape \(2, 4, 5\)"),
        (npz_of(arr_0=np.zeros((2, 5, 4), np.uint8)), ValueError, r"got uint8 of shape \(2, 5, 4"),
        (npz_of(arr_0=np.zeros((0, 4, 5), np.uint8)), ValueError, "expected at least 1 rows"),
        (npz_of(arr_0=np.array(["a"])), ValueError, "expected an array of numbers, got <U1"),
    ],
)
def test_what_cannot_be_judged(
    tmp_path: Path, make: Callable[[Path], Path], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_images(make(tmp_path), GREY)


def test_a_truncated_image(tmp_path: Path, images: np.ndarray) -> None:
    Image.fromarray(images[0, :, :, 0]).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    for size in range(1, len(whole) - 30, 7):  # beyond that all pixels are there
        (tmp_path / "a.png").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"damaged data file .*a\.png"):
            read_images(tmp_path, GREY)


def test_a_damaged_npz(tmp_path: Path, images: np.ndarray) -> None:
    np.savez_compressed(tmp_path / "x.npz", arr_0=images[..., 0])
    whole = (tmp_path / "x.npz").read_bytes()
    for place in range(0, len(whole), 9):
        spoilt = bytearray(whole)
        spoilt[place] ^= 0x55
        (tmp_path / "x.npz").write_bytes(spoilt)
        with suppress(ValueError):  # some bits do not matter
            read_images(tmp_path / "x.npz", GREY)


def test_counts(tmp_path: Path) -> None:
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"count expects an integer ≥ 1, got {count}"):
            read_images(tmp_path, GREY, count)


def test_points_are_no_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--images expects a data set of images, got small"):
        read_images(tmp_path, data_of((2,), torch.float32))
