# SPDX-License-Identifier: Apache-2.0
"""`pfgm likelihood`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pfgm_kernels.cli import options
from pfgm_kernels.cli.app import app


@app.command()
def likelihood(
    model: options.Model,
    count: Annotated[int, typer.Option(help="Held-out points, at random; or all of fewer.")] = 256,
    data: Annotated[str | None, typer.Option(help="Data set; the run's if not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file to write, too.")] = None,
    step: options.Step = None,
    sigma_min: Annotated[
        float, typer.Option(help="Noise level of the density: each gives a bound.")
    ] = 0.01,
    rtol: Annotated[float, typer.Option(help="Tolerance of rk45.")] = 1e-4,
    exact: Annotated[
        bool, typer.Option("--exact", help="No estimate of the divergence: a pass a dimension.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the choice, of noise and of probes.")] = 0,
    batch: options.Batch = None,
) -> None:
    """Bits per dimension of held-out data under the flow of a trained network, by its ODE.

    Of 8-bit images, with uniform noise in the width of a step, it is a bound of the code length.
    """
    from rich.console import Console

    from pfgm_kernels.training import data as data_sets
    from pfgm_kernels.training import likelihood as likelihoods
    from pfgm_kernels.training.trainer import load_model

    network, config = load_model(model, step=step)
    points = config.load_data() if data is None else data_sets.load(data)
    how: dict[str, Any] = {
        "sigma_min": sigma_min,
        "rtol": rtol,
        "exact": exact,
        "seed": seed,
        "batch": batch,
    }
    console = Console()
    result = likelihoods.likelihood(network, config, points, count, console=console, **how)
    if out is not None:
        source = {"model": str(model), "step": step, "data": points.name, "T": config.T} | how
        likelihoods.write(result, source, out)
    error = "" if result.error is None else f" ± {result.error:.2g}"
    typer.echo(
        f"{result.mean:.4g}{error} bits per dimension of {len(result.bits)} held-out points, "
        f"{result.nfe:.0f} function evaluations" + ("" if out is None else f": {out}")
    )
