# SPDX-License-Identifier: Apache-2.0
"""Is the denoiser's loss EDM's, on the posterior mean? And what all losses have in common."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from pfgm_kernels import ReferenceSet, posterior_mean
from pfgm_kernels.flow import (
    FieldLoss,
    PosteriorMeanLoss,
    Preconditioned,
    UnnormalizedLoss,
    heights,
    loss,
    perturb_at,
)

EVENT = (2, 3)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(count: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, *EVENT, dtype=torch.float64, generator=seeded()).to(dtype)


class Spy(nn.Module):
    """A linear denoiser, or field, that remembers its queries and what else it was given."""

    def __init__(self, outputs: int = 6, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.linear = nn.Linear(6, outputs, dtype=dtype)
        nn.init.normal_(self.linear.weight, generator=seeded())
        nn.init.normal_(self.linear.bias, generator=seeded(4))

    def forward(self, x: Tensor, t: Tensor, **keywords: Tensor) -> Tensor:
        self.x, self.t, self.keywords = x, t, keywords
        output = self.linear(x.flatten(1))
        return output.view(x.shape) if output.shape[1] == 6 else output


def oracle_mean(x: Tensor, t: Tensor, x0: Tensor, D: float) -> Tensor:
    """E[x0 | x, t] in float64 by direct differences."""
    squared = (x[:, None] - x0).flatten(2).square().sum(2)
    if math.isinf(D):
        logits = -squared / (2 * t[:, None] ** 2)
    else:
        logits = -(6 + D) / 2 * (squared + t[:, None] ** 2).log()
    return torch.einsum("bn,nij->bij", logits.softmax(1), x0)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("D", "options"),
    [(1, {}), (2.5, {"sigma_data": 2.0, "mean": 0.3, "std": 0.5}), (128, {}), (math.inf, {})],
)
def test_value_and_gradient(D, options, whole):
    x0, denoiser = data(), Spy()
    loss_fn = PosteriorMeanLoss(x0 if whole else None, D=D, **options)
    found = loss_fn(denoiser, x0[:16], seeded())
    found.backward()

    generator = seeded()
    level = {name: options[name] for name in ("mean", "std") if name in options}
    t = heights(16, D=D, generator=generator, dtype=torch.float64, **level)
    assert torch.equal(denoiser.t, t)
    assert torch.equal(denoiser.x, perturb_at(x0[:16], t, D=D, generator=generator))
    target = oracle_mean(denoiser.x, t, x0, D) if whole else x0[:16]
    sigma = t / (1 if math.isinf(D) else math.sqrt(D))
    sigma_data = options.get("sigma_data", 0.5)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    again = Spy()
    squared = (again(denoiser.x, t) - target).square()
    expected = (weight[:, None, None] * squared).sum() / (16 * 6)
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    for one, other in zip(denoiser.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("D", [1, math.inf])
def test_the_network_inside_sees_a_plain_mean_squared_error(D):
    """λ c_out² = 1: what EDM's preconditioning and weight are made for."""
    x0 = data()
    ends = []
    for size in (0.0, 1.0):
        inner = Spy()
        nn.init.zeros_(inner.linear.weight)
        nn.init.constant_(inner.linear.bias, size)
        found = PosteriorMeanLoss(D=D, sigma_data=0.7)(
            Preconditioned(lambda x, c, inner=inner: inner(x, c), D=D, sigma_data=0.7), x0, seeded()
        )
        generator = seeded()
        t = heights(40, D=D, generator=generator, dtype=torch.float64)
        x = perturb_at(x0, t, D=D, generator=generator)
        sigma = t[:, None, None] / (1 if math.isinf(D) else math.sqrt(D))
        skip, out = 0.49 / (sigma**2 + 0.49), 0.7 * sigma / (sigma**2 + 0.49).sqrt()
        wanted = (x0 - skip * x) / out
        torch.testing.assert_close(found, (size - wanted).square().mean(), rtol=1e-10, atol=0)
        ends.append(found)
    assert ends[0] != ends[1]


@pytest.mark.parametrize("D", [1, 128, math.inf])
def test_the_posterior_mean_itself_has_no_loss(D):
    x0 = data(dtype=torch.float32)
    loss_fn = PosteriorMeanLoss(ReferenceSet(x0), D=D)
    assert loss_fn(lambda x, t: posterior_mean(x, t, x0, D=D), x0, seeded()) == 0
    assert PosteriorMeanLoss(D=D)(lambda x, t: posterior_mean(x, t, x0, D=D), x0, seeded()) > 0


