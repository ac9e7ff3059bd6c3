# SPDX-License-Identifier: Apache-2.0
"""Are the floors that measurements are held against computed as the page says?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.chips import CHIPS, chip_of
from benchmarks.roofline import (
    FIGURE,
    FLOAT32,
    FLOAT64,
    HEADLINE,
    METHODS,
    PAGE,
    SCREEN,
    SPLIT,
    SPLIT_8BIT,
    Method,
    floor,
    main,
    method_floor,
    page,
)

H200, H100, A100, RTX_5090, RTX_4090 = CHIPS


@pytest.mark.parametrize(
    ("method", "shape", "microseconds", "bound"),
    [
        # 4 · 512 · 50,000 · 3072 = 314.57e9 operations at 989.4e12 a second, 3 (2) times.
        (SPLIT, HEADLINE, 953.8, "compute"),
        (SPLIT_8BIT, HEADLINE, 635.9, "compute"),
        # Half of them, once.
        (SCREEN, HEADLINE, 159.0, "compute"),
        # ... at 66.9e12, in float32 with 40 · 512 · 50,000 more for the weights.
        (FLOAT32, HEADLINE, 4717.4, "compute"),
        (FLOAT64, HEADLINE, 4702.1, "compute"),
        # 2 · 614.4e6 bytes of references, 25.6e6 of logits, 1.57e6 of queries, at 4.8e12 a second.
        (SPLIT, (64, 50_000, 3072), 261.7, "memory"),
        (SPLIT_8BIT, (64, 50_000, 3072), 79.5, "compute"),
        # One pass: 12.8e6 bytes of references, no logits.
        (SPLIT, (64, 50_000, 64), 2.67, "memory"),
        # 40 · 4096 · 50,000 operations at 66.9e12; float32 makes 4 · 2 · 4096 · 50,000 more.
        (SPLIT, (4096, 50_000, 2), 122.5, "elementwise"),
        (FLOAT32, (4096, 50_000, 2), 146.9, "elementwise"),
    ],
    ids=str,
)
def test_floors_of_an_h200_by_hand(
    method: Method, shape: tuple[int, int, int], microseconds: float, bound: str
) -> None:
    result = method_floor(H200, method, *shape)
    assert result.bound == bound
    assert 1e6 * result.seconds == pytest.approx(microseconds, rel=2e-3)


def test_the_floor_is_the_least_of_the_methods_that_are_accurate() -> None:
    assert floor(H200, *HEADLINE) == method_floor(H200, SPLIT, *HEADLINE)
    assert floor(H200, *HEADLINE, "uint8") == method_floor(H200, SPLIT_8BIT, *HEADLINE)
    low = (4096, 50_000, 2)
    assert floor(H200, *low) == method_floor(H200, FLOAT32, *low)
    # 104.8 / 1 against 209.5 / 3.
    assert floor(RTX_5090, *HEADLINE) == method_floor(RTX_5090, FLOAT32, *HEADLINE)
    with pytest.raises(ValueError, match="'int4'"):
        floor(H200, *HEADLINE, "int4")


def test_less_bandwidth_costs_where_memory_is_the_bound() -> None:
    shape = (64, 50_000, 3072)
    slow, fast = floor(H100, *shape), floor(H200, *shape)
    assert slow.bound == fast.bound == "memory"
    assert slow.seconds / fast.seconds == pytest.approx(4.8 / 3.35)
    assert floor(H100, *HEADLINE) == floor(H200, *HEADLINE)


@pytest.mark.parametrize(
    ("shape", "factor", "bound"),
    [
        (HEADLINE, 10 / 4, "compute"),  # 5 products instead of 2
        ((64, 50_000, 3072), 2, "memory"),  # all of it once more
        ((4096, 50_000, 2), (20 + 80) / (8 + 40), "elementwise"),
    ],
)
def test_gradients_take_more(shape: tuple[int, int, int], factor: float, bound: str) -> None:
    forward, both = floor(H200, *shape), floor(H200, *shape, gradient=True)
    assert both.bound == bound
    assert both.seconds / forward.seconds == pytest.approx(factor)


def test_a_chip_is_known_by_the_whole_name_of_its_device() -> None:
    assert chip_of("NVIDIA H100 80GB HBM3") is H100
    assert chip_of("NVIDIA GeForce RTX 4090") is RTX_4090
    for other in ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 4090 D", "AMD EPYC"):
        assert chip_of(other) is None


def test_the_page_in_the_repository_is_what_the_code_writes(tmp_path: Path) -> None:
    """Where this fails, grids or models have changed: python -m benchmarks.roofline writes it."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("triton", "3.6")
    written, figure = tmp_path / "page.md", tmp_path / "figure.png"
    main(["--out", str(written), "--figure", str(figure)])
    assert written.read_text() == PAGE.read_text() == page()
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert FIGURE.stat().st_size < 100_000


def test_every_chip_has_its_table_the_headline_first() -> None:
    pytest.importorskip("triton", "3.6")
    for chip in CHIPS:
        section = page().split(f"## {chip.name}\n")[1].split("\n#")[0]
        rows = [line.split("|")[1:-1] for line in section.strip().splitlines()]
        assert len(rows) == 2 + 5 * 2 * 3
        assert {len(row) for row in rows} == {3 + len(METHODS)}
        assert [cell.strip() for cell in rows[2][:3]] == ["3,072", "50,000", "512"]
        assert all(re.fullmatch(r" [\d.,]+ (µs|ms) [CME] ", cell) for cell in rows[2][3:])
    assert "| H200 SXM | 4.72 ms C | 4.7 ms C | 954 µs C | 636 µs C | 159 µs C |" in page()
