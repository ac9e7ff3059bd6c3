# SPDX-License-Identifier: Apache-2.0
"""Is a batch in another range than the references noticed, and no other batch?"""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch
from images import decode, synthetic_images
from torch import Tensor

from pfgm_kernels import ReferenceSet
from pfgm_kernels.flow import FieldLoss
from pfgm_kernels.training import data


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def field(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([x.flatten(1), t[:, None]], 1)


def warnings_of(references: Tensor | ReferenceSet, *batches: Tensor) -> list[str]:
    """Of one loss at one batch after the other."""
    loss_fn = FieldLoss(references)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches:
            loss_fn(field, batch, seeded())
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


@cache
def parts(name: str) -> tuple[Tensor, Tensor]:
    """Points to be references, 32 held-out ones; images in [-1, 1]."""
    if name == "digits":
        digits = data.load("digits")
        return digits.decode(digits.train), digits.decode(digits.held_out[:32])
    if name == "photographs":
        images = decode(synthetic_images())
        return images[:300], images[-32:]
    if name == "few":
        return tuple(part[:32] for part in parts("photographs"))
    d = {"normal": 3072, "points": 2}[name]
    points = torch.randn(300, d, generator=seeded())
    return points[:-32], points[-32:]


def unit(x: Tensor) -> Tensor:
    return (x + 1) / 2


def bytes_(x: Tensor) -> Tensor:
    return 127.5 * (x + 1)


def standard(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std()


def same(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize("name", ["digits", "photographs", "few"])
@pytest.mark.parametrize(
    ("of_references", "of_batch"),
    [
        (same, unit),
        (same, bytes_),
        (same, standard),
        (same, lambda x: x + 2),
        (unit, same),
        (unit, bytes_),
        (bytes_, unit),
        (standard, unit),
    ],
)
def test_another_range_is_one_warning(name, of_references, of_batch):
    known, held_out = parts(name)
    known, batch = of_references(known), of_batch(held_out)
    (message,) = warnings_of(known, batch, batch)
    assert f"got values in [{batch.min():.4g}, {batch.max():.4g}]" in message
    low, high = (float(end) for end in message.split("range, [")[1].split("]")[0].split(","))
    assert low == pytest.approx(known.min().item(), abs=0.1 * (high - low))
    assert high == pytest.approx(known.max().item(), abs=0.1 * (high - low))


@pytest.mark.parametrize("count", [1, 32])
@pytest.mark.parametrize("scale", [unit, bytes_])
def test_references_of_8_bits(scale, count):
    digits = data.load("digits")
    (message,) = warnings_of(digits.references, scale(parts("digits")[1])[:count])
    assert "expected points in their range, [-1, 1]" in message


@pytest.mark.parametrize("shift", [lambda x: x + 30, lambda x: -100 * x, lambda x: x.double() + 30])
def test_points_of_few_dimensions(shift):
    known, held_out = parts("points")
    assert len(warnings_of(known, shift(held_out))) == 1


def test_an_inverted_image_lies_far_from_all():
    known, held_out = parts("digits")
    assert len(warnings_of(known, -held_out)) == 1


@pytest.mark.parametrize("name", ["digits", "photographs", "few", "normal", "points"])
def test_held_out_points_are_of_the_range(name):
    known, held_out = parts(name)
    for count in (1, 2, 32):
        assert not warnings_of(known, held_out[:count])
    assert not warnings_of(known, known[:32])
    assert not warnings_of(known + 1e4, held_out + 1e4)


@pytest.mark.parametrize(
    "augment",
    [
        lambda x: x.flip(-1),
        lambda x: x.roll(2, -2),
        lambda x: (x + x.flip(0)) / 2,
        lambda x: x + 0.1 * torch.randn(x.shape, generator=seeded()),
        lambda x: x + torch.rand(x.shape, generator=seeded()) / 128,
        lambda x: torch.nn.functional.pad(x, (2, 2, 2, 2))[..., :-4, 4:],
        lambda x: unit(x).mul(1.4).clamp(0, 1) * 2 - 1,
    ],
)
@pytest.mark.parametrize("name", ["digits", "photographs"])
def test_augmentations_are_of_the_range(name, augment):
    known, held_out = parts(name)
    assert not warnings_of(known, augment(held_out))


def test_a_part_of_the_data_is_of_its_range():
    digits, groups = data.load("digits"), data.load("eight_gaussians")
    for found in (digits, groups):
        for label in found.train_labels.unique():
            part = found.decode(found.held_out[found.held_out_labels == label])
            assert not warnings_of(found.references, part)


@pytest.mark.parametrize("batch", [same, unit, bytes_])
def test_a_handful_of_references_or_equal_ones_have_no_range(batch):
    known, held_out = parts("digits")
    for references in (known[:1], known[:2], known[:1].expand(40, -1, -1), torch.ones(40, 8, 8)):
        assert not warnings_of(references, batch(held_out))


def test_sorted_references_are_seen_in_all_their_parts():
    found = data.load("eight_gaussians")
    known = found.decode(found.train)[found.train_labels.argsort()]
    assert len(known) > 1024
    for label in found.train_labels.unique():
        part = found.decode(found.held_out[found.held_out_labels == label])
        assert not warnings_of(known, part)


def test_duplicates_have_the_range_of_what_they_repeat():
    known, held_out = parts("digits")
    assert not warnings_of(known[:40].repeat(5, 1, 1), held_out)
    assert warnings_of(known[:40].repeat(5, 1, 1), unit(held_out))


def test_only_the_first_batch_is_looked_at():
    known, held_out = parts("digits")
    assert not warnings_of(known, held_out, bytes_(held_out))


def test_looking_draws_no_random_numbers():
    known, held_out = parts("digits")
    loss_fn = FieldLoss(known)
    with pytest.warns(UserWarning, match="expected points in their range"):
        first = loss_fn(field, unit(held_out), seeded())
    assert loss_fn(field, unit(held_out), seeded()) == first


@pytest.mark.parametrize("looked", [False, True])
def test_a_compiled_loss_stays_whole(looked):
    """It neither looks nor breaks the graph, be it compiled at its first batch or later."""
    known, held_out = parts("digits")
    loss_fn = FieldLoss(known)
    if looked:
        loss_fn(field, held_out)
    compiled = torch.compile(lambda x0: loss_fn(field, x0), fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.manual_seed(0)
        compiled_loss = compiled(bytes_(held_out))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        assert loss_fn(field, bytes_(held_out)) == compiled_loss
    assert len(caught) == (not looked)  # the look is still to come where there was none
