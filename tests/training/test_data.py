# SPDX-License-Identifier: Apache-2.0
"""Are data sets read as they were written, and damaged files refused without executing anything?"""

from __future__ import annotations

import gzip
import lzma
import os
import pickle
import struct
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import idx, write_mnist

from pfgm_kernels.training import data
from pfgm_kernels.training.data import DataSet, idx_cifar
from pfgm_kernels.training.data.idx_cifar import IDX_IMAGES, read_cifar_batch, read_idx

PIXELS = np.arange(10_000 * 3072, dtype=np.uint32).astype(np.uint8)
LABELS = [i * 7 % 10 for i in range(10_000)]


def cifar_batch(pixels: bytes = PIXELS.tobytes(), labels: list[int] = LABELS) -> bytes:
    """A batch as Python 2 pickled it: byte strings, small integers in one list."""
    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    return (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03"
        + b"U\x06labelsq\x04]q\x05("
        + numbers
        + b"eU\x04dataq\x06T"
        + struct.pack("<I", len(pixels))
        + pixels
        + b"q\x07U\x09filenamesq\x08]q\x09(U\x05a.pngq\x0aeu."
    )


def test_digits_are_split_once_and_for_all() -> None:
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    assert digits.train.shape == (1437, 8, 8)
    assert digits.held_out.shape == (360, 8, 8)
    assert digits.train.dtype == torch.uint8
    assert torch.equal(digits.train, data.load("digits").train)
    both = digits.decode(torch.cat([digits.train, digits.held_out]))
    original = torch.from_numpy(load_digits().images).float() / 8 - 1
    assert set(map(bytes, (both * 8 + 8).round().byte().flatten(1).numpy())) == set(
        map(bytes, (original * 8 + 8).byte().flatten(1).numpy())
    )
    assert digits.held_out_labels is not None
    assert digits.held_out_labels.bincount().min() >= 34
    assert len(digits.references) == 1437


def test_each_digit_keeps_its_label() -> None:
    """Both parts together are all 1,797 digits, each once, each class in equal shares."""
    from sklearn.datasets import load_digits

    original, digits = load_digits(), data.load("digits")
    pixels = np.rint(original.images * (255 / 16)).astype(np.uint8)
    expected = Counter(
        (image.tobytes(), label) for image, label in zip(pixels, original.target, strict=True)
    )
    found: Counter[tuple[bytes, int]] = Counter()
    for images, labels in (
        (digits.train, digits.train_labels),
        (digits.held_out, digits.held_out_labels),
    ):
        assert labels is not None
        assert labels.dtype == torch.int64
        found.update((i.numpy().tobytes(), n) for i, n in zip(images, labels.tolist(), strict=True))
        shares = labels.bincount() / len(labels)
        whole = torch.from_numpy(original.target).bincount() / 1797
        assert ((shares - whole).abs() * len(labels) < 1).all()
    assert found == expected


def test_a_range_is_that_of_the_references() -> None:
    images = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    stored = DataSet("grey", images, images, None, None, low=-3.0, high=7.0)
    references = stored.references
    assert torch.equal(references.table[images.long()], stored.decode(images))
    assert stored.decode(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-3, 7]
    points = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert len(DataSet("points", points, points, None, None).references) == 5


def test_decoding_is_that_of_the_references() -> None:
    digits = data.load("digits")
    levels = digits.decode(torch.arange(256, dtype=torch.uint8))
    expected = torch.tensor([-1 + 2 * u / 255 for u in range(256)], dtype=torch.float64).float()
    assert torch.equal(levels, expected)
    assert digits.references.event_shape == (8, 8)


@pytest.mark.parametrize("name", ["two_moons", "swiss_roll", "eight_gaussians"])
def test_toy_sets(name: str) -> None:
    toy = data.load(name)
    assert toy.train.shape == (2000, 2)
    assert toy.held_out.shape == (500, 2)
    assert toy.train.dtype == torch.float32
    both = torch.cat([toy.train, toy.held_out])
    assert both.abs().max() == pytest.approx(1)
    assert both.mean(dim=0).abs().max() < 1e-5
    assert torch.equal(toy.train, data.load(name).train)
    assert toy.references.event_shape == (2,)


@pytest.mark.parametrize(("name", "classes"), [("two_moons", 2), ("eight_gaussians", 8)])
def test_toy_labels_are_those_of_their_points(name: str, classes: int) -> None:
    """The nearest other point has the same label, within a part and from one part to the other."""
    toy = data.load(name)
    assert toy.train_labels is not None
    assert toy.held_out_labels is not None
    assert torch.equal(toy.train_labels.unique(), torch.arange(classes))
    within = torch.cdist(toy.train, toy.train).fill_diagonal_(torch.inf).argmin(1)
    assert (toy.train_labels[within] == toy.train_labels).double().mean() > 0.99
    exact = "donot_use_mm_for_euclid_dist"
    distance, across = torch.cdist(toy.held_out, toy.train, compute_mode=exact).min(1)
    assert distance.min() > 0  # no point is in both
    assert (toy.train_labels[across] == toy.held_out_labels).double().mean() > 0.99


