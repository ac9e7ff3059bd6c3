# SPDX-License-Identifier: Apache-2.0
"""`PFGM_DATA=… python -m benchmarks.bands`: what a sketch of the references gives, by noise level.

For CIFAR-10 and MNIST in 8 bits and half of CIFAR-10 with a little noise as floats: how many times
the time of a call with a sketch that without one is, for queries of Eq. (11) with m in bands. The
two take turns; of each the least of several calls counts. Run it on a machine that does nothing
else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from pfgm_kernels import ReferenceSet, poisson_displacement
from pfgm_kernels.flow.constants import PUBLISHED
from pfgm_kernels.training import data

BANDS = (
    (0, 60),
    (60, 110),
    (110, 130),
    (130, 150),
    (150, 170),
    (170, PUBLISHED.M),
    (0, PUBLISHED.M),
)
BATCHES, CALLS = (128, 16, 1), 5


def queries(batch: int, band: tuple[float, float], x0: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (11) around references x0 (N, d)."""
    generator = torch.Generator().manual_seed(0)
    m = torch.empty(batch, dtype=torch.float64).uniform_(*band, generator=generator)
    sigma = PUBLISHED.sigma * 1.03**m
    x = x0[torch.randint(len(x0), (batch,), generator=generator)].double()
    direction = torch.nn.functional.normalize(torch.randn(x.shape, generator=generator).double())
    radius = torch.randn(x.shape, generator=generator).norm(dim=1) * sigma
    x += radius[:, None] * direction
    return x.float(), torch.randn(batch, generator=generator).double().abs() * sigma


def references() -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Name, references (N, d) as floats, and their 8-bit codes where they are stored so."""
    for name in ("cifar10", "mnist"):
        found = data.load(name)
        codes = found.train.flatten(1)
        yield f"{name}, 8-bit", found.decode(codes), codes
        if name == "cifar10":
            half = found.decode(codes[: len(codes) // 2])
            noise = torch.randn(half.shape, generator=torch.Generator().manual_seed(0))
            yield f"{name} + noise, floats", half + 1e-3 * noise, None


def seconds(x: Tensor, t: Tensor, references: ReferenceSet) -> float:
    began = time.perf_counter()
    poisson_displacement(x, t, references)
    return time.perf_counter() - began


def main() -> None:
    heads = [f"{low:g} ≤ m < {high:g}" for low, high in BANDS]
    print(f"| references | B | {' | '.join(heads)} |\n|" + " --- |" * (len(BANDS) + 2))
    for name, x0, codes in references():
        plain, with_sketch = (
            ReferenceSet(x0) if codes is None else ReferenceSet.from_images(codes) for _ in range(2)
        )
        with_sketch._sketch("cpu")
        for batch in BATCHES:
            cells = []
            for band in BANDS:
                x, t = queries(batch, band, x0)
                plain._calls = with_sketch._calls = 0  # the plain one is to stay so
                pairs = [(seconds(x, t, plain), seconds(x, t, with_sketch)) for _ in range(CALLS)]
                without, with_ = (min(each) for each in zip(*pairs, strict=True))
                cells.append(f"{without / with_:.2f} ({1e3 * without:.3g} ms)")
            print(f"| {name} | {batch} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
