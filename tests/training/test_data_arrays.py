# SPDX-License-Identifier: Apache-2.0
"""Are .npy and .npz files read as they were written, and nothing else?"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfgm_kernels.training import data
from pfgm_kernels.training.data import arrays, checks

RNG = np.random.default_rng(0)
CODES = RNG.integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)
FLOATS = RNG.standard_normal((7, 6, 5, 3)).astype(np.float32)


def saved(path: Path, array: np.ndarray, **labels: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        np.savez_compressed(path, images=array, **labels)
    return path


@pytest.mark.parametrize("ending", ["npy", "npz"])
@pytest.mark.parametrize("values", [CODES, FLOATS], ids=["uint8", "float32"])
@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW", "NHW1", "N1HW"])
def test_images(tmp_path: Path, ending: str, values: np.ndarray, layout: str) -> None:
    channels_first = values.transpose(0, 3, 1, 2)
    stored, expected = {
        "NHW": (values[..., 0], values[..., 0]),
        "NHWC": (values, channels_first),
        "NCHW": (channels_first, channels_first),
        "NHW1": (values[..., :1], values[..., 0]),
        "N1HW": (channels_first[:, :1], values[..., 0]),
    }[layout]
    found = data.load(saved(tmp_path / f"a.{ending}", stored), held_out=0)
    assert np.array_equal(found.train.numpy(), expected)
    assert found.train.numpy().dtype == values.dtype
    assert found.train.is_contiguous()
    assert found.is_image == (values is CODES)


@pytest.mark.parametrize("ending", ["npy", "npz"])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_vectors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ending: str, dtype: str, order: str
) -> None:
    """In one part and in many, from either end of the bytes, rounded to float32 once."""
    values = np.asarray(RNG.standard_normal((50, 3)), dtype, order=order)
    path = saved(tmp_path / f"a.{ending}", values)
    for chunk in (1, 100, 1 << 24):
        monkeypatch.setattr(arrays, "CHUNK", chunk)
        fractions: list[float] = []
        found = data.load(path, held_out=0, progress=fractions.append)
        assert np.array_equal(found.train.numpy(), values.astype(np.float32))
        assert found.train.dtype == torch.float32
        assert found.train_labels is None
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1
        assert (len(fractions) == 1) == (chunk > 1000)


@pytest.mark.parametrize("names", [("images", "labels"), ("x", "y"), ("data", "labels")])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, ">i8", np.uint64])
def test_labels(tmp_path: Path, names: tuple[str, str], dtype: Any) -> None:
    path, labels = tmp_path / "a.npz", np.arange(7)[::-1]
    others = {"notes": np.array(["others", "stay"])}
    np.savez(path, **{names[0]: CODES, names[1]: labels.astype(dtype)}, **others)
    found = data.load(path, held_out=0.3)
    assert found.train_labels is not None
    assert found.held_out_labels is not None
    assert (len(found.train), len(found.held_out)) == (5, 2)
    every = torch.cat([found.train_labels, found.held_out_labels])
    assert every.dtype == torch.int64
    for image, label in zip(torch.cat([found.train, found.held_out]), every, strict=True):
        assert np.array_equal(image.numpy(), CODES[6 - label].transpose(2, 0, 1))


@pytest.mark.parametrize("ending", ["npy", "npz"])
@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (CODES.astype(np.int64), "expected uint8 or floating-point values, got int64"),
        (CODES[..., 0] > 9, "expected an array of numbers, got bool"),
        (np.array(["a", "b"]), "expected an array of numbers, got <U1"),
        (CODES.astype(complex), "expected an array of numbers, got complex128"),
        (np.zeros(3, [("x", "f4")]), r"expected an array of numbers, got \[\('x', '<f4'\)\]"),
        (CODES[:, 0, 0], r"got shape \(7, 3\) of uint8"),
        (FLOATS[:, :, :, :2], r"got shape \(7, 6, 5, 2\) of float32"),
        (FLOATS[0, 0, 0], r"got shape \(3,\) of float32"),
        (FLOATS[0, 0, 0, 0], r"got shape \(\) of float32"),
        (FLOATS[..., None], r"got shape \(7, 6, 5, 3, 1\) of float32"),
        (np.zeros((7, 0), np.float32), r"got shape \(7, 0\) of float32"),
        (CODES[:, :1, :1], "expected images of 2 to 16,777,216 pixels, got 1 × 1"),
        (np.zeros((7, 0, 4), np.uint8), "expected images of 2 to 16,777,216 pixels, got 0 × 4"),
        (CODES[:1], "expected at least 2 rows, of which 1 is held out, got 1"),
        (CODES[:0], "expected at least 2 rows, of which 1 is held out, got 0"),
        (np.where(FLOATS > 2, np.nan, FLOATS), "expected finite float32 values, got NaN or Inf"),
        (FLOATS.astype(float) * 1e300, "expected finite float32 values, got NaN or Inf"),
    ],
    ids=range(17),
)
def test_other_arrays(tmp_path: Path, ending: str, array: np.ndarray, sentence: str) -> None:
    path = saved(tmp_path / f"a.{ending}", array)
    with pytest.raises(ValueError, match=rf"{path}.*: .*{sentence}"):
        data.load(path)


class _Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_nothing_is_unpickled(tmp_path: Path, ending: str) -> None:
    marker = tmp_path / "executed"
    path = saved(tmp_path / f"a.{ending}", np.array([_Malicious(marker)] * 3))
    np.load(path, allow_pickle=True)[() if ending == "npy" else "images"]
    marker.rmdir()  # it was created: this pickle does something when executed
    with pytest.raises(ValueError, match="expected an array of numbers, got object"):
        data.load(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (np.arange(6), "expected as many labels as rows, 7, got 6"),
        (np.arange(7) - 1, "expected labels from 0 to 16777215, got -1 to 5"),
        (np.full(7, 1 << 24), "expected labels from 0 to 16777215, got 16777216 to 16777216"),
        (np.arange(7.0), r"expected integers \(N,\), got shape \(7,\) of float64"),
        (np.eye(7, dtype=int), r"expected integers \(N,\), got shape \(7, 7\) of int64"),
        (np.array([None] * 7), "expected an array of numbers, got object"),
    ],
    ids=range(6),
)
def test_other_labels(tmp_path: Path, labels: np.ndarray, sentence: str) -> None:
    path = saved(tmp_path / "a.npz", CODES, labels=labels)
    with pytest.raises(ValueError, match=rf"{path}/.*: {sentence}"):
        data.load(path)


def test_which_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, pictures=CODES, y=np.arange(7))
    with pytest.raises(ValueError, match=r"images, x, data, arr_0, got pictures.npy, y"):
        data.load(path)
    np.savez(path, x=CODES, images=CODES)
    with pytest.raises(ValueError, match=r"images, x, data, arr_0, got images.npy, x.npy"):
        data.load(path)
    zipfile.ZipFile(path, "w").close()
    with pytest.raises(ValueError, match=r"images, x, data, arr_0, got none"):
        data.load(path)


def header(shape: str, descr: str = "'|u1'", version: bytes = b"\1\0") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "expected an array of NumPy, got ValueError"),
        (header("(3, 4, 5)") + bytes(59), "130 bytes for shape .* of uint8, got"),
        (header("(3, 4, 5)") + bytes(61), "130 bytes for shape .* of uint8, got"),
        (header("(1000000000000, 4, 5)") + bytes(60), r"bytes for shape \(1000000000000, 4, 5\)"),
        (header("(-3, -4, 5)") + bytes(60), r"for shape \(-3, -4, 5\) of uint8"),
        (header("(3, 4.5)"), "expected an array of NumPy, got ValueError"),
        (header("(" * 9000), "expected an array of NumPy, got "),
        (header("__import__('os').getcwd()"), "expected an array of NumPy, got ValueError"),
        (header("(3,)", "'|V9999999999999'"), "expected an array of NumPy, got"),
        (header("(3, 4, 5)", version=b"\3\0"), r"expected a file of version 1.0 or 2.0, got \(3"),
    ],
    ids=range(10),
)
@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_damaged_arrays(tmp_path: Path, content: bytes, sentence: str, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)
    with pytest.raises(ValueError, match=rf"damaged data file {path}.*{sentence}") as caught:
        data.load(path)
    assert "\n" not in str(caught.value)


def test_more_than_the_memory_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A few kilobytes may declare, and hold, any number of zeros."""
    path = saved(tmp_path / "a.npz", np.zeros((1000, 30, 30), np.uint8))
    assert path.stat().st_size < 3000
    monkeypatch.setattr(checks, "memory", lambda: 1000 * 900 - 1)
    with pytest.raises(ValueError, match=r"memory, got shape \(1000, 30, 30\)"):
        data.load(path)
    labels = saved(tmp_path / "b.npz", np.zeros((2, 2, 2), np.uint8), y=np.zeros(113_000, np.uint8))
    with pytest.raises(ValueError, match=r"memory, got shape \(113000,\)"):
        data.load(labels)


def test_a_member_that_ends_early(tmp_path: Path) -> None:
    """Its directory says more than it holds, and the header of the array the same."""
    path, file = tmp_path / "a.npz", io.BytesIO()
    np.save(file, CODES)
    content = file.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", content[:-1])
    whole = path.read_bytes()
    size = (len(content) - 1).to_bytes(4, "little")
    directory = whole.rindex(b"PK\1\2")
    place = whole.rindex(size)
    assert place == directory + 24
    path.write_bytes(whole[:place] + len(content).to_bytes(4, "little") + whole[place + 4 :])
    with pytest.raises(ValueError, match=rf"{path}/x.npy: expected a whole array, got"):
        data.load(path)
