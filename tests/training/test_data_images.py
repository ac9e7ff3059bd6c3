# SPDX-License-Identifier: Apache-2.0
"""Are images in folders read as they were written, with their classes and the parts they bring?"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pfgm_kernels.training import data
from pfgm_kernels.training.data import checks, images

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (12, 9, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (12, 9, 7, 3), dtype=np.uint8)
NAMES = ["b.png", "a/2.bmp", "a/10.webp", "c/d/1.PNG", "a/1.png"]
SORTED = ["a/1.png", "a/10.webp", "a/2.bmp", "b.png", "c/d/1.PNG"]


def write(path: Path, pixels: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    Image.fromarray(pixels).save(path, **options | lossless)


def write_all(folder: Path, names: list[str], pixels: np.ndarray = GREY) -> None:
    for name, each in zip(names, pixels, strict=False):
        write(folder / name, each)


def write_labels(folder: Path, labels: object) -> None:
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def both(found: data.DataSet) -> np.ndarray:
    """All images, sorted by their bytes."""
    rows = torch.cat([found.train, found.held_out]).numpy()
    return np.stack(sorted(rows, key=lambda row: row.tobytes()))


@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "colour"])
def test_pixels_come_back_in_the_order_of_names(tmp_path: Path, pixels: np.ndarray) -> None:
    names = [name.replace("webp", "bmp") if pixels is GREY else name for name in NAMES]
    write_all(tmp_path, names, pixels)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._b.png").write_text("hidden")
    found = data.load(tmp_path, held_out=0)
    expected = np.stack([pixels[NAMES.index(name)] for name in SORTED])
    if pixels is COLOUR:
        expected = expected.transpose(0, 3, 1, 2)
    assert found.train.dtype == torch.uint8
    assert found.is_image
    assert np.array_equal(found.train.numpy(), expected)
    assert found.train.is_contiguous()
    assert found.held_out.shape == (0, *expected.shape[1:])
    assert found.train_labels is None  # one lies in no folder
    assert found.name == str(tmp_path)


def test_jpeg(tmp_path: Path) -> None:
    """As Pillow decodes it."""
    write_all(tmp_path, ["1.jpg", "2.jpeg"], COLOUR)
    found = data.load(tmp_path, held_out=0).train.permute(0, 2, 3, 1).numpy()
    for name, image in zip(["1.jpg", "2.jpeg"], found, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(tmp_path / name)))


@pytest.mark.parametrize("first", [0, 1, 300])
def test_grey_among_colour_is_repeated(tmp_path: Path, first: int) -> None:
    """Wherever the first image in colour is, in a later chunk of those that are decoded too."""
    count = first + 3
    pixels = RNG.integers(0, 256, (count, 2, 2), dtype=np.uint8)
    for index, each in enumerate(pixels):
        colour = np.stack([each, each ^ 1, each ^ 2], axis=-1)
        write(tmp_path / f"{index:03}.png", colour if index == first else each)
    fractions: list[float] = []
    found = data.load(tmp_path, held_out=0, progress=fractions.append)
    expected = np.repeat(pixels[:, None], 3, axis=1)
    expected[first] ^= np.array([0, 1, 2], np.uint8)[:, None, None]
    assert np.array_equal(found.train.numpy(), expected)
    assert fractions == ([1.0] if count <= images.CHUNK else [images.CHUNK / count, 1.0])


def opaque(alpha: int = 255) -> np.ndarray:
    return np.concatenate([COLOUR[0], np.full((9, 7, 1), alpha, np.uint8)], axis=-1)


def palette(path: Path, **options: Any) -> None:
    Image.fromarray(COLOUR[0]).quantize(16).save(path, **options)


@pytest.mark.parametrize(
    ("save", "grey"),
    [
        (lambda path: Image.fromarray(GREY[0] > 99).save(path), True),
        (lambda path: Image.fromarray(GREY[0] // 85 * 85).save(path, bits=2), True),
        (palette, False),
        (lambda path: Image.fromarray(opaque()).save(path), False),
        (lambda path: Image.fromarray(opaque()[..., 2:]).save(path), True),
    ],
    ids=["1 bit", "2 bits", "palette", "opaque RGBA", "opaque grey"],
)
def test_what_converts_without_loss(
    tmp_path: Path, save: Callable[[Path], None], grey: bool
) -> None:
    save(tmp_path / "a.png")
    found = data.load(tmp_path, held_out=0).train[0]
    original = Image.open(tmp_path / "a.png")
    expected = np.asarray(original.convert("L" if grey else "RGB"))
    assert np.array_equal(found.numpy(), expected if grey else expected.transpose(2, 0, 1))
    shown = np.broadcast_to(found.numpy(), (3, 9, 7)).transpose(1, 2, 0)
    assert np.array_equal(shown, np.asarray(original.convert("RGBA"))[..., :3])


def test_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    write(tmp_path / "a.png", GREY[0], exif=exif)
    found = data.load(tmp_path, held_out=0).train[0].numpy()
    assert np.array_equal(found, np.rot90(GREY[0], -1))


def png(width: int, height: int, depth: int, kind: int, samples: int) -> bytes:
    """A black PNG of any depth: kind 0 is grey, 2 RGB, 4 grey and alpha, 6 RGB and alpha."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, depth, kind, 0, 0, 0))
    rows = zlib.compress((b"\0" + bytes(width * samples * depth // 8)) * height)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def frames(path: Path) -> None:
    pictures = [Image.fromarray(each) for each in COLOUR[:2]]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])


SENTENCES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "transparent": (
        "z.png",
        lambda path: write(path, opaque(254)),
        "expected opaque pixels, got transparent ones",
    ),
    "transparent WebP": (
        "z.webp",
        lambda path: write(path, opaque(0)),
        "expected opaque pixels, got transparent ones",
    ),
    "a colour of the palette": (
        "z.png",
        lambda path: palette(path, transparency=0),
        "expected opaque pixels, got transparent ones",
    ),
    "a transparent grey": (
        "z.png",
        lambda path: write(path, GREY[0], transparency=int(GREY[0, 0, 0])),
        "expected opaque pixels, got transparent ones",
    ),
    "CMYK": (
        "z.jpg",
        lambda path: Image.fromarray(COLOUR[0]).convert("CMYK").save(path),
        "expected 8-bit grey or RGB pixels, got CMYK",
    ),
    "16-bit grey": (
        "z.png",
        lambda path: write(path, GREY[0].astype(np.uint16) * 257),
        "expected 8-bit grey or RGB pixels, got 16 bits a channel",
    ),
    **{
        f"16-bit PNG of {samples} samples": (
            "z.png",
            lambda path, kind=kind, samples=samples: path.write_bytes(png(7, 9, 16, kind, samples)),
            "expected 8-bit grey or RGB pixels, got 16 bits a channel",
        )
        for kind, samples in ((2, 3), (4, 2), (6, 4))
    },
    "another size": (
        "z.png",
        lambda path: write(path, COLOUR[0, :8]),
        "expected 9 × 7 pixels as in a.png, got 8 × 7",
    ),
    "turned": (
        "z.png",
        lambda path: write(path, COLOUR[0].transpose(1, 0, 2)),
        "expected 9 × 7 pixels as in a.png, got 7 × 9",
    ),
    "one pixel": (
        "z.png",
        lambda path: write(path, COLOUR[0, :1, :1]),
        "expected images of 2 to 16,777,216 pixels, got 1 × 1",
    ),
    "too many pixels": (
        "z.png",
        lambda path: path.write_bytes(png(1 << 13, (1 << 11) + 1, 1, 0, 1)),
        "expected images of 2 to 16,777,216 pixels, got 2049 × 8192",
    ),
    "more than Pillow warns of": (
        "z.png",
        lambda path: path.write_bytes(png(12_000, 9_000, 1, 0, 1)),
        "expected an image, got DecompressionBombWarning",
    ),
    "more than Pillow opens": (
        "z.png",
        lambda path: path.write_bytes(png(1 << 16, 1 << 13, 1, 0, 1)),
        "expected an image, got DecompressionBombError",
    ),
    "animation": ("z.png", frames, "expected one image, got 2 frames"),
    "animated WebP": ("z.webp", frames, "expected one image, got 2 frames"),
    "text": (
        "z.png",
        lambda path: path.write_text("<html>"),
        r"expected an image \(PNG, JPEG, WEBP, BMP\), got 6 other bytes",
    ),
    "empty": ("z.png", lambda path: path.touch(), "got 0 other bytes"),
    "GIF": ("z.png", lambda path: write(path, GREY[0], format="GIF"), "other bytes"),
    "pipe": ("z.png", os.mkfifo, "expected a file, got a pipe, socket or device"),
}


