# SPDX-License-Identifier: Apache-2.0
"""Are networks what was asked for, called as the package says, and refused in one sentence?"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from pfgm_kernels.flow import Preconditioned, constants
from pfgm_kernels.training import data, networks
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.generate import Sampler, Sampling
from pfgm_kernels.training.networks import PublishedField, UNet
from pfgm_kernels.training.trainer import load_model, train

QUIET = Console(quiet=True)
OPTIONS = {"width": 8, "depth": 1, "gamma": 0.5, "D": 16, "sigma_data": 0.4}


def build(name: str, event_shape: tuple[int, ...], **options: object) -> nn.Module:
    torch.manual_seed(0)
    return networks.build(name, event_shape, **(OPTIONS | {"num_classes": 0} | options))


@pytest.mark.parametrize(
    ("event_shape", "predicts", "num_classes"),
    [
        ((28, 28), "denoiser", 0),
        ((1, 28, 28), "field", 5),
        ((3, 32, 32), "denoiser", 5),
        ((3, 32, 32), "field", 0),
    ],
)
def test_the_small_unet(event_shape: tuple[int, ...], predicts: str, num_classes: int) -> None:
    model = build("unet", event_shape, predicts=predicts, num_classes=num_classes).eval()
    assert 1.2e6 < sum(p.numel() for p in model.parameters()) < 1.22e6
    x, t = torch.randn(2, *event_shape), torch.tensor([0.3, 5.0])
    labels = {"labels": torch.tensor([1, 4])} if num_classes else {}
    output = model(x, t, **labels)
    assert output.shape == (x.shape if predicts == "denoiser" else (2, x[0].numel() + 1))
    assert not torch.equal(output, model(x, t.flip(0), **labels))
    if labels:
        assert not torch.equal(output, model(x, t, labels=labels["labels"].flip(0)))
    output.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_height_is_the_mean_of_a_channel_of_its_own() -> None:
    network = UNet("unet", (1, 28, 28), height=True).eval()
    seen = []
    network.unet.conv_out.register_forward_hook(lambda module, inputs, output: seen.append(output))
    field_x, field_t = network(torch.randn(2, 1, 28, 28), torch.zeros(2))
    assert field_x.shape == (2, 1, 28, 28)
    torch.testing.assert_close(field_t, seen[0][:, 4:].flatten(1).mean(1))


def test_ddpmpp_has_the_published_size() -> None:
    """DDPM++ has 55.7 million parameters on CIFAR-10 (Karras et al. 2022)."""
    with torch.device("meta"):
        network = UNet("ddpmpp", (3, 32, 32))
    assert 50e6 < sum(p.numel() for p in network.parameters()) < 62e6


@pytest.mark.parametrize("predicts", ["denoiser", "field"])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_the_perceptron_as_any_network(predicts: str, num_classes: int) -> None:
    model = build("perceptron", (2, 3), predicts=predicts, num_classes=num_classes)
    assert isinstance(model, Preconditioned if predicts == "denoiser" else PublishedField)
    nn.init.normal_(model.network.blocks[0].outer.weight)  # it begins as the identity
    labels = {"labels": torch.tensor([0, 2])} if num_classes else {}
    x = torch.randn(2, 2, 3)
    output = model(x, torch.tensor([0.3, 5.0]), **labels)
    assert output.shape == ((2, 2, 3) if predicts == "denoiser" else (2, 7))
    if labels:
        other = model(x, torch.tensor([0.3, 5.0]), labels=torch.tensor([1, 2]))
        assert not torch.equal(output[0], other[0])
        assert torch.equal(output[1], other[1])
        with pytest.raises(ValueError, match="expects labels, got none"):
            model(x, torch.tensor([0.3, 5.0]))


def test_the_field_network_normalises() -> None:
    """It sees the direction from the centre, the radius beside the spread, and answers in both."""
    center, spread, d = torch.tensor([3.0, -1.0, 2.0]), 0.5, 3
    torch.manual_seed(0)
    model = networks.FieldNetwork(
        d, width=8, depth=1, gamma=0.25, scale=7.0, center=center, spread=spread
    ).double()
    seen: list[Tensor] = []

    def body(x: Tensor, conditions: Tensor, labels: Tensor | None) -> Tensor:
        seen[:] = x, conditions
        return torch.full_like(x, 0.1)

    model.body = body
    offset = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]]).double()
    t = torch.tensor([2.0, 0.5]).double()
    field = model(center + offset, t)
    radius = (offset.square().mean(1) + spread**2).sqrt()
    torch.testing.assert_close(seen[0], offset / radius[:, None])
    torch.testing.assert_close(seen[1], torch.stack([t, radius], 1).log())
    whole = torch.cat([spread * 0.1 - offset, -t[:, None]], 1)
    torch.testing.assert_close(field, 7 * whole / (whole.norm(dim=1, keepdim=True) + 0.25))


def test_a_published_field_knows_the_height_and_both_parts() -> None:
    class Network(nn.Module):
        def forward(self, x: Tensor, noise_condition: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * x, noise_condition

    x, t = torch.randn(3, 2), torch.tensor([1.0, 2.0, 0.0])
    found = PublishedField(Network())(x, t)
    condition = torch.tensor([1.0, 2.0, 1e-5])
    torch.testing.assert_close(found, torch.cat([2 * x, condition.log()[:, None] / 4], 1))
    with pytest.raises(ValueError, match=r"expects to return the x-components .*, got Tensor"):
        PublishedField(Single())(x, t)


class Single(nn.Module):
    def forward(self, x: Tensor, noise_condition: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("name", "event_shape"), [("unet", (6, 28)), ("ddpmpp", (3, 28, 28)), ("unet", (2,))]
)
def test_events_that_do_not_fit(name: str, event_shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=rf"network {name} expects images .* multiples of [48], got"
    ):
        build(name, event_shape, predicts="denoiser")


MODULE = """
import torch
class Net(torch.nn.Module):
    def __init__(self, d, num_classes):
        super().__init__()
        self.linear = torch.nn.Linear(d + 1, d)
        self.num_classes = num_classes
    def forward(self, x, noise_condition, labels=None):
        return self.linear(torch.cat([x, noise_condition[:, None]], 1))
