# SPDX-License-Identifier: Apache-2.0
"""Does the README's code run as it stands, also for those who come from other projects?

Its training loop is run by tests/benchmarks/test_readme_loop.py.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pfgm_kernels
from pfgm_kernels import ReferenceSet, flow, posterior_mean
from pfgm_kernels.flow import PRESETS

README = (Path(__file__).parents[2] / "README.md").read_text()
(SECTION,) = re.findall(r"^## Coming from .*?(?=^## )", README, re.MULTILINE | re.DOTALL)
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
EVENT = (3, 4, 4)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def names() -> dict[str, object]:
    """What the section takes for granted: images, a batch of them, a network of each kind."""
    images = torch.randint(0, 256, (40, *EVENT), dtype=torch.uint8, generator=seeded())
    batch = (2 * images[:8].double() / 255 - 1).float()
    known = ReferenceSet.from_images(images)

    def network(x: Tensor, t: Tensor) -> Tensor:
        v = posterior_mean(x, t, known) - x
        field = torch.cat([v.flatten(1), -t[:, None]], 1)
        return math.sqrt(48) * field / (field.norm(dim=1, keepdim=True) + 5)

    def unet(x: Tensor, noise_condition: Tensor) -> Tensor:
        assert noise_condition.shape == x.shape[:1]
        return x.tanh()

    p, q = batch, torch.randn(20, *EVENT, generator=seeded())
    s = 0.4
    x_s = (1 - s) * batch + s * torch.randn(8, *EVENT, generator=seeded())
    return {
        "images": images, "batch": batch, "network": network, "unet": unet, "x_s": x_s, "s": s,
        "p": p, "q": q, "x": batch, "t": torch.linspace(1, 400, 8),
    }  # fmt: skip


def test_it_has_code_for_each():
    assert len(BLOCKS) >= 4
    for name in ("PFGM", "PFGM++", "STF", "EFM"):
        assert f"**{name}" in SECTION


def test_all_blocks_run(names):
    torch.manual_seed(0)
    ends: list[dict[str, object]] = []
    queries = {name: names[name] for name in ("x", "t")}
    for block in BLOCKS:
        if "two_plate_field" in block:
            names |= queries
        exec(compile(block, "README.md", "exec"), names)
        ends.append(dict(names))
    for end in ends[:3]:
        assert end["samples"].shape == (16, *EVENT)
        assert end["samples"].isfinite().all()
        assert end["loss"].isfinite()
    assert ends[0]["loss"] < 1e-8  # the network is the field itself
    assert ends[0]["samples"].abs().max() < 1.01  # and its samples are images
    assert ends[1]["loss"] != ends[2]["loss"]
    assert ends[1]["loss_fn"].references is names["references"]
    assert ends[3]["target"].shape == (8, 49)
    assert ends[3]["there"].shape == (4, *EVENT)
    assert ends[3]["there"].isfinite().all()
    assert names["target"].shape == names["velocity"].shape == (8, *EVENT)


def test_the_table_names_what_exists():
    theirs = {"sigma_end", "z_max", "z_exp"}
    ours = {*vars(PRESETS["cifar10"]), *vars(flow), *vars(pfgm_kernels)}
    words = set(re.findall(r"`(\w+)`", SECTION.partition("\n\n**PFGM.")[0]))
    assert "ReferenceSet" in words
    assert words <= theirs | ours


def test_classes():
    images = torch.randint(0, 256, (40, *EVENT), dtype=torch.uint8, generator=seeded())
    labels = torch.arange(40) % 4
    x = 2 * images[:6].float() / 255 - 1
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "threes" in b)
    names = {
        "ReferenceSet": ReferenceSet, "posterior_mean": posterior_mean, "images": images, "D": 128,
        "labels": labels, "x": x, "t": 0.01, "batch_labels": labels[:6],
    }  # fmt: skip
    exec(compile(block, "README.md", "exec"), names)
    torch.testing.assert_close(names["target"], x)
    assert len(names["threes"]) == 10
