# SPDX-License-Identifier: Apache-2.0
"""`pfgm sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pfgm_kernels.cli import options
from pfgm_kernels.cli.app import INTERRUPTED, app

if TYPE_CHECKING:
    from rich.console import Console

    from pfgm_kernels.training.ranks import Ranks
    from pfgm_kernels.training.samples import SampleFolder

OTHER_FILES = (".bmp", ".gif", ".jpeg", ".jpg", ".npy", ".svg", ".webp", ".zip")
"""Hardly meant as a folder's name."""


@app.command()
def sample(
    model: options.Model,
    out: Annotated[
        Path, typer.Option(help="A picture (.png), arrays (.npz), or a folder of images.")
    ] = Path("samples.png"),
    seeds: Annotated[str, typer.Option(help="As in 3,5,10-12: a sample each.")] = "0-99",
    step: options.Step = None,
    solver: options.Solver = "heun",
    steps: options.Steps = 50,
    rho: Annotated[
        float | None, typer.Option(help="Of EDM's grid, which has 7; equal ratios if not given.")
    ] = None,
    sigma_min: Annotated[
        float, typer.Option(help="Noise level of the last step but the final one.")
    ] = 1e-3,
    rtol: Annotated[
        float | None, typer.Option(help="Tolerance of rk45; 1e-4 if not given.")
    ] = None,
    churn: Annotated[
        str | None,
        typer.Option(
            metavar="S_CHURN[,S_MIN,S_MAX,S_NOISE]",
            help="EDM's noise between steps, as in 40,0.05,50,1.003.",
        ),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Classes, as in 3 or 0,2: in turn; all if not given.")
    ] = None,
    batch: options.Batch = None,
) -> None:
    """Draw samples from a trained network: a seed makes the same one always.

    A folder gets an image a seed, as 000063.png, and those that it has are not drawn again: go on
    with an interrupted call, or add seeds, by the same command. Under torchrun the processes share
    the seeds.
    """
    from rich.console import Console

    from pfgm_kernels import figures
    from pfgm_kernels.training import samples
    from pfgm_kernels.training.generate import Sampler, Sampling
    from pfgm_kernels.training.ranks import joined
    from pfgm_kernels.training.trainer import load_model

    kind = out.suffix.lower()
    if kind in OTHER_FILES:
        raise ValueError(f"--out expects a .png or .npz file or a folder, got {out}")
    wanted = options.seeds_of(seeds)
    how = Sampling(
        solver=solver,
        steps=steps,
        rho=rho,
        sigma_min=sigma_min,
        rtol=rtol,
        churn=options.list_of("--churn", float, churn),
        labels=options.list_of("--labels", int, labels),
        batch=batch,
    )
    network, config = load_model(model, step=step)
    if kind == ".png":
        figures.check_drawable(config.event_shape)
    with joined(config.device) as ranks:
        sampler = Sampler(network, config, how, ranks)
        console = Console(quiet=ranks.rank > 0)
        if kind not in (".png", ".npz"):
            folder = samples.SampleFolder(out, sampler, network)
            _fill(folder, wanted, console, ranks)
            return
        drawn, evaluations = samples.collect(sampler, wanted, console, ranks)
        if ranks.rank > 0:
            return
        if kind == ".png":
            figures.draw_samples(samples.points(drawn, config), out)
        else:
            classes = sampler.how.labels_of(wanted) if config.classes else None
            samples.write_npz(out, drawn, wanted, classes)
        typer.echo(f"{len(wanted)} samples, {evaluations:g} function evaluations each: {out}")


def _fill(folder: SampleFolder, seeds: list[int], console: Console, ranks: Ranks) -> None:
    from pfgm_kernels.training.samples import share

    with folder.claimed(ranks):
        missing = folder.missing(share(seeds, folder.sampler.batch, ranks))
        try:
            for part in folder.sampler.generate(missing, console):
                folder.add(part)
        except KeyboardInterrupt:
            left = len(folder.missing(seeds))
            console.print(
                f"Stopped: {left} of {len(seeds)} images are left to draw in {folder.path}; the "
                "same command goes on.",
                soft_wrap=True,
            )
            raise typer.Exit(INTERRUPTED) from None
    if ranks.rank == 0:
        typer.echo(f"{len(seeds)} images: {folder.path}")
