# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.targets digits|cifar10`: does the exact target make better samples?

The same network is trained for as many steps on Eq. (12) with the whole data set as its references
and with a few random ones at each step, and on PFGM++'s loss with the points themselves, with exact
posterior means and with those of a few random references as targets. All are judged alike: the
held-out loss against the exact target, and the Fréchet distance of their samples in the features of
a classifier. Runs lie in --out, where a second call goes on; the curves go to docs/.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from pfgm_kernels.figures.canvas import GREY, SERIES, save, sheet, style
from pfgm_kernels.files import write_bytes
from pfgm_kernels.training import data as data_sets
from pfgm_kernels.training.config import CONFIG, TrainConfig
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.evaluation import evaluate
from pfgm_kernels.training.evaluation.judge import Features, classifier
from pfgm_kernels.training.generate import Sampler, Sampling
from pfgm_kernels.training.reports import STATS, read_stats
from pfgm_kernels.training.samples import collect
from pfgm_kernels.training.trainer import load_model, train

DOCS = Path(__file__).resolve().parents[1] / "docs"
SAMPLES, SOLVER_STEPS = 1000, 18
EQ_12, PLUS = "Eq. (12)", "PFGM++, D = 128"
FIELD: dict[str, Any] = {"method": "pfgm"}
MEANS: dict[str, Any] = {"method": "pfgmpp", "D": 128.0, "predicts": "denoiser"}
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    EQ_12: {
        "all references": FIELD,
        "512 references": FIELD | {"references": 512},
        "128 references": FIELD | {"references": 128},
    },
    PLUS: {
        "exact means": MEANS,
        "means of 4,096": MEANS | {"references": 4096},
        "means of 512": MEANS | {"references": 512},
        "means of 128": MEANS | {"references": 128},
        "the points": MEANS | {"targets": "clean"},
    },
}


@dataclass(frozen=True)
class Plan:
    """What is trained on a data set."""

    steps: int
    seeds: int
    settings: dict[str, Any]
    every: int
    families: dict[str, tuple[str, ...]]
    judged: bool
    """Whether samples are drawn and judged, too."""


FAMILIES_OF_IMAGES = {EQ_12: ("all references", "128 references"), PLUS: (*FAMILIES[PLUS],)}
PLANS = {
    "digits": Plan(
        2000,
        5,
        {"network": "perceptron"},
        100,
        {
            EQ_12: ("all references", "512 references", "128 references"),
            PLUS: ("exact means", "the points"),
        },
        judged=True,
    ),
    "cifar10": Plan(300, 1, {"network": "unet"}, 25, FAMILIES_OF_IMAGES, judged=False),
}


@dataclass(frozen=True)
class Outcome:
    """Of the runs of one target, a value a seed."""

    curves: list[list[tuple[int, float]]]
    """Held-out losses by step."""
    distances: list[float]

    @property
    def losses(self) -> list[float]:
        return [curve[-1][1] for curve in self.curves]


def outcome(
    data: DataSet,
    judge: Features | None,
    folders: Iterable[Path],
    plan: Plan,
    settings: dict[str, Any],
) -> Outcome:
    """Trains what is not trained yet."""
    found = Outcome([], [])
    for seed, folder in enumerate(folders):
        options = plan.settings | settings | {"seed": seed, "steps": plan.steps, "batch_size": 128}
        config = TrainConfig.for_data(data, **options, checkpoint_every=plan.every)
        run = train(config, data, folder, resume=(folder / CONFIG).exists(), console=Console())
        if not run.finished:
            raise SystemExit("stopped; the same command goes on")
        lines = [line for line in read_stats(folder / STATS) if "held_out_loss" in line]
        found.curves.append([(int(line["step"]), line["held_out_loss"]) for line in lines])
        if judge is not None:
            found.distances.append(distance(folder, data, judge))
    return found


def distance(folder: Path, data: DataSet, judge: Features) -> float:
    path = folder / "judged.json"
    if not path.exists():
        network, config = load_model(folder)
        sampler = Sampler(network, config, Sampling(steps=SOLVER_STEPS, batch=100))
        samples, _ = collect(sampler, range(SAMPLES), Console())
        judged = evaluate(samples, data, judge, console=Console())
        values = {
            "samples": judged.sample.frechet_distance,
            "held_out": judged.held_out.frechet_distance,
        }
        write_bytes(path, json.dumps(values).encode())
    values = json.loads(path.read_text())
    return float(values["samples"])


def table(name: str, found: dict[str, dict[str, Outcome]], plan: Plan) -> str:
    columns = ["loss", "target", "held-out loss"]
    columns += [f"Fréchet distance of {SAMPLES:,} samples"] if plan.judged else []
    lines = [_row(columns), _row(["---"] * len(columns))]
    for family, outcomes in found.items():
        for target, each in outcomes.items():
            cells = [family, target, _mean(each.losses, 4)]
            lines.append(_row(cells + ([_mean(each.distances, 3)] if plan.judged else [])))
    seeds = f"mean ± standard error of {plan.seeds} seeds" if plan.seeds > 1 else "one seed"
    return "\n".join([f"{name}, {plan.steps:,} steps of 128 images, {seeds}:", "", *lines, ""])


def differences(found: dict[str, dict[str, Outcome]]) -> str:
    """By seed, of each target beside the first of its loss."""
    lines = []
    for family, outcomes in found.items():
        (first, known), *others = outcomes.items()
        for target, each in others:
            losses = [b / a - 1 for a, b in zip(known.losses, each.losses, strict=True)]
            gaps = [b - a for a, b in zip(known.distances, each.distances, strict=True)]
            far = f", distances greater by {_mean(gaps, 2)}" if gaps else ""
            lines.append(f"{family}, {target} beside {first}: loss × 1 + {_mean(losses, 2)}{far}")
    return "\n".join(lines)


def curves(found: dict[str, dict[str, Outcome]]) -> Figure:
    """Held-out loss by step: a panel a loss, a colour a target, a line a seed."""
    figure = sheet(1 + 5 * len(found), 4.2)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (family, outcomes) in zip(panels, found.items(), strict=True):
        for (target, each), colour in zip(outcomes.items(), SERIES, strict=False):
            for i, curve in enumerate(each.curves):
                label = target if i == 0 else None
                axes.plot(*zip(*curve, strict=True), color=colour, linewidth=1.2, label=label)
        axes.set(title=family, xlabel="step", ylabel="held-out loss, exact target", yscale="log")
        axes.grid(alpha=0.4, which="both", linewidth=0.5, color=GREY)
        axes.legend()
    return figure


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _mean(values: list[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}g}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.1g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", choices=PLANS)
    parser.add_argument("--out", type=Path, default=Path("out/targets"))
    options = parser.parse_args()
    plan, data = PLANS[options.data], data_sets.load(options.data)
    judge = classifier(data, Console()) if plan.judged else None
    found: dict[str, dict[str, Outcome]] = {}
    for family, targets in plan.families.items():
        for target in targets:
            name = f"{family} {target}".translate(str.maketrans(" ", "-", "().,=+"))
            folders = [options.out / options.data / f"{name}-{i}" for i in range(plan.seeds)]
            each = outcome(data, judge, folders, plan, FAMILIES[family][target])
            found.setdefault(family, {})[target] = each
    print(table(options.data, found, plan))
    print(differences(found))
    with style():
        save(curves(found), DOCS / "figures" / f"targets-{options.data}.png")


if __name__ == "__main__":
    main()
