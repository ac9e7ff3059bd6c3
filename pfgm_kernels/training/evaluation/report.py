# SPDX-License-Identifier: Apache-2.0
"""An evaluation as JSON, and as a table."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from pfgm_kernels.files import write_bytes
from pfgm_kernels.training.checkpoint import VERSION
from pfgm_kernels.training.evaluation.judge import Evaluation, Quality

OF_EACH_SAMPLE = ("classes", "nearest", "nearest_ratio")
LIBRARIES = ("numpy", "scikit-learn")


def write_metrics(evaluation: Evaluation, source: Mapping[str, Any], path: Path) -> None:
    """Writes all measures, ``source`` (JSON values that say what was judged) and versions."""
    measures = asdict(evaluation)
    for name in OF_EACH_SAMPLE:
        del measures[name]
    versions = {"pfgm_kernels": VERSION, "python": platform.python_version()}
    versions |= {"torch": torch.__version__, **{name: version(name) for name in LIBRARIES}}
    content = {"source": dict(source), **measures, "versions": versions}
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def table(evaluation: Evaluation) -> Table:
    """The measures of the samples beside those of the held-out images."""
    title = (
        f"{evaluation.feature_count} features by {evaluation.features}, n = {evaluation.count:,}"
    )
    caption = "Fréchet distances compare at equal n alone."
    rows = Table("", f"{evaluation.samples:,} samples", "held out", title=title, caption=caption)
    columns = (_column(evaluation.sample), _column(evaluation.held_out))
    for name in columns[0]:
        rows.add_row(name, *(column[name] for column in columns))
    if (accuracy := evaluation.held_out_accuracy) is not None:
        rows.add_row("accuracy of the classifier", "", f"{accuracy:.1%}")
    if evaluation.samples > evaluation.count:
        rows.add_row("Fréchet distance of all", f"{evaluation.frechet_distance_of_all:.4g}", "")
    return rows


def _column(quality: Quality) -> dict[str, str]:
    low, high = quality.copies_interval
    found = {
        "Fréchet distance": f"{quality.frechet_distance:.4g}",
        "precision": f"{quality.precision:.3f}",
        "recall": f"{quality.recall:.3f}",
        "copies (95 %)": f"{quality.copies_share:.1%} ({low:.1%} … {high:.1%})",
    }
    if quality.inception_score is not None:
        deviation = quality.inception_score_deviation
        spread = "" if deviation is None else f" ± {deviation:.2f}"
        found["Inception Score"] = f"{quality.inception_score:.2f}{spread}"
        found["mean top probability"] = f"{quality.top_probability:.3f}"
    return found
