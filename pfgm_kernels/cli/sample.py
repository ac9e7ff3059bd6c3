# SPDX-License-Identifier: Apache-2.0
"""`pfgm sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pfgm_kernels.cli.app import app


@app.command()
def sample(
    model: Annotated[Path, typer.Option(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("samples.png"),
    count: Annotated[int, typer.Option(help="Number of samples.")] = 100,
    solver: Annotated[str, typer.Option(help="euler, heun, heun_euler or rk45.")] = "heun",
    steps: Annotated[int, typer.Option(help="Steps of euler and heun.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the prior.")] = 0,
) -> None:
    """Draw samples from a trained network and write a picture of them."""
    from rich.console import Console

    from pfgm_kernels import figures
    from pfgm_kernels.training.generate import generate
    from pfgm_kernels.training.trainer import load_model

    if out.suffix != ".png":
        raise ValueError(f"--out expects a file name that ends in .png, got {out}")
    network, config = load_model(model)
    result = generate(
        network, config, count, seed=seed, solver=solver, steps=steps, console=Console()
    )
    figures.draw_samples(result.x, out)
    typer.echo(f"{count} samples, {result.nfe} function evaluations: {out}")
