# SPDX-License-Identifier: Apache-2.0
"""Are images judged by the network that was named, and called as it is meant to be?"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from pfgm_kernels.files import cache_folder
from pfgm_kernels.training import data
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.evaluation import (
    Convolutional,
    Perceptron,
    TorchScriptFeatures,
    classifier,
    convolutional,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


class Inception(nn.Module):
    """Called as ``inception-2015-12-05.pt``; its features are the first pixels of each channel."""

    def forward(
        self, img: Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        assert img.dtype == torch.uint8
        assert img.shape[1] == 3
        features = img.flatten(2)[:, :, 0].float()
        if return_features:
            return features
        bias = torch.tensor([0.0, 0.0, 100.0])
        logits = features if no_output_bias else features + bias
        return (logits / 50).softmax(dim=1)


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :5].double() / 2


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2].float() / 0


def saved(module: nn.Module, path: Path) -> TorchScriptFeatures:
    torch.jit.script(module).save(str(path))
    return TorchScriptFeatures(path)


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 3, 4, 5), generator=generator, dtype=torch.uint8)


def test_a_network_that_is_called_as_inception(tmp_path: Path, images: Tensor) -> None:
    judge = saved(Inception(), tmp_path / "inception.pt")
    assert judge.name == "inception.pt"
    first = images[:, :, 0, 0].double()
    np.testing.assert_array_equal(judge.features(images), first.numpy())
    expected = (first / 50).softmax(dim=1)
    np.testing.assert_allclose(judge.probabilities(images), expected, rtol=1e-5)


def test_grey_images_have_three_equal_channels(tmp_path: Path, images: Tensor) -> None:
    judge = saved(Inception(), tmp_path / "inception.pt")
    expected = images[:, :1, 0, 0].expand(-1, 3)
    for grey in (images[:, 0], images[:, :1]):
        np.testing.assert_array_equal(judge.features(grey), expected)


def test_a_plain_network(tmp_path: Path, images: Tensor) -> None:
    judge = saved(Plain(), tmp_path / "plain.pt")
    features = judge.features(images)
    np.testing.assert_array_equal(features, images.flatten(1)[:, :5].numpy() / 2)
    assert judge.probabilities(images) is None


def test_the_digest_is_of_the_file(tmp_path: Path) -> None:
    first, second = (saved(module, tmp_path / "x.pt") for module in (Plain(), Inception()))
    again = TorchScriptFeatures(tmp_path / "x.pt")
    assert first.digest != second.digest == again.digest


def test_what_is_no_such_network_is_refused(tmp_path: Path, images: Tensor) -> None:
    with pytest.raises(FileNotFoundError, match=r"the TorchScript file .*none\.pt; it does not"):
        TorchScriptFeatures(tmp_path / "none.pt")
    for content in (b"", b"not a network", b"PK\x03\x04 nor a ZIP"):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.pt is no network: expected a TorchScript"):
            TorchScriptFeatures(tmp_path / "bad.pt")
    torch.save(Plain().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt is no network"):
        TorchScriptFeatures(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"wrong.pt .*\(6, features\), got \(6, 3, 4, 5\)"):
        saved(Wrong(), tmp_path / "wrong.pt").features(images)
    with pytest.raises(ValueError, match=r"broken.pt expects to give finite features"):
        saved(Broken(), tmp_path / "broken.pt").features(images)
    with pytest.raises(ValueError, match=r"uint8 images .* got float32 of \(6, 3, 4, 5\)"):
        saved(Plain(), tmp_path / "plain.pt").features(images.float())
    with pytest.raises(ValueError, match=r"inception.pt does not take .* of shape \(6, 2, 4, 5\)"):
        saved(Inception(), tmp_path / "inception.pt").features(images[:, :2])


@pytest.fixture(scope="module")
def patterns() -> DataSet:
    """Four classes of 16 x 16 images in colour: stripes or squares, in two sizes."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(440) % 4
    at = torch.arange(16)
    stripes = [((at[:, None] // size) % 2).expand(16, 16) for size in (2, 4)]
    squares = [(at[:, None] // size + at // size) % 2 for size in (2, 4)]
    means = 80 + 90 * torch.stack(stripes + squares)[labels][:, None]
    images = means + 40 * torch.randn(440, 3, 16, 16, generator=generator)
    images = images.clamp(0, 255).to(torch.uint8)
    return DataSet("patterns", images[:400], images[400:], labels[:400], labels[400:])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


def test_the_convolutional_classifier(patterns: DataSet, cache: Path) -> None:
    """It learns, the same each time, whatever was drawn before."""
    first = Convolutional(patterns, passes=4)
    p = first.probabilities(patterns.held_out)
    assert p.shape == (40, 4)
    assert p.dtype == np.float64
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-12)
    assert (p.argmax(1) == patterns.held_out_labels.numpy()).mean() > 0.9
    [kept] = cache.iterdir()
    kept.unlink()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    with torch.device("meta"):
        again = Convolutional(patterns, passes=4)
    assert np.array_equal(again.probabilities(patterns.held_out), p)
    assert torch.equal(torch.get_rng_state(), before)


def test_features_lead_to_the_probabilities(patterns: DataSet) -> None:
    judge = Convolutional(patterns, passes=1)
    features = judge.features(patterns.held_out)
    assert features.shape == (40, 128)
    assert features.min() == 0
    last = judge._network[-1]
    logits = torch.from_numpy(features) @ last.weight.T + last.bias
    expected = logits.detach().softmax(dim=1)
    np.testing.assert_allclose(judge.probabilities(patterns.held_out), expected, rtol=1e-4)


def test_each_image_is_judged_by_itself(patterns: DataSet) -> None:
    judge = Convolutional(patterns, passes=1)
    whole = judge.features(patterns.held_out)
    alone = np.concatenate([judge.features(part) for part in patterns.held_out.split(7)])
    np.testing.assert_allclose(alone, whole, rtol=1e-4, atol=1e-5)


def test_a_classifier_is_trained_once(
    patterns: DataSet, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    train = Convolutional._train

    def watched(self: Convolutional, data: DataSet, *arguments: object) -> None:
        trained.append(data)
        train(self, data, *arguments)

    monkeypatch.setattr(Convolutional, "_train", watched)
    first = Convolutional(patterns, passes=1).features(patterns.held_out)
    assert np.array_equal(Convolutional(patterns, passes=1).features(patterns.held_out), first)
    assert len(trained) == 1
    other_held_out = replace(patterns, held_out=patterns.held_out[:3], name="other")
    Convolutional(other_held_out, passes=1)
    assert len(trained) == 1
    others = [
        replace(patterns, train_labels=patterns.train_labels.flip(0)),
        replace(patterns, train=patterns.train.flip(0)),
        replace(patterns, train=patterns.train.reshape(400, 3, 32, 8)),
    ]
    for count, other in enumerate(others, start=2):
        Convolutional(other, passes=1)
        assert len(trained) == count
    Convolutional(patterns, passes=2)
    assert len(trained) == 5
    monkeypatch.setattr(convolutional, "RECIPE", -1)
    Convolutional(patterns, passes=1)
    assert len(trained) == 6


def test_a_damaged_cache_is_trained_anew(patterns: DataSet, cache: Path) -> None:
    first = Convolutional(patterns, passes=1).features(patterns.held_out)
    [kept] = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-10])
    with pytest.warns(UserWarning, match=r"damaged checkpoint .* the classifier is trained anew"):
        again = Convolutional(patterns, passes=1)
    assert np.array_equal(again.features(patterns.held_out), first)
    assert kept.read_bytes() == whole


def test_without_a_cache(
    patterns: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="the classifier is not kept: .* Not a directory"):
        assert Convolutional(patterns, passes=1).features(patterns.held_out).shape == (40, 128)


def test_which_classifier(patterns: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutional, "PASSES", 1)
    assert isinstance(classifier(patterns), Convolutional)
    assert isinstance(classifier(data.load("digits")), Perceptron)
    slim = replace(patterns, train=patterns.train.reshape(400, 3, 32, 8))
    assert isinstance(classifier(slim), Perceptron)
    with pytest.raises(ValueError, match="a data set of images with labels, got 'patterns'"):
        Convolutional(replace(patterns, train_labels=None))
    with pytest.raises(ValueError, match="a data set with labels, got 'swiss_roll' without"):
        classifier(data.load("swiss_roll"))


@pytest.mark.exhaustive
@pytest.mark.skipif(not os.environ.get("PFGM_DATA"), reason="PFGM_DATA names no folder of MNIST")
def test_the_classifier_of_mnist() -> None:
    mnist = data.load("mnist")
    judge = Convolutional(mnist, console=Console())
    labels = mnist.held_out_labels.numpy()
    assert (judge.probabilities(mnist.held_out).argmax(1) == labels).mean() >= 0.99
