# SPDX-License-Identifier: Apache-2.0
"""Options that commands share, and what is written in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

MOST = 10_000_000
"""Seeds; a range is quickly mistyped."""

Model = Annotated[Path, typer.Option(help="Folder of a run.")]
Step = Annotated[
    int | None, typer.Option(help="Take the checkpoint of this step, not the finished model.")
]
Solver = Annotated[str, typer.Option(help="euler, heun, heun_euler or rk45.")]
Steps = Annotated[int, typer.Option(help="Steps of solvers with a grid.")]
Batch = Annotated[
    int | None,
    typer.Option(help="Samples at a time; if not given 16, or 256 on a GPU."),
]

T = TypeVar("T")


def seeds_of(text: str) -> list[int]:
    """The seeds that ``0-63`` or ``3,5,10-12`` names, in that order. Raises ValueError."""
    from pfgm_kernels.flow._seeds import MOST_SEED

    wanted = "--seeds expects numbers and ranges as in 3,5,10-12"
    seeds: list[int] = []
    for word in text.split(","):
        first, dash, last = (part.strip() for part in word.partition("-"))
        if not all(part.isdecimal() for part in (first, last if dash else first)):
            raise ValueError(f"{wanted}, got {text!r}")
        start, end = int(first), int(last if dash else first)
        if not start <= end <= MOST_SEED:
            raise ValueError(f"{wanted}, from 0 to {MOST_SEED} and rising, got {word.strip()!r}")
        if len(seeds) + end - start >= MOST:
            raise ValueError(f"{wanted}, at most {MOST:,} in all, got {text!r}")
        seeds += range(start, end + 1)
    if len({*seeds}) < len(seeds):
        raise ValueError(f"{wanted}, each once, got {text!r}")
    return seeds


def list_of(name: str, kind: Callable[[str], T], text: str | None) -> tuple[T, ...]:
    """The numbers of ``text``, with commas between them; none where it is not given."""
    try:
        return () if text is None else tuple(kind(word) for word in text.split(","))
    except ValueError:
        what = "integers" if kind is int else "numbers"
        raise ValueError(f"{name} expects {what} as in 1,2, got {text!r}") from None
