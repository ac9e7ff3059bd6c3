# SPDX-License-Identifier: Apache-2.0
"""What GPUs can do at most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Peaks in 10¹² operations a second, dense, at boost clock; bandwidths in 10¹² bytes a second.

    device: the name that the driver gives it; one chip is sold in versions of different speed.
    float64: by tensor cores where the chip has such; float64_units: without them. bfloat16:
    products with float32 sums; int8: those of 8-bit integers. cache: the L2's bandwidth, about;
    vendors do not give it.
    """

    name: str
    device: str
    float32: float
    float64: float
    float64_units: float
    bfloat16: float
    int8: float
    bandwidth: float
    cache: float
    multiprocessors: int
    shared_bytes: int
    capability: tuple[int, int]
    source: str


CHIPS = (
    Chip(
        *(
            "H200 SXM",
            "NVIDIA H200",
            66.9,
            66.9,
            33.5,
            989.4,
            1978.9,
            4.8,
            5.5,
            132,
            232_448,
            (9, 0),
        ),
        "NVIDIA H100 architecture whitepaper (the same GPU), H200 datasheet (memory)",
    ),
    Chip(
        *("H100 SXM", "NVIDIA H100 80GB HBM3", 66.9, 66.9, 33.5, 989.4, 1978.9, 3.35, 5.5, 132),
        *(232_448, (9, 0), "NVIDIA H100 architecture whitepaper and datasheet"),
    ),
    Chip(
        *("A100 SXM 80 GB", "NVIDIA A100-SXM4-80GB", 19.5, 19.5, 9.7, 312, 624, 2.039, 4.5, 108),
        *(166_912, (8, 0), "NVIDIA A100 datasheet"),
    ),
    Chip(
        *(
            "RTX 5090",
            "NVIDIA GeForce RTX 5090",
            104.8,
            1.64,
            1.64,
            209.5,
            838,
            1.792,
            6,
            170,
            101_376,
        ),
        *((12, 0), "NVIDIA RTX Blackwell GPU architecture whitepaper"),
    ),
    Chip(
        *(
            "RTX 4090",
            "NVIDIA GeForce RTX 4090",
            82.6,
            1.29,
            1.29,
            165.2,
            660.6,
            1.008,
            4.9,
            128,
            101_376,
        ),
        *((8, 9), "NVIDIA Ada GPU architecture whitepaper"),
    ),
)


def chip_of(device_name: str) -> Chip | None:
    """The chip that the driver calls so; None where it is not in the table."""
    return next((chip for chip in CHIPS if chip.device == device_name), None)
