# SPDX-License-Identifier: Apache-2.0
"""`pfgm evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pfgm_kernels.cli import options
from pfgm_kernels.cli.app import app


@app.command()
def evaluate(
    out: Annotated[Path, typer.Option(help="Folder of metrics.json and samples.png.")],
    model: Annotated[Path | None, typer.Option(help="Folder of a run.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Samples instead of a model's: a folder or an .npz file.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set that they are like; the run's if not given.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="How many of --images; all if not given.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Of a model's samples, as in 3,5,10-12; 0-999 if not given.")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            help="A TorchScript file, as inception-2015-12-05.pt; a classifier trained on the "
            "data set if not given. It is a program, and is run: name only what you trust."
        ),
    ] = None,
    step: options.Step = None,
    solver: options.Solver = "heun",
    steps: options.Steps = 50,
    batch: options.Batch = None,
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
    from pfgm_kernels.training.generate import Sampler, Sampling
    from pfgm_kernels.training.likelihood import check_data
    from pfgm_kernels.training.samples import collect
    from pfgm_kernels.training.trainer import load_model

    if (model is None) == (images is None):
        raise ValueError("expected either --model or --images")
    if (model is None and seeds is not None) or (images is None and count is not None):
        raise ValueError("--seeds goes with --model and --count with --images, got another pair")
    metrics, picture = out / "metrics.json", out / "samples.png"
    if not replace and (metrics.exists() or picture.exists()):
        raise ValueError(
            f"{out} already holds an evaluation: overwrite it with --replace or name another"
        )
    judge = None if features is None else evaluation.TorchScriptFeatures(features)
    console = Console()
    if model is not None:
        wanted = options.seeds_of(seeds or "0-999")
        network, config = load_model(model, step=step)
        points = config.load_data() if data is None else data_sets.load(data)
        check_data(config, points)
        sampler = Sampler(network, config, Sampling(solver, steps, batch=batch))
        samples, evaluations = collect(sampler, wanted, console)
        source: dict[str, Any] = {"model": str(model), "step": step, "seeds": seeds or "0-999"}
        source |= {"nfe": evaluations} | asdict(sampler.how)
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
