# SPDX-License-Identifier: Apache-2.0
"""Does any damage to a file of data give the data or one ValueError, and nothing else?"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pfgm_kernels.training import data
from pfgm_kernels.training.data import DataSet

COLOUR = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def images(method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for index, pixels in enumerate(COLOUR):
            archive.writestr(f"a/{index}.png", encoded(pixels, "png"))
        pairs = [[f"a/{index}.png", 2 - index] for index in range(3)]
        archive.writestr("dataset.json", json.dumps({"labels": pairs}))
    return file.getvalue()


def array() -> bytes:
    file = io.BytesIO()
    np.save(file, COLOUR)
    return file.getvalue()


def arrays(save: Callable) -> bytes:
    file = io.BytesIO()
    save(file, images=COLOUR, labels=np.arange(3)[::-1])
    return file.getvalue()


FILES = {
    "stored.zip": images(zipfile.ZIP_STORED),
    "deflated.zip": images(zipfile.ZIP_DEFLATED),
    "plain.npz": arrays(np.savez),
    "compressed.npz": arrays(np.savez_compressed),
    "a.npy": array(),
    "a.png": encoded(COLOUR[0], "png"),
    "a.jpg": encoded(COLOUR[0], "jpeg"),
    "a.webp": encoded(COLOUR[0], "webp"),
    "a.bmp": encoded(COLOUR[0], "bmp"),
}
CHECKED = ("stored.zip", "deflated.zip", "plain.npz", "compressed.npz", "a.png")
"""Formats with checksums: what they give is what was written."""
WHOLE: dict[str, DataSet] = {}


def read(folder: Path, name: str, content: bytes) -> DataSet:
    path = folder / name
    path.write_bytes(content)
    return data.load(folder if name in ("a.png", "a.jpg", "a.webp", "a.bmp") else path, held_out=0)


def same(left: DataSet, right: DataSet) -> bool:
    labels = (left.train_labels, right.train_labels)
    return torch.equal(left.train, right.train) and (
        labels == (None, None) or bool(None not in labels and torch.equal(*labels))
    )


def judge(folder: Path, name: str, content: bytes) -> None:
    try:
        found = read(folder, name, content)
    except ValueError as error:
        sentence = str(error)
    else:
        if name in CHECKED:
            assert same(found, WHOLE[name]), "damaged, and nobody noticed"
        return
    assert str(folder) in sentence
    assert "\n" not in sentence


@pytest.fixture(scope="module", params=FILES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    WHOLE[name] = read(folder, name, FILES[name])
    return folder


@pytest.mark.filterwarnings("ignore")  # Pillow's, of corrupt metadata
@settings(max_examples=max(1, settings.default.max_examples // 2))
@given(st.data())
def test_random_damage(name: str, folder: Path, data: st.DataObject) -> None:
    """Bytes changed, a part lost, others put in its place."""
    content = bytearray(FILES[name])
    places = st.integers(0, len(content) - 1)
    if data.draw(st.booleans()):
        for place in data.draw(st.lists(places, min_size=1, max_size=3)):
            content[place] ^= data.draw(st.integers(1, 255))
    else:
        start, end = sorted((data.draw(places), data.draw(places) + 1))
        content[start:end] = data.draw(st.binary(max_size=8))
    judge(folder, name, bytes(content))


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_damage_at_each_byte(name: str, folder: Path) -> None:
    content = FILES[name]
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        judge(folder, name, bytes(changed))
        if place % 4 == 0:
            judge(folder, name, content[:place])
