# SPDX-License-Identifier: Apache-2.0
"""Between held-out data, by way of their latents under the flow of a trained network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from pfgm_kernels._checks import integer, positive
from pfgm_kernels.flow import encode, interpolate, sample
from pfgm_kernels.flow._queries import root_of
from pfgm_kernels.training import methods
from pfgm_kernels.training.config import TrainConfig
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.likelihood import check_data, labels_of
from pfgm_kernels.training.progress import progress_bar
from pfgm_kernels.training.ranks import Ranks
from pfgm_kernels.training.trainer import threads


def paths(
    model: Callable[..., Tensor],
    config: TrainConfig,
    data: DataSet,
    rows: Sequence[int],
    columns: int,
    *,
    sigma_min: float,
    rtol: float,
    console: Console,
) -> Tensor:
    """From each of the held-out ``rows`` to the next, (len(rows) - 1, columns + 2, *event) float32.

    Both are encoded at the noise level ``sigma_min``, and `interpolate` goes between their latents
    in ``columns`` steps that are followed back: the first and the last are what became of the two,
    which stand beside them as they are. A class-conditional model has the class of the nearer one.

    Raises ValueError for fewer than two rows, or rows that the held-out part has not, and for data
    of another kind than the run's.
    """
    check_data(config, data)
    count = len(data.held_out)
    if len(rows) < 2 or not all(0 <= row < count for row in rows):
        raise ValueError(
            f"images expects two or more held-out rows from 0 to {count - 1}, got {[*rows]}"
        )
    integer("columns", columns, 2)
    device, places = Ranks().device(config.device), torch.tensor([*rows], device="cpu")
    if isinstance(model, torch.nn.Module):
        model.to(device)
    field = methods.field_of(config, model)
    options: dict[str, Any] = {
        "T": config.T,
        "t_min": positive("sigma_min", sigma_min) * root_of(config.D),
        "rtol": rtol,
        "per_sample": True,
        "substitution": methods.substitution(config),
    }
    ends, found = data.decode(data.held_out[places]), []
    with threads(config.threads), progress_bar(console, "Interpolating", len(rows)) as update:
        labels = labels_of(config, data, places, device)
        update(0, "encoding")
        latents = encode(field, ends.to(device), **options, **labels).x
        for place, (a, b) in enumerate(pairwise(range(len(rows)))):
            update(1 + place, "sampling")
            nearer = torch.tensor([a, b], device=device).repeat_interleave(
                torch.tensor([columns - columns // 2, columns // 2], device=device)
            )
            of_each = {name: values[nearer] for name, values in labels.items()}
            between = interpolate(latents[a], latents[b], columns)
            back = sample(field, between, final_step=False, **options, **of_each).x.cpu()
            found.append(torch.cat([ends[a, None], back, ends[b, None]]))
        update(len(rows), "")
    return torch.stack(found)
