# SPDX-License-Identifier: Apache-2.0
"""Floors: the least time that a GPU can take for the field, by shape, precision and chip.

`python -m benchmarks.roofline` writes the page roofline.md, predictions (predict.py) included, and
its figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import predict
from benchmarks.chips import CHIPS, Chip
from benchmarks.predict import figures, table, time

HERE = Path(__file__).parent
PAGE, FIGURE = HERE / "roofline.md", HERE.parent / "docs" / "roofline.png"

HEADLINE = (512, 50_000, 3072)
SHAPES = [
    (B, N, d) for d in (2, 64, 784, 3072, 12_288) for N in (2048, 50_000) for B in (64, 512, 4096)
]
"""(B, N, d): queries, references, dimensions."""

DIRECT = 16
"""The largest d whose accuracy needs direct differences, which tensor cores cannot form."""
FUSED = 256
"""The largest d that one pass over the references serves: beyond it the logits go through memory,
since a tile's sums no longer fit on chip.
"""
WEIGHT_OPERATIONS, SCREEN_OPERATIONS = 40, 4
"""float32 operations for each pair: an accurate log1p, an exponential and sums; or, for screening,
the distance from the product, its bound, the minimum and the comparison.
"""


@dataclass(frozen=True)
class Method:
    """How the products are made. peak: which of the chip's; products: how many take the place of
    one; element_bytes: of a stored reference; screening: distances alone, in one pass.
    """

    name: str
    peak: str
    products: int
    element_bytes: int
    screening: bool = False


FLOAT32 = Method("float32", "float32", 1, 4)
FLOAT64 = Method("float64", "float64", 1, 8)
SPLIT = Method("bfloat16 × 3", "bfloat16", 3, 4)
SPLIT_8BIT = Method("8-bit, bfloat16 × 2", "bfloat16", 2, 1)
SCREEN = Method("screening", "bfloat16", 1, 2, screening=True)
SCREEN_8BIT = Method("8-bit, screening", "bfloat16", 1, 1, screening=True)
METHODS = (FLOAT32, FLOAT64, SPLIT, SPLIT_8BIT, SCREEN, SCREEN_8BIT)


@dataclass(frozen=True)
class Floor:
    """seconds: the least time. bound: what takes it, "compute", "memory" or "elementwise"."""

    seconds: float
    bound: str


def floor(
    chip: Chip, B: int, N: int, d: int, references: str = "float32", gradient: bool = False
) -> Floor:
    """The least time of B queries and N references in d dimensions at the accuracy of float32.

    references: "float32", or "uint8" for 8-bit images. gradient: the field and its gradients for
    the queries. Direct differences in float32 up to d = 16, beyond whichever is less of float32 and
    split bfloat16 products: GeForce chips multiply float32 faster than they do three of the latter.
    """
    if references not in ("float32", "uint8"):
        raise ValueError(f'references expects "float32" or "uint8", got {references!r}')
    split = SPLIT if references == "float32" else SPLIT_8BIT
    methods = [
        replace(FLOAT32, element_bytes=split.element_bytes),
        *([split] if d > DIRECT else []),
    ]
    floors = [method_floor(chip, method, B, N, d, gradient) for method in methods]
    return min(floors, key=lambda floor: floor.seconds)


def method_floor(
    chip: Chip, method: Method, B: int, N: int, d: int, gradient: bool = False
) -> Floor:
    """The same by one method. Memory and tensor cores work beside the float32 units; where these
    also make the products, both take their turn.
    """
    peak = getattr(chip, method.peak)
    compute = operations(B, N, d, gradient, method.screening) * method.products / peak
    elementwise = weight_operations(B, N, gradient, method.screening) / chip.float32
    memory = sum(traffic(method, B, N, d, gradient)) / chip.bandwidth
    arithmetic = compute + elementwise if method.peak == "float32" else max(compute, elementwise)
    if memory > arithmetic:
        return Floor(memory * 1e-12, "memory")
    return Floor(arithmetic * 1e-12, "compute" if compute >= elementwise else "elementwise")


def operations(B: int, N: int, d: int, gradient: bool = False, screening: bool = False) -> int:
    """Useful operations: 2·B·N·d for the distances and for the weighted sum; the backward pass
    takes the distances again, projects the references on the cotangent, and sums.
    """
    return (2 if screening else 10 if gradient else 4) * B * N * d


def weight_operations(B: int, N: int, gradient: bool = False, screening: bool = False) -> int:
    """float32 operations that turn products into weights, or into survivors of the screening."""
    return (SCREEN_OPERATIONS if screening else WEIGHT_OPERATIONS * (1 + gradient)) * B * N


def traffic(method: Method, B: int, N: int, d: int, gradient: bool = False) -> tuple[int, int, int]:
    """Bytes of references, of logits, and of queries and results. Two passes read the references
    twice, and write and read B·N float32 logits; the backward pass does it all once more.
    """
    two_passes = d > FUSED and not method.screening
    times = 1 + gradient
    references = (1 + two_passes) * N * d * method.element_bytes
    return times * references, times * two_passes * 8 * B * N, times * 8 * B * d


WORDS = f"""\
# Floors