@pytest.mark.parametrize("what", SENTENCES)
def test_one_sentence_names_what_is_refused(
    tmp_path: Path, what: str, recwarn: pytest.WarningsRecorder
) -> None:
    name, make, sentence = SENTENCES[what]
    write(tmp_path / "a.png", COLOUR[1])
    make(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{tmp_path / name}: .*{sentence}") as caught:
        data.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert not recwarn


@pytest.mark.parametrize("name", ["z.png", "z.jpg", "z.webp", "z.bmp"])
def test_a_truncated_image_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.png", COLOUR[0])
    write(tmp_path / name, COLOUR[1])
    whole = (tmp_path / name).read_bytes()
    for kept in (len(whole) // 2, 30):
        (tmp_path / name).write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=rf"damaged data file {tmp_path / name}: expected an"):
            data.load(tmp_path)


def test_each_bit_of_a_png_counts(tmp_path: Path) -> None:
    """Decoding alone does not see all that is flipped near the end of the compressed pixels."""
    pixels = COLOUR[0] % 4
    write(tmp_path / "a.png", pixels)
    content = (tmp_path / "a.png").read_bytes()
    refused = 0
    for place in range(8, len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            try:
                found = images.decode(bytes(changed), "a.png")
            except ValueError:
                refused += 1
            else:
                assert np.array_equal(found, pixels.transpose(2, 0, 1))
    assert refused > 7 * (len(content) - 20)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    write_all(tmp_path, ["a.png", "b.png"])
    with open(tmp_path / "b.png", "r+b") as file:
        file.truncate(checks.MOST_BYTES + 1)  # a hole
    with pytest.raises(ValueError, match=r"b.png: expected a file of at most 67,108,864 bytes"):
        data.load(tmp_path)


def test_more_than_the_memory_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_all(tmp_path, ["a.png", "b.png", "c.png"])
    assert checks.memory() > 1 << 28
    monkeypatch.setattr(checks, "memory", lambda: 3 * 9 * 7 - 1)
    with pytest.raises(ValueError, match=r"this machine's memory, got shape \(3, 9, 7\)"):
        data.load(tmp_path)


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expects images \(.png, .*.bmp\), got 0 other files"):
        data.load(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="got 1 other files"):
        data.load(tmp_path)


def test_paths_and_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path / "digits", ["a.png", "b.png"])
    assert data.load("digits").event_shape == (8, 8)
    assert data.load("./digits").event_shape == (9, 7)
    assert data.load(Path("digits")).name == str(tmp_path / "digits")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"notes.txt: expected a folder .*, got .*'.txt'"):
        data.load("notes.txt")
    for missing in ("there/photos", "photos.zip", Path("photos.npy")):
        with pytest.raises(FileNotFoundError, match=r"photos.* does not exist"):
            data.load(missing)
    with pytest.raises(ValueError, match="unknown data set ''"):
        data.load("")


