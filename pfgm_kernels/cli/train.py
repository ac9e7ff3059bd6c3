# SPDX-License-Identifier: Apache-2.0
"""`pfgm train`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pfgm_kernels.cli.app import INTERRUPTED, app


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Any setting, as batch_size=64 or D=inf."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Name or path of the data set.")] = None,
    config: Annotated[
        str | None, typer.Option(help="A preset, or a YAML file; that of the data if not given.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps in all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything; 0 if not given.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    network: Annotated[
        str | None, typer.Option(help="perceptron, unet, ddpmpp or package.module:factory.")
    ] = None,
    conditional: Annotated[
        bool, typer.Option("--conditional", help="Train by class, with the data's labels.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu or cuda; auto is a GPU where there is one.")
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(help="Share of the data to hold out; a tenth if not given.")
    ] = None,
    flips: Annotated[
        bool, typer.Option("--flips", help="Train on the mirror images, too.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
) -> None:
    """Train a network; with --resume, what is not given stays as it was."""
    from rich.console import Console

    from pfgm_kernels.training import data as data_sets
    from pfgm_kernels.training import settings as known
    from pfgm_kernels.training import trainer
    from pfgm_kernels.training.config import TrainConfig
    from pfgm_kernels.training.progress import reading

    options = {
        "data": data,
        "steps": steps,
        "seed": seed,
        "checkpoint_every": checkpoint_every,
        "network": network,
        "device": device,
        "held_out": held_out,
        "flips": flips or None,
    }
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    given |= known.overrides(TrainConfig, settings or [])
    console = Console(
        quiet=int(os.environ.get("RANK") or 0) > 0
    )  # of several ranks the first talks
    if resume:
        if config or conditional:  # they would be ignored
            raise ValueError(
                "--resume expects the run's own settings, got --config or --conditional"
            )
        wanted = replace(TrainConfig.read(out), **given)
        with reading(console) as progress:
            points = wanted.load_data(progress)
        run_config = replace(wanted, data=points.name)
    else:
        named = given.get("data")
        presets = {*data_sets.NAMES} & {*known.PRESETS}
        name = config or (named if named in presets else None)
        given = (known.read(TrainConfig, name) if name else {}) | given
        if "data" not in given:
            names = ", ".join(data_sets.NAMES)
            raise ValueError(f"expected --data with one of {names}, or {data_sets.PATHS}")
        kept = {key: given.pop(key) for key in ("held_out", "flips") if key in given}
        with reading(console) as progress:
            points = data_sets.load(given.pop("data"), progress=progress, **kept)
        if not name and points.is_image:
            given = known.read(TrainConfig, "folder") | given
        run_config = TrainConfig.for_data(points, conditional=conditional, **given)
    run = trainer.train(run_config, points, out, resume=resume)
    if not run.finished:
        raise typer.Exit(INTERRUPTED)
    done = f"Trained for {run_config.steps} steps: {out / 'model.safetensors'}"
    console.print(done, highlight=False, soft_wrap=True)