def make(event_shape, num_classes):
    return Net(event_shape[0], num_classes)
def wide(event_shape, num_classes):
    return Net(2 * event_shape[0], num_classes)
def nothing(event_shape, num_classes):
    return torch.nn.Identity()
def words(event_shape, num_classes):
    return "a network"
def fails(event_shape):
    pass
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_network.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("raise RuntimeError('no such thing')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_network", raising=False)
    return "my_network"


def test_the_users_own_network_by_name(module: str, tmp_path: Path) -> None:
    moons = data.load("two_moons")
    options = {"steps": 3, "batch_size": 16, "network": f"{module}:make", "D": 16}
    config = TrainConfig.for_data(moons, **options)
    assert config.predicts == "denoiser"
    assert train(config, moons, tmp_path / "run", console=QUIET).finished
    model, config = load_model(tmp_path / "run")
    assert type(model.network).__name__ == "Net"
    (part,) = Sampler(model, config, Sampling("euler", steps=3)).generate(range(4), QUIET)
    assert part.result.x.shape == (4, 2)
    other = (tmp_path / "my_network.py").read_text().replace("d + 1, d", "d + 1, d, bias=False")
    (tmp_path / "my_network.py").write_text(other)
    del sys.modules[module]
    with pytest.raises(ValueError, match=r"is of another network: expected .*bias nothing, got"):
        load_model(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("my_missing:make", "cannot import my_missing: ModuleNotFoundError"),
        ("my_broken:make", "cannot import my_broken: RuntimeError: no such thing"),
        ("my_network:other", "expects a function other in my_network, got nothing of that name"),
        ("my_network:number", "expects a function number in my_network, got int"),
        ("my_network:fails", r"fails\(event_shape=\(2,\), num_classes=0\) failed: TypeError"),
        ("my_network:words", "expects a torch.nn.Module, got str"),
        ("my_network:nothing", "expects parameters to train, got none"),
    ],
)
def test_a_network_that_cannot_be_had(module: str, name: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"network {name}.* ?{expected}"):
        build(name, (2,), predicts="denoiser")


@pytest.mark.parametrize("name", ["percepton", ":make", "module:", "module:1", ""])
def test_a_name_that_none_has(name: str) -> None:
    with pytest.raises(ValueError, match=f"or package.module:factory, got '{name}'"):
        TrainConfig("points", (2,), M=3, gamma=1.0, T=1.0, network=name, predicts="denoiser")


def test_a_network_from_python(tmp_path: Path) -> None:
    moons = data.load("two_moons")
    given = build("perceptron", (2,), predicts="denoiser").network
    options = {"steps": 3, "batch_size": 16, "network": "own", "D": 16}
    config = TrainConfig.for_data(moons, **options)
    before = given.first.weight.detach().clone()
    train(config, moons, tmp_path, network=given, console=QUIET)
    assert not torch.equal(given.first.weight, before)
    fresh = build("perceptron", (2,), predicts="denoiser").network
    model, _ = load_model(tmp_path, network=fresh)
    assert model.network is fresh
    assert not torch.equal(fresh.first.weight, before)
    with pytest.raises(ValueError, match="expected both, got 'own' and no network"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="expected both, got 'unet' and Perceptron"):
        build("unet", (28, 28), predicts="denoiser", given=fresh)


def test_what_data_takes_by_default() -> None:
    grey = torch.zeros(3, 28, 28, dtype=torch.uint8)
    grey[0] = 255
    for images, name in (
        (grey, "unet"),
        (grey[:, :8, :8], "perceptron"),
        (grey[:, :15], "perceptron"),
    ):
        found_data = data.DataSet("grey", images, images, None, None)
        found = TrainConfig.for_data(found_data)
        assert found.network == name
        expected = {"unet": ("pfgmpp", 128), "perceptron": ("pfgm", 1)}[name]
        assert (found.method, found.D) == expected
        assert found.T == constants(found_data.references, D=expected[1]).T
        assert found.predicts == {"unet": "denoiser", "perceptron": "mean"}[name]
        spread = found_data.moments.spread
        assert found.log_sigma_mean == pytest.approx(math.log(2 * spread) - 1.2)
        published = TrainConfig.for_data(found_data, method="pfgm")
        assert published.predicts == {"unet": "field", "perceptron": "mean"}[name]
    points = TrainConfig.for_data(data.load("two_moons"))
    assert (points.network, points.predicts, points.method) == ("perceptron", "mean", "pfgm")
