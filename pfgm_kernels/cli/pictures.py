# SPDX-License-Identifier: Apache-2.0
"""`pfgm figures` and `pfgm demo`: what needs no run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pfgm_kernels.cli.app import INTERRUPTED, app


@app.command("figures")
def draw_figures(
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")],
    names: Annotated[list[str] | None, typer.Argument(help="Some of them; all by default.")] = None,
    format: Annotated[str, typer.Option(help="png or svg.")] = "png",
    data: Annotated[
        str, typer.Option(help="Images for weights and bias: digits, mnist, cifar10 or a path.")
    ] = "digits",
) -> None:
    """Draw the article's pictures with the op itself.

    They are four-sources, far-field, shell, hemisphere, trajectories, weights and bias.
    """
    from rich.console import Console

    from pfgm_kernels import figures
    from pfgm_kernels.training import data as data_sets
    from pfgm_kernels.training.progress import progress_bar

    names = names or [*figures.NAMES]
    for name in names:
        if name not in figures.NAMES:
            raise ValueError(f"unknown figure {name!r}; expected one of {', '.join(figures.NAMES)}")
    if format not in figures.FORMATS:
        raise ValueError(f"--format expects one of {', '.join(figures.FORMATS)}, got {format!r}")
    images = data_sets.load(data)
    if not images.is_image:
        raise ValueError(f"--data expects images (digits, mnist, cifar10 or a path), got {data}")
    with progress_bar(Console(), "Drawing", len(names)) as update:
        for done, name in enumerate(names):
            update(done, name)
            figures.draw_figure(name, out / f"{name}.{format}", images)
        update(len(names), "")
    typer.echo(f"{len(names)} pictures: {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("out/demo"),
) -> None:
    """Do the main job from end to end on the bundled digits, in a few minutes."""
    from pfgm_kernels.demo import run

    if not run(out):
        raise typer.Exit(INTERRUPTED)