def test_the_shapes_of_the_toy_sets() -> None:
    gaussians, roll = data.load("eight_gaussians"), data.load("swiss_roll")
    assert gaussians.train_labels is not None
    centers = torch.stack(
        [gaussians.train[gaussians.train_labels == label].mean(0) for label in range(8)]
    )
    angles = torch.atan2(centers[:, 1], centers[:, 0]).sort().values
    torch.testing.assert_close(angles.diff(), torch.full((7,), np.pi / 4), rtol=0, atol=0.02)
    # The roll is a line: it leaves most of its square empty, which its height would fill.
    assert roll.train_labels is None
    cells = (roll.train * 9.999 + 10).long().unique(dim=0)
    assert 100 < len(cells) < 200


def test_moments() -> None:
    """Of more points than are decoded at a time, against those of all at once."""
    digits = data.load("digits")
    points = digits.decode(digits.train).double()
    center, spread = digits.moments
    torch.testing.assert_close(center, points.mean(dim=0).float())
    assert spread == pytest.approx((points - points.mean(dim=0)).square().mean().sqrt().item())


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'imagenet'; expected one of digits, .*cifar10"):
        data.load("imagenet")


def test_folder_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PFGM_DATA", "")
    with pytest.raises(ValueError, match="PFGM_DATA"):
        data.load("mnist")
    monkeypatch.delenv("PFGM_DATA")
    with pytest.raises(ValueError, match="PFGM_DATA"):
        data.load("mnist")
    monkeypatch.setenv("PFGM_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="cifar10/ or cifar-10-batches-py/"):
        data.load("cifar10")
    (tmp_path / "mnist").mkdir()
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        data.load("mnist")


def test_mnist_reads_as_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PFGM_DATA", str(tmp_path))
    written = write_mnist(tmp_path)
    mnist = data.load("mnist")
    assert np.array_equal(mnist.train.numpy(), written["train-images-idx3-ubyte.gz"])
    assert np.array_equal(mnist.held_out.numpy(), written["t10k-images-idx3-ubyte.gz"])
    assert mnist.train_labels is not None
    assert np.array_equal(mnist.train_labels.numpy(), written["train-labels-idx1-ubyte.gz"])
    assert mnist.held_out_labels is not None
    assert np.array_equal(mnist.held_out_labels.numpy(), written["t10k-labels-idx1-ubyte.gz"])


@pytest.mark.parametrize("place", [".", "raw", "MNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_mnist_by_path(tmp_path: Path, place: str, packed: bool) -> None:
    """As the originals come, and where and as torchvision unpacks them."""
    written = write_mnist(tmp_path)
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for path in (tmp_path / "mnist").iterdir():
        content = path.read_bytes()
        path.unlink()
        if packed:
            (tmp_path / place / path.name).write_bytes(content)
        else:
            (tmp_path / place / path.stem).write_bytes(gzip.decompress(content))
    mnist = data.load(tmp_path)
    assert mnist.name == str(tmp_path)
    assert np.array_equal(mnist.train.numpy(), written["train-images-idx3-ubyte.gz"])
    assert np.array_equal(mnist.held_out.numpy(), written["t10k-images-idx3-ubyte.gz"])
    assert mnist.held_out_labels is not None
    assert np.array_equal(mnist.held_out_labels.numpy(), written["t10k-labels-idx1-ubyte.gz"])
    for share in (0, 0.5):
        with pytest.raises(ValueError, match=rf"held_out expects no share for {tmp_path}, which"):
            data.load(tmp_path, held_out=share)


def test_mnist_as_torchvision_unpacks_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PFGM_DATA", str(tmp_path))
    write_mnist(tmp_path)
    (tmp_path / "MNIST").mkdir()
    (tmp_path / "mnist").rename(tmp_path / "MNIST" / "raw")
    mnist = data.load("mnist")
    assert (mnist.name, len(mnist.train), len(mnist.held_out)) == ("mnist", 7, 5)


def test_mnist_with_too_few_labels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PFGM_DATA", str(tmp_path))
    write_mnist(tmp_path)
    labels = np.zeros(6, np.uint8)
    path = tmp_path / "mnist" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(0x801, labels)))
    with pytest.raises(ValueError, match="got 6 labels and 7 images"):
        data.load("mnist")


IMAGES = np.zeros((3, 28, 28), np.uint8)


# Without the time, which the names of the tests would hold.
compressed = partial(gzip.compress, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (compressed(idx(0x801, IMAGES)), "magic number 0x0803, got 0x0801"),
        (compressed(idx(0x803, IMAGES)[:-1]), "2368 bytes for shape .*, got 2367 bytes"),
        (compressed(idx(0x803, IMAGES) + b"x"), "2368 bytes for shape .*, got 2369 bytes or more"),
        (compressed(idx(0x803, IMAGES) + bytes(99)), "2368 bytes .*, got 2369 bytes or more"),
        (compressed(b"\0\0\x08\x03\0"), "a header of 16 bytes, got 5 bytes"),
        (compressed(idx(0x803, IMAGES))[:-9], "a whole compressed file"),
        (idx(0x803, IMAGES), "a whole compressed file"),
        (b"", "a header of 16 bytes, got 0 bytes"),
    ],
)
def test_damaged_idx(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}: expected {message}"):
        read_idx(path, IDX_IMAGES)


