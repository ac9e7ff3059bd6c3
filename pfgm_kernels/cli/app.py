# SPDX-License-Identifier: Apache-2.0
"""What the commands are registered with."""

from __future__ import annotations

from typing import Any

try:
    import typer
    from typer.core import TyperGroup
except ImportError as error:
    raise SystemExit(
        "pfgm needs typer: pip install -e '.[train]' in the project's folder"
    ) from error

INTERRUPTED = 130


class _Group(TyperGroup):
    """Turns the errors of bad input into one sentence."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
            text = " ".join(str(error).split())
            if isinstance(error, OSError) and error.errno and error.filename is None:
                text += ": standard output"  # whatever else is written to names its file
            typer.echo(f"pfgm: {text}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False)


@app.callback()
def _pfgm() -> None:
    """Poisson flow generative models on the exact field of a whole data set."""
