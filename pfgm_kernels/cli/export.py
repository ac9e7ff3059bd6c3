# SPDX-License-Identifier: Apache-2.0
"""`pfgm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pfgm_kernels.cli.app import app


@app.command("export")
def export_model(
    model: Annotated[Path, typer.Option(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    network: Annotated[
        str | None,
        typer.Option(help="package.module:factory, of a network that was given from Python."),
    ] = None,
) -> None:
    """Save a trained model as a pipeline of diffusers, which its from_pretrained reads."""
    from pfgm_kernels.training.pipeline.export import export

    pipeline = export(model, out, network)
    typer.echo(f"{type(pipeline).__name__}, {pipeline.unet.num_parameters()} parameters: {out}")