def test_a_header_is_not_taken_at_its_word(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(struct.pack(">4I", 0x803, *[1 << 31] * 3) + bytes(100))
    with pytest.raises(
        ValueError, match=rf"{path}: expected data that fit the .* GiB of this mach"
    ):
        read_idx(path, IDX_IMAGES)


def test_cifar_batch_of_python_2_in_xz(tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1.xz"
    path.write_bytes(lzma.compress(cifar_batch(), preset=0))
    images, labels = read_cifar_batch(path)
    assert images.shape == (10_000, 3, 32, 32)
    assert np.array_equal(images.numpy().ravel(), PIXELS)
    assert labels.tolist() == LABELS


def test_cifar_batch_of_python_3(tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1"
    content = {b"labels": LABELS, b"data": PIXELS.reshape(10_000, 3072), b"filenames": [b"7.png"]}
    path.write_bytes(pickle.dumps(content, protocol=4))
    images, labels = read_cifar_batch(path)
    assert np.array_equal(images.numpy().ravel(), PIXELS)
    assert labels.tolist() == LABELS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (cifar_batch()[:1_000_000], "a whole pickle, got one of 1000000 bytes"),
        (cifar_batch(PIXELS.tobytes()[:-1]), "10000 rows of 3072 bytes, got no such block"),
        (cifar_batch(labels=LABELS[:-1]), "10000 labels of 0 ... 9, got 9999 labels"),
        (cifar_batch(labels=[*LABELS[:-1], 10]), "labels of 0 ... 9, got 10000 labels of 0 ... 10"),
        (b"", "a whole pickle, got one of 0 bytes"),
    ],
    ids=["truncated", "short block", "label missing", "label of 10", "empty"],
)
def test_damaged_cifar_batch(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}: expected .*{message}"):
        read_cifar_batch(path)


def test_truncated_xz(tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1.xz"
    path.write_bytes(lzma.compress(cifar_batch(), preset=0)[:-20])
    with pytest.raises(ValueError, match=rf"{path}: expected a whole compressed file"):
        read_cifar_batch(path)


class _Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_no_pickle_is_executed(tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "data_batch_1"
    content = pickle.dumps({b"data": _Malicious(marker), b"labels": LABELS})
    pickle.loads(content)
    marker.rmdir()  # it was created: this pickle does something when executed
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no such block"):
        read_cifar_batch(path)
    assert not marker.exists()


def test_cifar10_is_put_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Five batches to train on, in their order, and the test batch held out."""
    (tmp_path / "cifar10").mkdir()
    monkeypatch.setenv("PFGM_DATA", str(tmp_path))

    def batch(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        index = {f"data_batch_{i}.xz": i for i in range(1, 6)} | {"test_batch.xz": 9}
        value = index[path.name]
        return torch.full((2, 3, 4, 4), value, dtype=torch.uint8), torch.tensor([value, value + 10])

    monkeypatch.setattr(idx_cifar, "read_cifar_batch", batch)
    cifar = data.load("cifar10")
    assert cifar.train[:, 0, 0, 0].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert cifar.train_labels is not None
    assert cifar.train_labels.tolist() == [1, 11, 2, 12, 3, 13, 4, 14, 5, 15]
    assert cifar.held_out[:, 0, 0, 0].tolist() == [9, 9]
    assert cifar.held_out_labels is not None
    assert cifar.held_out_labels.tolist() == [9, 19]


@pytest.mark.exhaustive
@pytest.mark.skipif(not os.environ.get("PFGM_DATA"), reason="PFGM_DATA is not set")
@pytest.mark.parametrize(
    ("name", "train", "held_out", "mean"),
    [("mnist", (60000, 28, 28), 10000, 33.318), ("cifar10", (50000, 3, 32, 32), 10000, 120.707)],
)
def test_real_images(name: str, train: tuple[int, ...], held_out: int, mean: float) -> None:
    images = data.load(name)
    assert images.train.shape == train
    assert len(images.held_out) == held_out
    assert images.train_labels is not None
    assert images.train_labels.bincount().sum() == train[0]
    assert images.train.numpy().mean() == pytest.approx(mean, abs=1e-3)  # published statistics