def test_links(tmp_path: Path) -> None:
    """Are followed, each folder once."""
    write_all(tmp_path / "photos", ["a.png", "b.png"])
    (tmp_path / "set" / "cats").mkdir(parents=True)
    (tmp_path / "set" / "cats" / "1.png").symlink_to(tmp_path / "photos" / "a.png")
    (tmp_path / "set" / "dogs").symlink_to(tmp_path / "photos")
    found = data.load(tmp_path / "set", held_out=0)
    assert np.array_equal(found.train.numpy(), GREY[[0, 0, 1]])
    assert found.train_labels is not None
    assert found.train_labels.tolist() == [0, 1, 1]
    (tmp_path / "photos" / "up").symlink_to(tmp_path / "set")
    with pytest.raises(ValueError, match="expects a folder of its own, got a link to"):
        data.load(tmp_path / "set")


CLASSES = ["dogs/1.png", "cats/2.png", "dogs/a/3.png", "ants/4.png"]


def test_folders_are_classes(tmp_path: Path) -> None:
    write_all(tmp_path, CLASSES)
    found = data.load(tmp_path, held_out=0)
    assert np.array_equal(found.train.numpy(), GREY[[3, 1, 0, 2]])
    assert found.train_labels is not None
    assert found.train_labels.tolist() == [0, 1, 2, 2]
    assert found.train_labels.dtype == torch.int64
    write(tmp_path / "loose.png", GREY[9])
    assert data.load(tmp_path).train_labels is None


