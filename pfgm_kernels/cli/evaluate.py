# SPDX-License-Identifier: Apache-2.0
"""`pfgm evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pfgm_kernels.cli.app import app


@app.command()
def evaluate(
    out: Annotated[Path, typer.Option(help="Folder of metrics.json and samples.png.")],
    model: Annotated[Path | None, typer.Option(help="Folder of a finished run.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Samples instead of a model's: a folder or an .npz file.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set that they are like; the run's if not given.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Samples; 1000 of a model, all images if not given.")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            help="A TorchScript file, as inception-2015-12-05.pt; a classifier trained on the "
            "data set if not given. It is a program, and is run: name only what you trust."
        ),
    ] = None,
    solver: Annotated[str, typer.Option(help="euler, heun, heun_euler or rk45.")] = "heun",
    steps: Annotated[int, typer.Option(help="Steps of euler and heun.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the prior.")] = 0,
    replace: Annotated[
        bool, typer.Option("--replace", help="Overwrite an evaluation in --out.")
    ] = False,
) -> None:
    """Judge samples beside held-out data: Fréchet distance, Inception Score, precision, copies.

    Measures that depend on the number of images are taken of as many samples as held-out images.
    """
    from rich.console import Console

    from pfgm_kernels import figures
    from pfgm_kernels.training import data as data_sets
    from pfgm_kernels.training import evaluation
    from pfgm_kernels.training.generate import generate
    from pfgm_kernels.training.trainer import load_model

    if (model is None) == (images is None):
        raise ValueError("expected either --model or --images")
    metrics, picture = out / "metrics.json", out / "samples.png"
    if not replace and (metrics.exists() or picture.exists()):
        raise ValueError(
            f"{out} already holds an evaluation: overwrite it with --replace or name another"
        )
    judge = None if features is None else evaluation.TorchScriptFeatures(features)
    console = Console()
    if model is not None:
        network, config = load_model(model)
        points = config.load_data() if data is None else data_sets.load(data)
        size = 1000 if count is None else count
        options: dict[str, Any] = {"seed": seed, "solver": solver, "steps": steps}
        result = generate(network, config, size, console=console, **options)
        samples, source = result.x, {"model": str(model), "nfe": result.nfe, **options}
    else:
        assert images is not None  # one of them is given
        if data is None:
            raise ValueError(f"expected --data with one of {', '.join(data_sets.NAMES)}")
        points = data_sets.load(data)
        samples, source = evaluation.read_images(images, points, count), {"images": str(images)}
    found = evaluation.evaluate(samples, points, judge, console=console)
    source |= {"data": points.name, "features": None if judge is None else judge.digest}
    evaluation.write_metrics(found, source, metrics)
    figures.draw_evaluation(evaluation.stored(samples, points), points, found, picture)
    console.print(evaluation.table(found))
    typer.echo(f"{found.samples} samples judged: {out}")