How fast could the field be? For each shape, precision and chip the least time that the
arithmetic, the memory or the conversion of distances into weights takes, whichever is longest, with
every unit at its peak and perfectly overlapped: a ruler for measurements, not a forecast. What the
kernels that there are should take is [predicted](#predictions) below. Good
kernels reach 60 to 85 % of it where it is tens of microseconds or more; below, launching (about
5 µs for each kernel) costs more than computing. `python -m benchmarks.roofline` writes this page.

![useful operations a second against d](../docs/roofline.png)

## What is counted

- **Operations**: 4·B·N·d for the field, 2·B·N·d each for the distances and for the weighted sum.
- **float32**: fused multiply-adds outside the tensor cores. **float64**: on the tensor cores of
  data-centre chips; GeForce chips run it at 1/64 of float32.
- **bfloat16 × 3**: float32 references on tensor cores, operands split into a high and a low
  bfloat16 part, high·high + high·low + low·high. **8-bit, bfloat16 × 2**: 8-bit references are
  exact in bfloat16, so that queries and weights alone are split; they are read in 8 bits.
- **screening**: one bfloat16 product for the distances, without logits or a second product: what
  it costs to find out which references can carry weight at all. Finishing those exactly comes on
  top, and depends on the data.
- **References** are read from memory once up to d = {FUSED}; beyond, twice, and the B·N logits in
  float32 are written and read. Problems that fit the L2 cache can therefore beat this floor.
- **Weights**: {WEIGHT_OPERATIONS} float32 operations a pair (an accurate log1p, exp, sums), on top
  of the products where these are float32, else beside them; {SCREEN_OPERATIONS} for screening.
- All pairs count. Where tiles without an active reference are skipped, less is possible.
- Padding is not counted, though at d = 2 tensor cores would multiply mostly zeros. Up to d =
  {DIRECT} accuracy needs direct differences in float32: that column is the floor there.

On GeForce chips bfloat16 products with float32 sums are only twice as fast as float32, so three of
them are no gain; 8-bit references break even, and screening is what pays.
"""

BOUNDS = {"compute": "C", "memory": "M", "elementwise": "E"}


def page() -> str:
    """The page, Markdown."""
    chips = [
        (
            *(chip.name, f"{chip.float32:g}", f"{chip.float64:g}", f"{chip.float64_units:g}"),
            *(f"{chip.bfloat16:g}", f"{chip.bandwidth:g}", f"{chip.cache:g}"),
            *(str(chip.multiprocessors), f"{chip.shared_bytes:,}", chip.source),
        )
        for chip in CHIPS
    ]
    headings = ("chip", "float32", "float64", "without tensor cores", "bfloat16", "TB/s")
    more = ("L2 TB/s", "SMs", "shared bytes", "source")
    names = [method.name for method in METHODS]
    B, N, d = HEADLINE
    parts = [
        WORDS,
        "## Chips\n\nPeaks in TFLOP/s, dense, float64 with and without tensor cores, bfloat16 "
        "with float32 sums; the bandwidth of the L2 cache, about, since vendors do not give it; "
        "bytes of shared memory for one thread block.\n",
        table((*headings, *more), chips),
        f"## All of CIFAR-10: B = {B}, N = {N:,}, d = {d:,}\n\n"
        "C: bound by compute, M: by memory, E: by the elementwise conversion into weights.\n",
        table(("chip", *names), [(chip.name, *_floors(chip, *HEADLINE)) for chip in CHIPS]),
        "## Work\n\nGigaoperations of the products and of the weights, and megabytes moved: "
        "references by the bytes of an element, logits, queries with results.\n",
        table(
            ("d", "N", "B", "products", "weights", *("8 B", "4 B", "1 B"), "logits", "queries"),
            [_work(*shape) for shape in SHAPES],
        ),
    ]
    for chip in CHIPS:
        ordered = [HEADLINE, *(shape for shape in SHAPES if shape != HEADLINE)]
        rows = [(f"{d:,}", f"{N:,}", f"{B:,}", *_floors(chip, B, N, d)) for B, N, d in ordered]
        parts += [f"## {chip.name}\n", table(("d", "N", "B", *names), rows)]
    return "\n".join([*parts, predict.page()])


def _floors(chip: Chip, B: int, N: int, d: int) -> list[str]:
    floors = [method_floor(chip, method, B, N, d) for method in METHODS]
    return [f"{time(floor.seconds)} {BOUNDS[floor.bound]}" for floor in floors]


def _work(B: int, N: int, d: int) -> tuple[str, ...]:
    references = [traffic(method, B, N, d)[0] for method in (FLOAT64, SPLIT, SPLIT_8BIT)]
    numbers = (operations(B, N, d) / 1e9, weight_operations(B, N) / 1e9)
    moved = (*references, *traffic(SPLIT, B, N, d)[1:])
    return (
        f"{d:,}",
        f"{N:,}",
        f"{B:,}",
        *(figures(n) for n in (*numbers, *(m / 1e6 for m in moved))),
    )


def draw(path: Path) -> None:
    """Useful operations a second against d at the floor, for the B and N of the headline."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("the figure needs matplotlib: pip install -e '.[train]'") from None
    B, N, _ = HEADLINE
    dimensions = [round(2 ** (step / 4)) for step in range(4, 4 * 15)]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, chip in zip(axes, (CHIPS[0], CHIPS[-1]), strict=True):
        for method in METHODS[:4]:
            floors = [method_floor(chip, method, B, N, d).seconds for d in dimensions]
            rates = [
                operations(B, N, d) / seconds / 1e12
                for d, seconds in zip(dimensions, floors, strict=True)
            ]
            axis.loglog(dimensions, rates, label=method.name)
        axis.set(title=f"{chip.name}, B = {B}, N = {N:,}", xlabel="d")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("useful TFLOP/s at the floor")
    axes[0].legend()
    figure.savefig(path, dpi=100, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes the page of floors and its figure.")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page (default %(default)s)")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="its figure, a PNG file")
    options = parser.parse_args(arguments)
    options.out.write_text(page())
    draw(options.figure)
    print(f"wrote {options.out} and {options.figure}")


if __name__ == "__main__":
    main()
