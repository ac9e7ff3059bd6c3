# SPDX-License-Identifier: Apache-2.0
"""Where samples go: an array of all, an .npz file, or a folder that fills up."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from rich.console import Console
from torch import Tensor

from pfgm_kernels.files import LOCK, TEMPORARY, locked, write_bytes
from pfgm_kernels.training.checkpoint import checksum
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.data.listing import LABEL_FILE
from pfgm_kernels.training.evaluation.images import eight_bits
from pfgm_kernels.training.generate import Part, Sampler, batches
from pfgm_kernels.training.ranks import Ranks

OPTIONS = "sampling.json"


def stored(samples: Tensor, config: TrainConfig) -> Tensor:
    """Samples (n, *event) as the run's data are stored: of images 8 bits."""
    return eight_bits(samples, config.low, config.high) if config.images else samples.float()


def points(values: Tensor, config: TrainConfig) -> Tensor:
    """What ``stored`` values stand for, images in [-1, 1]."""
    return values.double().mul_(2 / 255).sub_(1).float() if config.images else values


def share(seeds: Sequence[int], batch: int, ranks: Ranks) -> list[int]:
    """Those that this rank draws: whole batches."""
    mine = batches(seeds, batch)[ranks.rank :: ranks.world]
    return [seed for part in mine for seed in part]


def collect(
    sampler: Sampler,
    seeds: Sequence[int],
    console: Console,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> tuple[Tensor, float]:
    """The samples of all seeds in their order (n, *event), as the run's data are stored, and the
    evaluations of a sample in the mean; on the first rank, of the others nothing of use.
    """
    config, place = sampler.config, {seed: row for row, seed in enumerate(seeds)}
    dtype = torch.uint8 if config.images else torch.float32
    samples = torch.zeros(len(seeds), *config.event_shape, dtype=dtype, device="cpu")
    evaluations = 0.0
    for part in sampler.generate(share(seeds, sampler.batch, ranks), console):
        samples[[place[seed] for seed in part.seeds]] = stored(part.result.x, config)
        evaluations += part.evaluations * len(part.seeds)
    if ranks.world > 1:
        samples, evaluations = _gathered(samples, evaluations, sampler.device)
    return samples, evaluations / len(seeds)


def _gathered(samples: Tensor, evaluations: float, device: torch.device) -> tuple[Tensor, float]:
    """Sums of bytes to which all ranks but one give zeros: the bits of the one."""
    total = torch.tensor(evaluations, dtype=torch.float64, device=device)
    content = samples.view(torch.uint8).to(device)
    for tensor in (total, content):
        dist.reduce(tensor, 0)
    return content.cpu().view(samples.dtype), total.item()


def write_npz(path: Path, samples: Tensor, seeds: Sequence[int], labels: Tensor | None) -> None:
    """``images`` uint8, or ``x`` float32 of what is no image, with ``seeds`` and, if there are any,
    ``labels``: what a data set is loaded from, and images to be judged.
    """
    name = "images" if samples.dtype == torch.uint8 else "x"
    arrays: dict[str, Any] = {name: samples.numpy(), "seeds": np.asarray(seeds, np.int64)}
    if labels is not None:
        arrays["labels"] = labels.numpy()
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_bytes(path, content.getvalue())


class SampleFolder:
    """A folder with an image a seed, ``000063.png``, that a later call goes on with.

    ``sampling.json`` keeps what made them. Files are whole or not there, however a process ends.
    """

    def __init__(self, path: Path, sampler: Sampler, model: torch.nn.Module) -> None:
        """Raises ValueError where the run is of no images."""
        if not sampler.config.images:
            raise ValueError(
                f"a folder expects a run of images, got one of {sampler.config.data}: "
                "name an .npz file"
            )
        self.path, self.sampler = path, sampler
        weights = {name: value.cpu() for name, value in model.state_dict().items()}
        options = {"model": checksum(weights)[:16]} | asdict(sampler.how)
        self._options = json.loads(json.dumps(options))

    @contextmanager
    def claimed(self, ranks: Ranks) -> Iterator[None]:
        """Keeps the folder to this process, or to the ranks of one run. Raises ValueError where
        another holds it, or has written to it otherwise.
        """
        with locked(self.path) if ranks.rank == 0 else nullcontext():
            if ranks.rank == 0:
                self._claim()
            ranks.wait()
            yield
            ranks.wait()
            if ranks.rank == 0 and self.sampler.how.labels:
                self._write_labels()

    def missing(self, seeds: Iterable[int]) -> list[int]:
        return [seed for seed in seeds if not self.file(seed).exists()]

    def add(self, part: Part) -> None:
        for seed, image in zip(part.seeds, stored(part.result.x, self.sampler.config), strict=True):
            write_bytes(self.file(seed), _png(image))

    def file(self, seed: int) -> Path:
        return self.path / f"{seed:06d}.png"

    def _claim(self) -> None:
        file = self.path / OPTIONS
        if not file.exists():
            others = sorted(path.name for path in self.path.iterdir() if path.name != LOCK)
            if others:
                raise ValueError(
                    f"{self.path} expects to be empty or of the same samples, got {others[0]} "
                    f"and no {OPTIONS}; name another folder"
                )
            write_bytes(file, (json.dumps(self._options, indent=2) + "\n").encode())
        try:
            found = json.loads(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"damaged file {file}: expected JSON, got {error}") from error
        for name, value in self._options.items():
            old = found.get(name) if isinstance(found, dict) else None
            if old != value:
                raise ValueError(
                    f"{self.path} holds other samples: expected {name} = {old}, got {value}; name "
                    "another folder"
                )
        for part in self.path.glob(f"*{TEMPORARY}"):  # of a process that was killed
            part.unlink(missing_ok=True)
        (self.path / LABEL_FILE).unlink(missing_ok=True)  # it would miss what is drawn now

    def _write_labels(self) -> None:
        files = sorted(file for file in self.path.glob("*.png") if file.stem.isdigit())
        labels = self.sampler.how.labels_of([int(file.stem) for file in files]).tolist()
        pairs = [[file.name, label] for file, label in zip(files, labels, strict=True)]
        content = json.dumps({"labels": pairs})
        write_bytes(self.path / LABEL_FILE, content.encode())


def _png(image: Tensor) -> bytes:
    """Of (h, w) or (1, h, w), grey, or (3, h, w)."""
    pixels = image[0] if image.ndim == 3 and len(image) == 1 else image
    pixels = pixels.movedim(0, 2) if pixels.ndim == 3 else pixels
    content = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(content, "PNG")
    return content.getvalue()
