# SPDX-License-Identifier: Apache-2.0
"""Do the commands refuse hostile and damaged images in one sentence, and leave nothing behind?

What all is refused, and how, is in test_data_archives.py, test_data_images.py and
test_data_damage.py: here is one of each kind, by every command that reads what a user names.
"""

from __future__ import annotations

import io
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pfgm_kernels.cli import app
from pfgm_kernels.training.data import checks

DIGIT = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)


def png(pixels: np.ndarray = DIGIT) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def zipped(name: str, content: bytes, kind: int = 0) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", png())
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = kind << 16, zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
        return folder / "a.zip"

    return make


def folder_with(name: str, content: bytes | Callable[[Path], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "a.png").write_bytes(png())
        content(folder / name) if callable(content) else (folder / name).write_bytes(content)
        return folder

    return make


def bare(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def objects() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{}]), allow_pickle=True)
    return file.getvalue()


def turned_to(mode: str) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(DIGIT).convert(mode).save(path)


KINDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "absolute path": (zipped("/etc/z.png", png()), "a path within the archive, got one out of it"),
    "..": (zipped("../z.png", png()), "a path within the archive, got one out of it"),
    "link": (zipped("z.png", b"/etc/passwd", stat.S_IFLNK), "got a link or a device"),
    "bomb": (zipped("z.png", bytes(checks.MOST_BYTES + 1)), "a file of at most 67,108,864 bytes"),
    "truncated in a ZIP": (zipped("z.png", png()[:-20]), "a.zip/z.png: expected an image"),
    "truncated ZIP": (bare("a.zip", b"PK\3\4"), "a.zip: expected a whole ZIP file"),
    "truncated": (folder_with("z.png", png()[:-20]), "z.png: expected an image"),
    "mixed sizes": (folder_with("z.png", png(DIGIT[:5])), "expected 8 × 8 pixels as in a.png"),
    "CMYK": (folder_with("z.jpg", turned_to("CMYK")), "8-bit grey or RGB pixels, got CMYK"),
    "16 bits": (folder_with("z.png", turned_to("I;16")), "pixels, got 16 bits a channel"),
    "one pixel": (folder_with("z.png", png(DIGIT[:1, :1])), "2 to 16,777,216 pixels, got 1 × 1"),
    "no images": (lambda folder: folder, "expects images (.png, .jpg, .jpeg, .webp, .bmp), got 0"),
    "no images in a ZIP": (bare("a.zip", b"PK\5\6" + bytes(18)), "a.zip expects images"),
    "pickled objects": (bare("a.npy", objects()), "expected an array of numbers, got object"),
    "of another kind": (bare("a.tar", b""), "got a file that ends in '.tar'"),
    "nothing": (lambda folder: folder / "none", "none is none, or does not exist"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_sentence_by_each_command(tmp_path: Path, kind: str) -> None:
    make, sentence = KINDS[kind]
    (tmp_path / "given").mkdir()
    path, out = make(tmp_path / "given"), tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    for arguments in (
        ("train", "--data", path, "--out", out),
        ("evaluate", "--images", path, "--data", "digits", "--out", out),
        ("figures", "--data", path, "--out", out),
    ):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("pfgm: ")
        assert result.stderr.count("\n") == 1
        assert sentence in result.stderr
        assert str(path) in result.stderr
        assert sorted(tmp_path.rglob("*")) == before, "nothing is unpacked, and no run begun"
