# SPDX-License-Identifier: Apache-2.0
"""The main job from end to end on the bundled digits: check the op, train, sample, judge."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pfgm_kernels
from pfgm_kernels import figures
from pfgm_kernels.files import locked, write_bytes
from pfgm_kernels.flow import Trajectory, perturb, sample, sample_prior
from pfgm_kernels.memory import PeakMemory
from pfgm_kernels.training import data as data_sets
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.evaluation import Evaluation, evaluate
from pfgm_kernels.training.evaluation.report import OF_EACH_SAMPLE
from pfgm_kernels.training.generate import Sampler, Sampling
from pfgm_kernels.training.reports import STATS, read_stats
from pfgm_kernels.training.trainer import load_model, train

SAMPLES = 1000
SOLVER, SOLVER_STEPS = "heun", 30
SEED = 0
QUERIES = 512


@dataclass(frozen=True)
class Measurement:
    """One way to compute the target of Eq. (12) for the same queries."""

    name: str
    seconds: float
    peak_extra_mib: float | None
    worst_relative_error: float


def run(out: Path) -> bool:
    """Writes pictures and ``metrics.json`` to ``out``; False where training was interrupted.

    What an earlier demo left there is replaced. Raises ValueError where another process is at work
    in ``out``.
    """
    with locked(out):
        return _run(out)


def _run(out: Path) -> bool:
    console = Console()
    seconds: dict[str, float] = {}
    console.print("[bold]Backends[/bold]")
    console.print(str(pfgm_kernels.report()), highlight=False, soft_wrap=True)
    data = data_sets.load("digits")
    config = TrainConfig.for_data(data, seed=SEED)
    with _phase(console, seconds, "check", "The op against float64, and the published formula"):
        measurements = check_op(data, config)
        console.print(_op_table(measurements))
    with _phase(console, seconds, "train", f"Training on {len(data.train)} digits"):
        folder = out / "run"
        training = train(config, data, folder, replace=True, console=console)
    if not training.finished:
        return False
    with _phase(
        console, seconds, "sample", f"Sampling by the ODE, from the prior at T = {config.T:.1f}"
    ):
        network, _ = load_model(folder)
        how = Sampling(SOLVER, SOLVER_STEPS, batch=SAMPLES)
        sampler = Sampler(network, config, how)
        (part,) = sampler.generate(range(SAMPLES), console, keep_path=True)
        result = part.result
    with _phase(console, seconds, "evaluate", "Judging the samples by a classifier of real digits"):
        evaluation = evaluate(result.x.clamp(data.low, data.high), data)
    with _phase(console, seconds, "draw", "Drawing"):
        _draw(out, data, result, evaluation, training.losses)
    reports = read_stats(folder / STATS)
    share = statistics.median(report["targets_share"] for report in reports)
    _write_metrics(out, evaluation, result.nfe, share, measurements, seconds, config)
    console.print(_summary(evaluation, result.nfe))
    console.print(
        f"The exact field of all {len(data.train)} digits took {share:.1%} of a training step.",
        highlight=False,
        soft_wrap=True,
    )
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    console.print(f"{spent}; in {out}:", highlight=False, soft_wrap=True)
    for path in sorted(path for path in out.glob("[!.]*") if path.is_file()):
        console.print(f"  {path.name}", highlight=False, soft_wrap=True)
    return True


def published_field(x: Tensor, t: Tensor, x0: Tensor, gamma: float) -> Tensor:
    """The target as the code of Xu et al. 2022 computes it: three tensors of shape (B, N, d + 1).

    The weight of a reference at distance r is (r_min / r)^(d+1), over the sum of the weights; 1e-7
    keeps both divisions finite.
    """
    queries = torch.cat([x.flatten(1), t[:, None]], dim=1)
    sources = torch.nn.functional.pad(x0.flatten(1), (0, 1))
    difference = sources - queries[:, None]
    distance = difference.square().sum(dim=2).sqrt()
    weights = (distance.amin(dim=1, keepdim=True) / (distance + 1e-7)) ** queries.shape[1]
    weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-7)
    field = (weights[:, :, None] * difference).sum(dim=1)
    return math.sqrt(x0[0].numel()) * field / (field.norm(dim=1, keepdim=True) + gamma)


def exact_field(x: Tensor, t: Tensor, x0: Tensor, gamma: float) -> Tensor:
    """The same target in float64 by direct differences, one query at a time."""
    d = x0[0].numel()
    rows = []
    for query, height in zip(x.flatten(1).double(), t.double(), strict=True):
        difference = x0.flatten(1).double() - query
        squared = difference.square().sum(dim=1) + height.square()
        weights = torch.softmax(-(d + 1) / 2 * squared.log(), dim=0)
        row = torch.cat([weights @ difference, -height[None]])
        rows.append(math.sqrt(d) * row / (row.norm() + gamma))
    return torch.stack(rows)


def check_op(data: DataSet, config: TrainConfig) -> list[Measurement]:
    """Error, time and memory of the op and of the published formula, for one batch of queries.

    Raises RuntimeError where the op misses float64 by more than 1e-6 of a row's norm.
    """
    generator = torch.Generator("cpu").manual_seed(SEED)
    x0, references = data.decode(data.train), data.references
    rows = torch.randint(len(x0), (QUERIES,), generator=generator, device=generator.device)
    x, t = perturb(x0[rows], sigma=config.sigma, tau=config.tau, M=config.M, generator=generator)
    exact = exact_field(x, t, x0, config.gamma)
    scale = math.sqrt(x0[0].numel())
    contenders: dict[str, Callable[[], Tensor]] = {
        "poisson_field": lambda: pfgm_kernels.poisson_field(
            x, t, references, gamma=config.gamma, scale=scale
        ),
        "published formula": lambda: published_field(x, t, x0, config.gamma),
    }
    measurements = []
    for name, compute in contenders.items():
        peak = peak_extra_memory(compute)
        error = (compute().double() - exact).norm(dim=1) / exact.norm(dim=1)
        measurements.append(Measurement(name, _median_seconds(compute), peak, error.max().item()))
    if measurements[0].worst_relative_error > 1e-6:
        raise RuntimeError(
            "the op is wrong on this machine: expected a relative error under 1e-6, "
            f"got {measurements[0].worst_relative_error:.1e}"
        )
    return measurements


def peak_extra_memory(compute: Callable[[], object]) -> float | None:
    """MiB that computing takes at its peak; None where the system does not tell."""
    with PeakMemory() as peak:
        compute()
    return None if peak.extra_bytes is None else peak.extra_bytes / 2**20


def _median_seconds(compute: Callable[[], object], repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        compute()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _draw(
    out: Path, data: DataSet, result: Trajectory, evaluation: Evaluation, losses: list[float]
) -> None:
    """The pictures; of samples and of held-out digits, the first ten of each class."""
    assert data.held_out_labels is not None
    classes = torch.tensor(evaluation.classes, device=result.x.device)
    samples = _first_of_each_class(result.x, classes)
    real = _first_of_each_class(data.decode(data.held_out), data.held_out_labels)
    figures.draw_comparison(samples, real, out / "samples.png")
    figures.draw_loss(losses, out / "loss.png")
    points = data_sets.load("swiss_roll")
    references, T = points.references, 8.0
    lines = sample(
        lambda x, t: pfgm_kernels.poisson_field(x, t, references),
        sample_prior(450, (2,), T=T, generator=torch.Generator("cpu").manual_seed(SEED)),
        T=T,
        solver="heun",
        steps=120,
        keep_path=True,
    )
    assert result.path is not None
    few = Trajectory(result.x[:10], result.nfe, result.times, result.path[:, :10])
    figures.draw_trajectories(lines, points.train, few, out / "trajectories.png")


def _first_of_each_class(images: Tensor, classes: Tensor, count: int = 10) -> Tensor:
    """Images (n, h, w), the first ``count`` of each class in a row; blank where there are fewer."""
    rows = []
    for label in range(10):
        row = images[classes == label][:count]
        rows += [row, -images.new_ones(count - len(row), *images.shape[1:])]
    return torch.cat(rows)


def _write_metrics(
    out: Path,
    evaluation: Evaluation,
    nfe: int,
    share: float,
    measurements: list[Measurement],
    seconds: dict[str, float],
    config: TrainConfig,
) -> None:
    values = asdict(evaluation)
    for name in OF_EACH_SAMPLE:
        del values[name]
    content = {
        **values,
        "nfe": nfe,
        "solver": SOLVER,
        "targets_share": share,
        "op": [asdict(measurement) for measurement in measurements],
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "config": asdict(config),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    write_bytes(out / "metrics.json", (json.dumps(content, indent=2) + "\n").encode())


@contextmanager
def _phase(console: Console, seconds: dict[str, float], name: str, title: str) -> Iterator[None]:
    console.print(f"\n[bold]{title}[/bold]", highlight=False)
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began


def _op_table(measurements: list[Measurement]) -> Table:
    table = Table("", "time", "peak memory", "worst error")
    for item in measurements:
        table.add_row(
            item.name,
            f"{item.seconds * 1e3:.1f} ms",
            "not known" if item.peak_extra_mib is None else f"{item.peak_extra_mib:.0f} MiB",
            f"{item.worst_relative_error:.1e}",
        )
    return table


def _summary(evaluation: Evaluation, nfe: int) -> Table:
    shares, sample, held_out = evaluation.class_shares, evaluation.sample, evaluation.held_out
    assert shares is not None  # digits are judged by a classifier
    table = Table(
        "", "samples", "held-out digits", title=f"{evaluation.samples} samples, {nfe} NFE"
    )
    table.add_row(
        "mean top probability",
        f"{sample.top_probability:.3f}",
        f"{held_out.top_probability:.3f}",
    )
    table.add_row(
        "Fréchet distance",
        f"{sample.frechet_distance:.2f}",
        f"{held_out.frechet_distance:.2f}",
    )
    table.add_row("shares of the classes", f"{min(shares):.1%} … {max(shares):.1%}", "")
    copies = [f"{quality.copies_share:.1%}" for quality in (sample, held_out)]
    table.add_row("copies of training digits", *copies)
    accuracy = f"{evaluation.held_out_accuracy:.1%}"
    table.add_row("accuracy of the classifier", "", accuracy)
    return table
