# SPDX-License-Identifier: Apache-2.0
"""`pfgm report`."""

from __future__ import annotations

from typing import Annotated

import typer

from pfgm_kernels.cli.app import app


@app.command()
def report(
    check: Annotated[
        bool, typer.Option("--check", help="First have all kernels prove themselves on this GPU.")
    ] = False,
) -> None:
    """Say which backends there are and, of the others, why not; on a GPU, what has proven itself.

    With --check the exit code is 1 where kernels failed.
    """
    import pfgm_kernels

    states = pfgm_kernels.report(check)
    typer.echo(str(states))
    verdicts = [state for name, state in states.items() if ", " in name]
    if check and not verdicts:
        raise ValueError("report --check expects a GPU that kernels can run on")
    if check and any(state.startswith("FAILED") for state in verdicts):
        raise typer.Exit(1)
