# SPDX-License-Identifier: Apache-2.0
"""Are ZIPs of images read as they were written, and hostile ones refused in one sentence?"""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfgm_kernels.training import data
from pfgm_kernels.training.data import checks, sources

COLOUR = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


PNG = png(COLOUR[0])


def member(name: str, kind: int = 0, method: int = zipfile.ZIP_DEFLATED) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr, info.compress_type = kind << 16, method
    return info


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_layout_of_dataset_tool(tmp_path: Path, method: int, labelled: bool) -> None:
    path = tmp_path / "edm.zip"
    names = [f"0000{index // 4}/img{index:08}.png" for index in range(6)]
    pairs = [[name, 5 - index] for index, name in enumerate(names)]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, each in zip(names, COLOUR, strict=True):
            archive.writestr(name, png(each))
        archive.writestr("dataset.json", json.dumps({"labels": pairs if labelled else None}))
    found = data.load(path, held_out=0)
    assert np.array_equal(found.train.numpy(), COLOUR.transpose(0, 3, 1, 2))
    labels = found.train_labels
    assert (labels is None) == (not labelled)
    if labels is not None:
        assert labels.tolist() == [5, 4, 3, 2, 1, 0]
    assert found.name == str(path)
    assert list(tmp_path.iterdir()) == [path], "nothing is unpacked"


def test_a_folder_and_its_archive_are_the_same(tmp_path: Path) -> None:
    names = ["train/b/1.png", "train/a/2.png", "val/b/3.png", "train/a/4.png"]
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/photos/._1.png", "of another system")
        archive.writestr("photos/.DS_Store", "of another system")
        for name, each in zip(names, COLOUR, strict=False):
            (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "photos" / name).write_bytes(png(each))
            packed = f"photos/{name}".replace("/", "\\") if "/a/" in name else f"./photos/{name}"
            archive.writestr(packed, png(each))
    found, loose = data.load(path), data.load(tmp_path / "photos")
    for part in ("train", "held_out", "train_labels", "held_out_labels"):
        assert getattr(found, part).tolist() == getattr(loose, part).tolist()
    assert len(found.train) == 3


def edited(change: Callable[[bytearray, int, int], None]) -> Callable[[zipfile.ZipFile], None]:
    """A second member, z.png, whose bytes change after it was written: the function takes all, and
    where its entry in the directory and its local header begin.
    """

    def write(archive: zipfile.ZipFile) -> None:
        archive.writestr(member("z.png"), PNG)
        archive.close()
        path = Path(str(archive.filename))
        content = bytearray(path.read_bytes())
        change(content, content.rindex(b"PK\1\2"), content.rindex(b"PK\3\4"))
        path.write_bytes(content)

    return write


def put(offset: int, form: str, value: int) -> Callable[[bytearray, int, int], None]:
    return lambda content, entry, _: struct.pack_into(form, content, entry + offset, value)


def rename(content: bytearray, entry: int, header: int) -> None:
    content[entry + 46 : entry + 51] = b"z.pnf"


def overlap(content: bytearray, entry: int, header: int) -> None:
    """Both members are the same bytes, as in bombs that need no member within a member."""
    struct.pack_into("<I", content, entry + 42, 0)


def hide(content: bytearray, entry: int, header: int) -> None:
    """The second entry of the directory is the comment of the first: one flipped bit may do it."""
    size = content.rindex(b"PK\5\6") - entry
    struct.pack_into("<H", content, content.index(b"PK\1\2") + 32, size)


