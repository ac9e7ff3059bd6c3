# SPDX-License-Identifier: Apache-2.0
"""What a run is given, and the file that keeps it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from pfgm_kernels._checks import integer, non_negative, positive, shape_of_event
from pfgm_kernels.files import write_bytes
from pfgm_kernels.flow.constants import SIGMA, TAU, constants
from pfgm_kernels.training import checkpoint
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.network import FieldNetwork

LEAST_SEED = -(1 << 63)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run was given; ``DIR/config.json`` holds it."""

    data: str
    event_shape: tuple[int, ...]
    M: int
    """Upper end of the exponent m in Eq. (11)."""
    gamma: float
    """Added to the norm in the target of Eq. (12), in the units of x."""
    T: float
    """Where sampling starts, in the units of x."""
    steps: int = 2000
    seed: int = 0
    checkpoint_every: int = 500
    sigma: float = SIGMA
    """Smallest noise of Eq. (11), in the units of x."""
    tau: float = TAU
    restrict_M: bool = True  # noqa: N815  (the article's M)
    width: int = 256
    depth: int = 4
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup: int = 100
    ema_decay: float = 0.998
    clip_norm: float = 1.0
    threads: int = 1
    """Of the CPU. The network is too small to gain much from more, and their number changes the
    order of sums: with it fixed, a run gives the same bits wherever it is resumed."""

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "event_shape": shape_of_event(self.event_shape),
            "seed": integer("seed", self.seed, LEAST_SEED),
        }
        for check, names in (
            (integer, "steps checkpoint_every batch_size warmup width depth threads M"),
            (positive, "T sigma tau learning_rate clip_norm"),
            (non_negative, "gamma ema_decay"),
        ):
            checked |= {name: check(name, getattr(self, name)) for name in names.split()}
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def for_data(cls, data: DataSet, **changes: Any) -> TrainConfig:
        """The defaults for a data set: M, gamma and T by `constants`."""
        noise = {name: changes[name] for name in ("sigma", "tau") if name in changes}
        rule = constants(data.references(), **noise)
        known: dict[str, Any] = {"data": data.name, "event_shape": data.event_shape}
        return cls(**known | {name: getattr(rule, name) for name in ("M", "gamma", "T")} | changes)

    def network(self, data: DataSet | None = None) -> FieldNetwork:
        """A new network, its weights drawn by the seed, normalised for ``data`` if given."""
        known: dict[str, Any] = {}
        if data is not None:
            moments = data.moments()
            known = {"center": moments.center, "spread": moments.spread}
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(self.seed)
            return FieldNetwork(
                self.event_shape, width=self.width, depth=self.depth, gamma=self.gamma, **known
            )

    def write(self, folder: Path) -> None:
        values = {"version": checkpoint.VERSION} | asdict(self)
        write_bytes(folder / "config.json", (json.dumps(values, indent=2) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> TrainConfig:
        """Raises FileNotFoundError or ValueError, naming a file that is missing, damaged or of a
        version that wrote other keys.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no run: expected {path}; it does not exist")
        expected = {field.name for field in fields(cls)}
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"damaged file {path}: expected JSON, got {error}") from error
        if not isinstance(values, dict):
            got = type(values).__name__
            raise ValueError(f"damaged file {path}: expected an object of JSON, got {got}")
        version = values.pop("version", None)
        checkpoint.match_keys(path, expected, values.keys(), version)
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"damaged file {path}: {error}") from error
