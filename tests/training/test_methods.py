# SPDX-License-Identifier: Apache-2.0
"""Is each method the loss, the targets and the sampler that it is named after?"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from pfgm_kernels import ReferenceSet, poisson_field, posterior_mean
from pfgm_kernels.flow import FieldLoss, PosteriorMeanLoss, UnnormalizedLoss
from pfgm_kernels.training import data, methods
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.generate import Sampler, Sampling
from pfgm_kernels.training.ranks import Ranks
from pfgm_kernels.training.trainer import Training, load_model, train

TINY: dict[str, Any] = {"width": 8, "depth": 1, "batch_size": 16, "warmup": 4, "steps": 3}
QUIET = Console(quiet=True)
EACH: list[dict[str, Any]] = [
    {"method": "pfgm"},
    {"method": "pfgm", "D": 16},
    {"method": "pfgm", "predicts": "field"},
    {"method": "pfgm", "predicts": "denoiser"},
    {"method": "pfgm", "references": 64},
    {"method": "unnormalized"},
    {"method": "pfgmpp", "D": 16},
    {"method": "pfgmpp", "D": 16, "predicts": "denoiser", "targets": "clean"},
    {"method": "pfgmpp", "D": 16, "predicts": "denoiser", "references": 64},
    {"method": "pfgmpp", "D": math.inf, "predicts": "denoiser"},
]


@pytest.fixture(scope="module")
def moons() -> DataSet:
    return data.load("two_moons")


def config_of(moons: DataSet, **options: Any) -> TrainConfig:
    return TrainConfig.for_data(moons, **(TINY | options))


def references_of(config: TrainConfig, points: DataSet) -> ReferenceSet | None:
    return methods.references_of(config, points, torch.device("cpu"), Ranks())


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("options", EACH, ids=lambda options: " ".join(map(str, options.values())))
def test_each_trains_and_samples(
    moons: DataSet, tmp_path: Path, options: dict[str, Any], conditional: bool
) -> None:
    config = config_of(moons, conditional=conditional, **options)
    run = train(config, moons, tmp_path, console=QUIET)
    assert run.finished
    assert all(math.isfinite(loss) for loss in run.losses)
    model, config = load_model(tmp_path)
    (part,) = Sampler(model, config, Sampling(steps=4)).generate(range(5), QUIET)
    assert part.result.x.shape == (5, 2)
    assert torch.isfinite(part.result.x).all()


@pytest.mark.parametrize("D", [1, 16, math.inf])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("method", ["pfgm", "pfgmpp"])
@pytest.mark.parametrize("predicts", ["mean", "denoiser"])
def test_the_exact_predictions_have_no_loss(
    moons: DataSet, D: float, conditional: bool, method: str, predicts: str
) -> None:
    """Whatever a model predicts, the exact one of it is the minimum of the method's loss."""
    if method == "pfgmpp" and D == 1:
        D = 3
    options = {"method": method, "predicts": predicts, "D": D, "conditional": conditional}
    training = Training(config_of(moons, **options), moons)

    def exact(x: Tensor, t: Tensor, **labels: Tensor) -> Tensor:
        known = {"D": D} | labels
        if predicts == "denoiser":
            return posterior_mean(x, t, training.references, **known)
        gamma = training.config.gamma
        return poisson_field(x, t, training.references, gamma=gamma, scale=2**0.5, **known)

    predicted = methods.as_predicted(training.config, exact)
    labels = {"labels": moons.train_labels[:64]} if conditional else {}
    generator = torch.Generator().manual_seed(0)
    assert training.loss(predicted, moons.train[:64], generator, **labels) < 1e-8


def test_the_losses_are_given_the_configs_numbers(moons: DataSet) -> None:
    options = {"D": 9.0, "sigma_data": 0.3, "log_sigma_mean": -2.0, "log_sigma_std": 0.7}
    for targets in ("exact", "clean"):
        config = config_of(moons, method="pfgmpp", targets=targets, **options)
        loss = methods.make_loss(config, references_of(config, moons))
        assert isinstance(loss, PosteriorMeanLoss)
        assert (loss.D, loss.sigma_data) == (9, 0.3)
        assert loss.heights.keywords == {"D": 9, "mean": -2.0, "std": 0.7}
        assert (loss.references is None) == (targets == "clean")
    config = config_of(moons, D=9.0, sigma=0.02, tau=0.05, M=77, restrict_M=False, gamma=0.4)
    loss = methods.make_loss(config, moons.references)
    noise = {"sigma": 0.02, "tau": 0.05, "M": 77, "restrict_M": False, "D": 9}
    assert isinstance(loss, FieldLoss)
    assert (loss.perturb.keywords, loss.gamma) == (noise, 0.4)
    raw = methods.make_loss(
        replace(config, method="unnormalized", predicts="field"), moons.references
    )
    assert isinstance(raw, UnnormalizedLoss)
    assert raw.perturb.keywords == noise