HOSTILE: dict[str, tuple[Callable[[zipfile.ZipFile], None], str]] = {
    **{
        f"path {name}": (
            lambda archive, name=name: archive.writestr(member(name), PNG),
            "expects a path within the archive, got one out of it",
        )
        for name in ("/z.png", "../z.png", "a/../../z.png", "C:/z.png", "a/..\\z.png", "\\z.png")
    },
    "path of a folder": (
        lambda archive: archive.writestr(member("../", stat.S_IFDIR), b""),
        "expects a path within the archive, got one out of it",
    ),
    "escape sequence": (
        lambda archive: archive.writestr(member("\x1b[2Jz.png"), PNG),
        r"the member '\\x1b\[2Jz.png' expects a name of printable characters",
    ),
    "link": (
        lambda archive: archive.writestr(member("z.png", stat.S_IFLNK), b"/etc/passwd"),
        "the member 'z.png' expects a file or a folder, got a link or a device",
    ),
    "device": (
        lambda archive: archive.writestr(member("z.txt", stat.S_IFCHR), b""),
        "the member 'z.txt' expects a file or a folder, got a link or a device",
    ),
    "encrypted": (
        edited(put(8, "<H", 1)),
        "the member 'z.png' expects a plain file, got an encrypted one",
    ),
    "bzip2": (
        lambda archive: archive.writestr(member("z.png", method=zipfile.ZIP_BZIP2), PNG),
        "the member 'z.png' expects no compression or deflate, got method 12",
    ),
    "twice": (
        lambda archive: archive.writestr(member("a.png"), PNG),
        "the member 'a.png' expects a name of its own, got a second of that name",
    ),
    "bomb": (
        lambda archive: archive.writestr(member("z.png"), bytes(checks.MOST_BYTES + 1)),
        "z.png: expected a file of at most 67,108,864 bytes, got 67,108,865",
    ),
    "bomb of labels": (
        lambda archive: archive.writestr(member("dataset.json"), bytes(checks.MOST_BYTES + 1)),
        "dataset.json: expected a file of at most 67,108,864 bytes, got 67,108,865",
    ),
    "declared too large": (
        edited(put(24, "<I", 1 << 31)),
        "z.png: expected a file of at most 67,108,864 bytes, got 2,147,483,648",
    ),
    "declared too small": (edited(put(24, "<I", 20)), "z.png: expected a whole member, got BadZip"),
    "declared a little too large": (edited(put(24, "<I", len(PNG) + 1)), "damaged .*z.png: expect"),
    "another checksum": (
        edited(put(16, "<I", 1)),
        "z.png: expected a whole member, got BadZipFile",
    ),
    "another name": (edited(rename), "z.pnf: expected a whole member, got BadZipFile"),
    "another place": (edited(put(42, "<I", 7)), "z.png: expected a whole member, got BadZipFile"),
    "overlap": (edited(overlap), "z.png: expected a whole member, got BadZipFile"),
    "hidden": (edited(hide), "expected a directory of its members, got entries within an entry"),
    "no image": (
        lambda archive: archive.writestr(member("z.png"), b"hello"),
        r"z.png: expected an image \(PNG, JPEG, WEBP, BMP\), got 5 other bytes",
    ),
    "truncated image": (
        lambda archive: archive.writestr(member("z.png"), PNG[:-20]),
        "z.png: expected an image, got",
    ),
    "another size": (
        lambda archive: archive.writestr(member("z.png"), png(COLOUR[0, 1:])),
        "z.png: expected 5 × 4 pixels as in a.png, got 4 × 4",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_one_sentence_names_the_member(tmp_path: Path, what: str) -> None:
    write, sentence = HOSTILE[what]
    path = tmp_path / "hostile.zip"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # of a second member of the same name
        archive.writestr(member("a.png"), PNG)
        write(archive)
    with pytest.raises(ValueError, match=sentence) as caught:
        data.load(path, held_out=0)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_more_is_unpacked_than_declared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever a member holds: the decompressor is asked for so many bytes."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member("a.png"), PNG)
        edited(put(24, "<I", 20))(archive)
    taken = []
    content = sources.Archive(path)._file.open("z.png")
    monkeypatch.setattr(zipfile.ZipExtFile, "_update_crc", lambda self, part: taken.append(part))
    assert len(content.read()) == 20
    assert sum(map(len, taken)) == 20


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\5\6" + bytes(17), bytes(100)])
def test_what_is_no_archive(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data file {path}: expected a whole ZIP file, got Bad"):
        data.load(path)


def test_an_archive_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    zipfile.ZipFile(path, "w").close()
    with pytest.raises(ValueError, match=rf"{path} expects images .*, got 0 other files"):
        data.load(path)


def test_archives_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    for content in (PNG, b"hello"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.png", content)
        before = os.listdir("/proc/self/fd")
        if content is PNG:
            data.load(path, held_out=0)
        else:
            with pytest.raises(ValueError, match="other bytes"):
                data.load(path, held_out=0)
        assert os.listdir("/proc/self/fd") == before
