# SPDX-License-Identifier: Apache-2.0
"""Does the README's loop run as it is read, and is what it leaves judged rightly?"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed")

from benchmarks import readme_loop
from pfgm_kernels.flow import loss as losses

CODE = """
import torch
from pfgm_kernels import ReferenceSet
from pfgm_kernels.flow import PosteriorMeanLoss, Preconditioned, as_field, sample, sample_prior

objective = PosteriorMeanLoss(ReferenceSet.from_images(images), D=128)
denoiser = Preconditioned(network, D=128)
optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
for batch in loader:
    loss = objective(denoiser, batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
x = sample_prior(24, (1, 28, 28), T=900.0, D=128)
samples = sample(as_field(denoiser), x, T=900.0, steps=2)
"""


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, noise_condition: Tensor) -> Tensor:
        return self.layer(x) + noise_condition[:, None, None, None]


def test_the_block_is_the_first_under_its_heading() -> None:
    readme = (
        "# Title\n```python\nbefore\n```\n## Use it in your own training loop\n\nwords\n"
        "```\nno python\n```\n```python\na = 1\nb = 2\n```\n```python\nc = 3\n```\n## Next\n"
    )
    assert readme_loop.block(readme) == "a = 1\nb = 2\n"
    other = f"## {readme_loop.HEADING}\n```\nno python\n```\n## Next\n```python\na = 1\n```\n"
    for wrong in (readme.replace("Use it", "Use"), other):
        with pytest.raises(ValueError, match="expects a block of Python under the heading"):
            readme_loop.block(wrong)


def test_the_readme_has_the_block() -> None:
    code = readme_loop.block((readme_loop.ROOT / "README.md").read_text())
    assert {"loader", "network", "images"} <= {
        node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)
    }


def test_noise_is_a_fifth_of_the_pixels_beyond_the_data() -> None:
    images = torch.zeros(4, 1, 10, 10)
    images[1].view(-1)[:20] = 5.0
    images[2].view(-1)[:21] = -1.3
    images[3] = 1.1
    assert readme_loop.is_noise(images).tolist() == [False, False, True, False]


def test_the_script_runs_what_it_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = torch.randint(256, (50, 28, 28), dtype=torch.uint8)
    readme, out = tmp_path / "README.md", tmp_path / "samples.png"
    readme.write_text(f"## {readme_loop.HEADING}\n```python{CODE}```\n")
    monkeypatch.setattr(readme_loop, "UNet", lambda *_: Tiny())
    monkeypatch.setattr(readme_loop.data, "load", lambda name: type("D", (), {"train": images}))
    monkeypatch.setattr(losses, "posterior_mean", losses.posterior_mean)  # put back afterwards
    options = ["--readme", str(readme), "--out", str(out), "--steps", "3"]
    monkeypatch.setattr(sys, "argv", ["readme_loop", *options])
    readme_loop.main()
    printed = json.loads(capsys.readouterr().out)
    assert (printed["steps"], printed["samples"], printed["parameters"]) == (3, 24, 10)
    assert printed["evaluations"] == 5
    assert 0 < printed["share of the exact target"] < 1
    assert 0 < printed["loss"] < 10
    assert out.read_bytes().startswith(b"\x89PNG")


def test_batches_are_images_in_the_range_of_the_references() -> None:
    code = (
        "batches = []\nfor batch in loader:\n    batches.append(batch)\n    loss = batch.mean()\n"
    )
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 1, 4, 4)
    scope = readme_loop.run(code, images, 5, 64, Console(quiet=True))
    batches = torch.stack(scope["batches"])
    assert batches.shape == (5, 64, 1, 4, 4)
    assert batches.unique().tolist() == [-1, 1]
    assert scope["history"] == [batch.mean().item() for batch in batches]
