# SPDX-License-Identifier: Apache-2.0
"""`pfgm interpolate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pfgm_kernels.cli import options
from pfgm_kernels.cli.app import app


@app.command()
def interpolate(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="The picture to write, a .png file.")],
    images: Annotated[str, typer.Option(help="Numbers of held-out images.")] = "0,1,2,3",
    columns: Annotated[int, typer.Option(help="Images from each to the next.")] = 9,
    data: Annotated[str | None, typer.Option(help="Data set; the run's if not given.")] = None,
    step: options.Step = None,
    sigma_min: Annotated[float, typer.Option(help="Noise level where they are encoded.")] = 0.01,
    rtol: Annotated[float, typer.Option(help="Tolerance of rk45.")] = 1e-5,
) -> None:
    """Draw the way between held-out images, by their latents: a row from each to the next.

    At the ends of a row stand the images as they are, beside what encoding and sampling made of
    them.
    """
    from rich.console import Console

    from pfgm_kernels import figures
    from pfgm_kernels.training import data as data_sets
    from pfgm_kernels.training import interpolation, samples
    from pfgm_kernels.training.trainer import load_model

    if out.suffix.lower() != ".png":
        raise ValueError(f"--out expects a file name that ends in .png, got {out}")
    rows = options.list_of("--images", int, images)
    network, config = load_model(model, step=step)
    if not config.images:
        raise ValueError(f"interpolate expects a run of images, got one of {config.data}")
    points = config.load_data() if data is None else data_sets.load(data)
    how = {"sigma_min": sigma_min, "rtol": rtol}
    drawn = interpolation.paths(network, config, points, rows, columns, console=Console(), **how)
    shown = samples.points(samples.stored(drawn.flatten(0, 1), config), config)
    figures.draw_samples(shown, out, columns=columns + 2)
    typer.echo(f"{len(drawn)} rows of {columns} images: {out}")
