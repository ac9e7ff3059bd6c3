# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.readme_loop`: the README's training loop, run as it stands, on MNIST.

The first block of Python under the heading `HEADING` is executed with what it leaves to the reader:
`images`, a `loader` of batches and a `network`, here a U-Net of a million parameters. What it
prints is JSON: the loss, the share of a step that the exact target takes, the evaluations of the
sampler, and how many of the samples are noise. The samples are drawn into --out. Needs PFGM_DATA,
and some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from pfgm_kernels.figures import tile
from pfgm_kernels.files import write_bytes
from pfgm_kernels.flow import Trajectory
from pfgm_kernels.flow import loss as losses
from pfgm_kernels.training import data
from pfgm_kernels.training.networks import UNet
from pfgm_kernels.training.progress import progress_bar

ROOT = Path(__file__).resolve().parents[1]
HEADING = "Use it in your own training loop"
STEPS, BATCH = 400, 128
BEYOND, SHARE = 1.2, 0.2


class Stopwatch:
    """A function, and the seconds that its calls take."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.seconds: list[float] = []

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        began = time.perf_counter()
        result = self.function(*arguments, **options)
        self.seconds.append(time.perf_counter() - began)
        return result


def block(readme: str) -> str:
    """The first block of Python under `HEADING`. Raises ValueError where there is none."""
    section = re.search(rf"^## {HEADING}\n(.*?)(?=^## |\Z)", readme, re.DOTALL | re.MULTILINE)
    found = section and re.search(r"^```python\n(.*?)^```$", section[1], re.DOTALL | re.MULTILINE)
    if not found:
        raise ValueError(f"the README expects a block of Python under the heading {HEADING!r}")
    return found[1]


def is_noise(images: Tensor) -> Tensor:
    """Which of images (n, *event), whose data is in [-1, 1], have many pixels beyond that."""
    return (images.abs() > BEYOND).flatten(1).float().mean(dim=1) > SHARE


def run(code: str, images: Tensor, steps: int, batch: int, console: Console) -> dict[str, Any]:
    """What the code left behind, with `"history"`, the loss of each step, and `"seconds"`, of each
    step. The loader ends after so many steps, and looks at the code's `loss` between them.
    """
    scope: dict[str, Any] = {
        "images": images,
        "network": UNet("unet", (1, 28, 28)),
        "history": [],
        "seconds": [],
    }

    def loader() -> Iterator[Tensor]:
        with progress_bar(console, "Training", steps) as update:
            for step in range(steps):
                began = time.perf_counter()
                rows = torch.randint(len(images), (batch,))
                yield images[rows].float() / 127.5 - 1
                scope["history"].append(scope["loss"].item())
                scope["seconds"].append(time.perf_counter() - began)
                update(step + 1, f"loss {statistics.fmean(scope['history'][-50:]):.4f}")

    scope["loader"] = loader()
    exec(compile(code, "README.md", "exec"), scope)
    return scope


def report(scope: dict[str, Any], result: Trajectory, target: Stopwatch) -> dict[str, Any]:
    steps = statistics.median(scope["seconds"])
    return {
        "parameters": sum(p.numel() for p in scope["network"].parameters()),
        "steps": len(scope["history"]),
        "loss": statistics.fmean(scope["history"][-50:]),
        "seconds of a step": steps,
        "share of the exact target": statistics.median(target.seconds) / steps,
        "samples": len(result.x),
        "evaluations": result.nfe,
        "noise": int(is_noise(result.x).sum()),
        "seconds": sum(scope["seconds"]),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "readme_samples.png")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.manual_seed(0)
    images = data.load("mnist").train[:, None]
    losses.posterior_mean = target = Stopwatch(losses.posterior_mean)
    code = block(options.readme.read_text())
    scope = run(code, images, options.steps, BATCH, Console(stderr=True))
    result = scope["samples"]
    print(json.dumps(report(scope, result, target), indent=2))
    picture = BytesIO()
    pixels = (tile(result.x[:, 0], columns=8) * 255).round().astype("uint8")
    Image.fromarray(pixels).quantize(32).save(picture, "PNG", optimize=True)
    write_bytes(options.out, picture.getvalue())


if __name__ == "__main__":
    main()