LOSSES = {
    "field": lambda x0: (FieldLoss(x0), 7),
    "eq. 10": lambda x0: (UnnormalizedLoss(sigma=1.0, M=20), 7),
    "mean": lambda x0: (PosteriorMeanLoss(x0, D=2), 6),
    "x0": lambda x0: (PosteriorMeanLoss(D=2), 6),
}


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_leaves_the_target_alone(name):
    """The network's output in bfloat16 is cast up; queries and targets are those without."""
    x0 = data(dtype=torch.float32)
    loss_fn, outputs = LOSSES[name](x0)
    network = Spy(outputs, torch.float32)
    seen = []

    def rounded(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t).bfloat16()

    def automatic(x: Tensor, t: Tensor) -> Tensor:
        seen.append(network(x, t).dtype)
        with torch.autocast("cpu", enabled=False):
            return network(x, t).bfloat16()

    expected = loss_fn(rounded, x0, seeded())
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_fn(automatic, x0, seeded())
    assert seen == [torch.bfloat16]
    assert found.dtype == torch.float32
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_batches_of_16_bits_are_taken_in_float32(name, dtype):
    x0 = data().to(dtype)
    loss_fn, outputs = LOSSES[name](x0)
    network = Spy(outputs, torch.float32)
    found = loss_fn(network, x0, seeded())
    assert network.x.dtype == network.t.dtype == found.dtype == torch.float32
    again, _ = LOSSES[name](x0.float())
    assert found == again(network, x0.float(), seeded())


@pytest.mark.parametrize("name", LOSSES)
def test_labels_reach_the_network_and_the_op(name, monkeypatch):
    x0, asked = data(), []
    for function in ("poisson_field", "posterior_mean"):
        original = getattr(loss, function)

        def watched(*arguments, original=original, labels=None, **options):
            asked.append(labels)
            return original(*arguments, **options)

        monkeypatch.setattr(f"pfgm_kernels.flow.loss.{function}", watched)
    loss_fn, outputs = LOSSES[name](x0)
    network, labels = Spy(outputs), torch.arange(40)
    loss_fn(network, x0, seeded())
    assert network.keywords == {}
    loss_fn(network, x0, seeded(), labels)
    assert network.keywords["labels"] is labels
    loss_fn(network, x0, labels=labels)
    assert network.keywords["labels"] is labels
    needs_the_op = name in ("field", "mean")
    assert [each is labels for each in asked] == ([False, True, True] if needs_the_op else [])


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_loss_stays_whole(name):
    x0 = data(dtype=torch.float32)
    loss_fn, outputs = LOSSES[name](x0)
    network = Spy(outputs, torch.float32)
    run = torch.compile(lambda x0: loss_fn(network, x0), fullgraph=True, backend="eager")
    torch.manual_seed(0)
    found = run(x0)
    torch.manual_seed(0)
    torch.testing.assert_close(found, loss_fn(network, x0))


def test_another_range_is_warned_of_where_the_loss_is_called():
    x0 = data().clamp(-1, 1)
    loss_fn = PosteriorMeanLoss(x0, D=8)
    with pytest.warns(UserWarning, match="expected points in their range") as caught:
        loss_fn(Spy(), 100 * x0 + 300, seeded())
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(Spy(), 100 * x0 + 300, seeded())
        PosteriorMeanLoss(D=8)(Spy(), 100 * x0 + 300, seeded())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"D": 0}, ValueError, "D expects a number > 0, got 0"),
        ({"sigma_data": -1}, ValueError, "sigma_data expects a finite number > 0, got -1"),
        ({"std": 0}, ValueError, "std expects a finite number > 0, got 0"),
        ({"mean": math.inf}, ValueError, "mean expects a finite number, got inf"),
        ({"references": [0.0]}, TypeError, "x0 expects a tensor or a ReferenceSet, got list"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        PosteriorMeanLoss(**{"D": 1} | options)


def test_bad_batches_and_networks_are_named():
    loss_fn = PosteriorMeanLoss(data(), D=1)
    with pytest.raises(ValueError, match=r"\(B, \*event\) = \(5, 2, 3\), got \(5, 7\)"):
        loss_fn(Spy(7), data(5))
    with pytest.raises(TypeError, match="x0_batch expects a floating-point tensor"):
        loss_fn(Spy(), data(5).int())
    with pytest.raises(ValueError, match=r"x expects shape \(B, \*event\) with event \(2, 3\)"):
        loss_fn(lambda x, t: x, torch.zeros(5, 2))


def test_the_target_is_that_of_each_querys_class():
    """By the real op: a denoiser that knows the mean of the class has no loss."""
    x0 = torch.randn(60, 5, generator=seeded())
    labels = torch.arange(60) % 3
    references = ReferenceSet(x0, labels=labels)

    def denoiser(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        rows = range(len(x))
        return torch.cat(
            [posterior_mean(x[[i]], t[[i]], references, D=8, labels=labels[[i]]) for i in rows]
        )

    loss = PosteriorMeanLoss(references, D=8)
    value = loss(denoiser, x0[:20], seeded(), labels=labels[:20])
    assert value < 1e-10
    other = loss(denoiser, x0[:20], seeded(), labels=(labels[:20] + 1) % 3)
    assert other < 1e-10
    whole = loss(
        lambda x, t, labels: posterior_mean(x, t, references, D=8),
        x0[:20],
        seeded(),
        labels=labels[:20],
    )
    assert whole > 1e-3


@pytest.mark.parametrize(("D", "warned"), [(1, True), (2, True), (2.5, False), (math.inf, False)])
def test_a_loss_without_a_mean_warns(D, warned):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        PosteriorMeanLoss(D=D)
    assert len(seen) == warned
    if warned:
        assert f"D > 2 for a loss that has a mean (D ≥ 8 trains well), got {D}" in str(seen[0])
        assert seen[0].filename == __file__
