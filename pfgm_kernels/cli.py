# SPDX-License-Identifier: Apache-2.0
"""The command line `pfgm`: report, train, sample, evaluate, figures and demo.

Bad input ends with one sentence on the standard error and exit code 2; a run that was interrupted
ends with exit code 130, and one whose output nobody reads any more as SIGPIPE ends it.
"""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

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
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
) -> None:
    """Train a network; with --resume, what is not given stays as it was."""
    from pfgm_kernels.training import data as data_sets
    from pfgm_kernels.training import settings as known
    from pfgm_kernels.training import trainer
    from pfgm_kernels.training.config import TrainConfig

    options = {
        "data": data,
        "steps": steps,
        "seed": seed,
        "checkpoint_every": checkpoint_every,
        "network": network,
    }
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    given |= known.overrides(TrainConfig, settings or [])
    if resume:
        if config or conditional:  # they would be ignored
            raise ValueError(
                "--resume expects the run's own settings, got --config or --conditional"
            )
        stored = TrainConfig.read(out)
        points = data_sets.load(given.pop("data", stored.data))
        run_config = replace(stored, data=points.name, **given)
    else:
        name = config or (given.get("data") if given.get("data") in known.PRESETS else None)
        given = (known.read(TrainConfig, name) if name else {}) | given
        if "data" not in given:
            names = ", ".join(data_sets.NAMES)
            raise ValueError(f"expected --data with one of {names}, or {data_sets.PATHS}")
        points = data_sets.load(given.pop("data"))
        run_config = TrainConfig.for_data(points, conditional=conditional, **given)
    run = trainer.train(run_config, points, out, resume=resume)
    if not run.finished:
        raise typer.Exit(INTERRUPTED)
    typer.echo(f"Trained for {run_config.steps} steps: {out / 'model.safetensors'}")


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
        points = data_sets.load(data or config.data)
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


@app.command("figures")
def draw_figures(
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")],
    names: Annotated[list[str] | None, typer.Argument(help="Some of them; all by default.")] = None,
    format: Annotated[str, typer.Option(help="png or svg.")] = "png",
    data: Annotated[
        str, typer.Option(help="Images for weights and bias: digits, mnist, cifar10 or a path.")
    ] = "digits",
) -> None:
    """Draw the article's pictures with the op itself.

    They are four-sources, far-field, shell, hemisphere, trajectories, weights and bias.
    """
    from rich.console import Console

    from pfgm_kernels import figures
    from pfgm_kernels.training import data as data_sets
    from pfgm_kernels.training.progress import progress_bar

    names = names or [*figures.NAMES]
    for name in names:
        if name not in figures.NAMES:
            raise ValueError(f"unknown figure {name!r}; expected one of {', '.join(figures.NAMES)}")
    if format not in figures.FORMATS:
        raise ValueError(f"--format expects one of {', '.join(figures.FORMATS)}, got {format!r}")
    images = data_sets.load(data)
    if not images.is_image:
        raise ValueError(f"--data expects images (digits, mnist, cifar10 or a path), got {data}")
    with progress_bar(Console(), "Drawing", len(names)) as update:
        for done, name in enumerate(names):
            update(done, name)
            figures.draw_figure(name, out / f"{name}.{format}", images)
        update(len(names), "")
    typer.echo(f"{len(names)} pictures: {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("out/demo"),
) -> None:
    """Do the main job from end to end on the bundled digits, in a few minutes."""
    from pfgm_kernels.demo import run

    if not run(out):
        raise typer.Exit(INTERRUPTED)


def main() -> None:
    # Who closes a pipe early (`pfgm report | head -1`) ends us as any other command: quietly, by
    # SIGPIPE, which a shell shows as 141. No socket is written to that the signal could hit.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    app()


if __name__ == "__main__":
    main()