def test_a_folder_that_all_share_is_no_class(tmp_path: Path) -> None:
    write_all(tmp_path / "photos", CLASSES[:1])
    write_all(tmp_path / "photos", CLASSES[2:3])
    assert data.load(tmp_path).train_labels is None
    write_all(tmp_path / "photos", CLASSES)
    found = data.load(tmp_path, held_out=0)
    assert found.train_labels is not None
    assert found.train_labels.tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("place", ["", "wrapped/", "wrapped/twice/"])
def test_labels_of_dataset_json(tmp_path: Path, place: str) -> None:
    """As StyleGAN's and EDM's tools write it, whose folders are no classes."""
    names = [f"{index // 2:05}/img{index:08}.png" for index in range(6)]
    write_all(tmp_path / place, names)
    pairs = [[name, 10 * index % 7] for index, name in enumerate(names)]
    write_labels(tmp_path / place, [["away/img.png", 3], *pairs[::-1]])
    found = data.load(tmp_path, held_out=0)
    assert np.array_equal(found.train.numpy(), GREY[:6])
    assert found.train_labels is not None
    assert found.train_labels.tolist() == [label for _, label in pairs]
    for nothing in (None, []):
        write_labels(tmp_path / place, nothing)
        assert data.load(tmp_path).train_labels is None
    write_labels(tmp_path / place, pairs[:-1])
    with pytest.raises(ValueError, match=r"img00000005.png: expected a label of each image"):
        data.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"labels": [', "expected JSON, got JSONDecodeError"),
        ("[" * 100_000, "expected JSON, got RecursionError"),
        ("\udcff", "expected JSON, got UnicodeDecodeError"),
        ("[]", 'expected an object with "labels", got list'),
        ('{"label": []}', 'expected an object with "labels", got dict'),
        ('{"labels": {"a.png": 1}}', "expected a list of labels or null, got dict"),
        ('{"labels": ["a.png"]}', r"integer from 0 to 16777215, got 'a.png'"),
        ('{"labels": [["a.png", -1]]}', r"got \['a.png', -1\]"),
        ('{"labels": [["a.png", 16777216]]}', r"got \['a.png', 16777216\]"),
        ('{"labels": [["a.png", 1.0]]}', r"got \['a.png', 1.0\]"),
        ('{"labels": [["a.png", true]]}', r"got \['a.png', True\]"),
        ('{"labels": [["a.png", [0, 1]]]}', r"got \['a.png', \[0, 1\]\]"),
        ('{"labels": [["a.png", 1], ["a.png", 2]]}', "expected one label of a.png, got two"),
    ],
    ids=range(13),
)
def test_damaged_labels(tmp_path: Path, content: str, sentence: str) -> None:
    write_all(tmp_path, ["a.png", "b.png"])
    path = tmp_path / "dataset.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"damaged data file {path}: .*{sentence}"):
        data.load(tmp_path)