@pytest.mark.parametrize("conditional", [False, True])
def test_targets_of_no_references_have_none_prepared(moons: DataSet, conditional: bool) -> None:
    config = config_of(moons, method="pfgmpp", targets="clean", conditional=conditional)
    raw = config_of(moons, method="unnormalized", predicts="field", conditional=conditional)
    unread = replace(moons, name="other")  # whose references are not prepared yet
    for each in (config, raw):
        training = Training(each, unread)
        assert training.references is None
        assert math.isfinite(training.advance().loss)
    assert "references" not in vars(unread)


@pytest.mark.parametrize("conditional", [False, True])
def test_random_references_hold_the_batch(moons: DataSet, conditional: bool) -> None:
    """So many of them, others each step, all different; the batch's points are among them."""
    training = Training(config_of(moons, references=40, conditional=conditional), moons)
    seen = []
    loss = training.loss

    def watched(network, batch, **options):
        rows = {tuple(row) for row in loss.references.values.tolist()}
        assert len(loss.references) == len(rows) == 40
        assert {tuple(row) for row in batch.tolist()} < rows
        if conditional:
            places = [(moons.train == row).all(1).nonzero().item() for row in batch]
            assert options["labels"].tolist() == moons.train_labels[places].tolist()
            assert loss.references.labels is not None
        seen.append(rows)
        return loss.per_query(network, batch, **options)

    class Watch:
        per_query = staticmethod(watched)

        def __setattr__(self, name, value):
            setattr(loss, name, value)

    training.loss = Watch()
    training.advance()
    training.advance()
    assert seen[0] != seen[1]


def test_classes_are_those_of_the_labels(moons: DataSet) -> None:
    config = config_of(moons, conditional=True)
    assert config.classes == 2
    references = references_of(config, moons)
    assert torch.equal(references.labels, moons.train_labels)
    assert references_of(config_of(moons), moons).labels is None
    with pytest.raises(ValueError, match="expects data with labels, got two_moons"):
        config_of(replace(moons, train_labels=None), conditional=True)
    with pytest.raises(ValueError, match="classes expects at least 2, got 1"):
        references_of(replace(config, classes=1), moons)
    clean = replace(config, method="pfgmpp", targets="clean", predicts="denoiser", classes=1)
    with pytest.raises(ValueError, match="classes expects at least 2, got 1"):
        references_of(clean, moons)
    digits = data.load("digits")
    images = references_of(config_of(digits, conditional=True), digits)
    assert torch.equal(images.labels, digits.train_labels)
    assert images.values.dtype == torch.uint8


def test_samples_are_of_each_class_in_turn(moons: DataSet) -> None:
    """By the exact field: each sample is a point of its class."""
    config = config_of(moons, conditional=True)
    references = references_of(config, moons)

    def field(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return poisson_field(x, t, references, labels=labels)

    for labels, expected in (((), [0, 1, 0, 1, 0]), ((1,), [1] * 5), ((1, 1, 0), [1, 1, 0, 1, 1])):
        how = Sampling(steps=30, batch=6, labels=labels)
        (part,) = Sampler(field, config, how).generate(range(5), QUIET)
        nearest = torch.cdist(part.result.x, moons.train).argmin(1)
        assert moons.train_labels[nearest].tolist() == expected


def test_the_substitution_is_for_predicted_heights(moons: DataSet) -> None:
    found = methods.substitution(config_of(moons, predicts="field", gamma=0.3))
    assert found is not None
    assert (found.gamma, found.below) == (0.3, 0.3)
    for options in ({}, {"predicts": "denoiser"}, {"method": "unnormalized"}):
        assert methods.substitution(config_of(moons, **options)) is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "pfgm+"}, "method expects one of pfgm, unnormalized, pfgmpp, got 'pfgm\\+'"),
        ({"targets": "noisy"}, "targets expects one of exact, clean"),
        ({"predicts": "noise"}, "predicts expects one of mean, denoiser, field"),
        ({"method": "unnormalized", "predicts": "mean"}, "got predicts=mean"),
        ({"method": "pfgmpp", "predicts": "field"}, "got predicts=field"),
        ({"method": "unnormalized", "D": math.inf}, "expects a finite D, got inf"),
        ({"predicts": "field", "D": math.inf}, "expects a finite D, got inf"),
        ({"method": "unnormalized", "references": 99}, "where no target is of references, got 99"),
        ({"references": 15}, r"at least the batch_size \(16\).*got 15"),
        ({"references": -1}, "references expects an integer ≥ 0, got -1"),
        ({"predicts": "mean", "network": "unet"}, "expects network=perceptron, got unet"),
        ({"D": 0}, "D expects a number > 0"),
    ],
)
def test_what_does_not_go_together(moons: DataSet, options: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        config_of(moons, **options)
