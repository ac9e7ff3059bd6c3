# SPDX-License-Identifier: Apache-2.0
"""What a run is given, and the file that keeps it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from pfgm_kernels._checks import finite, integer, non_negative, positive, shape_of_event
from pfgm_kernels.files import write_bytes
from pfgm_kernels.flow.constants import SIGMA, TAU, constants
from pfgm_kernels.training import checkpoint, networks, settings
from pfgm_kernels.training import data as data_sets
from pfgm_kernels.training.data import DataSet
from pfgm_kernels.training.data.checks import check_share
from pfgm_kernels.training.methods import METHODS, TARGETS, check_method, count_classes
from pfgm_kernels.training.ranks import DEVICES

CONFIG = "config.yaml"
LEAST_SEED = -(1 << 63)
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run was given; ``DIR/config.yaml`` holds it."""

    data: str
    event_shape: tuple[int, ...]
    M: int
    """Upper end of the exponent m in Eq. (11)."""
    gamma: float
    """Added to the norm in the target of Eq. (12), in the units of x."""
    T: float
    """Where sampling starts, in the units of x."""
    images: bool = False
    """Whether the data are 8-bit images, whose values 0 ... 255 stand for low ... high."""
    low: float = -1.0
    high: float = 1.0
    network: str = "perceptron"
    """perceptron, unet, ddpmpp, package.module:factory, or own for one given from Python."""
    predicts: str = "mean"
    """mean, denoiser or field: what the network's output means."""
    method: str = "pfgm"
    """pfgm: Eq. (12); unnormalized: Eq. (10); pfgmpp: a denoiser's loss, for any D."""
    targets: str = "exact"
    """Of pfgmpp: exact, the posterior mean of the references, or clean, the points themselves."""
    references: int = 0
    """How many random ones a step takes for its targets; 0 is the whole data set."""
    D: float = 1.0
    """Dimensions added to the data's; inf is diffusion."""
    classes: int = 0
    """Of a class-conditional run; 0 is one without classes."""
    steps: int = 2000
    seed: int = 0
    checkpoint_every: int = 500
    sigma: float = SIGMA
    """Smallest noise of Eq. (11), in the units of x."""
    tau: float = TAU
    restrict_M: bool = True  # noqa: N815  (the article's M)
    sigma_data: float = 0.5
    """Standard deviation of the data's components, of a denoiser and the loss of pfgmpp."""
    log_sigma_mean: float = -1.2
    log_sigma_std: float = 1.2
    """Of the noise levels that pfgmpp trains at."""
    width: int = 256
    depth: int = 4
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup: int = 100
    """Steps over which the learning rate rises."""
    ema_halflife: float = 90_000.0
    """Images after which the average of the weights keeps half of what it was."""
    ema_rampup: float = 0.2
    """The most that the half-life is of the images so far; 0 for no bound."""
    clip_norm: float = 1.0
    """The most that a gradient's norm may be."""
    spike: float = 100.0
    """A step whose loss is so many times the median of the last ones is skipped."""
    device: str = "auto"
    """auto, cpu or cuda; auto is a GPU where there is one."""
    precision: str = "float32"
    """float32, bfloat16 or float16: what the network computes in. The targets and the loss are
    always float32."""
    accumulation: int = 1
    """Parts in which a process computes its share of a batch, one after the other."""
    compile: bool = False
    """Whether torch.compile compiles the network."""
    threads: int = 1
    """Of the CPU. The perceptron is too small to gain much from more, and their number changes the
    order of sums: with it fixed, a run gives the same bits wherever it is resumed."""
    held_out: float | None = None
    """The share of the data that is held out; null of data that come with a part held out."""
    flips: bool = False
    """Whether the mirror images are trained on, too: they are in the batches and the references."""
    sharded: bool = False
    """Whether each rank holds a part of the references, and answers for it the queries of all."""

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "event_shape": shape_of_event(self.event_shape),
            "seed": integer("seed", self.seed, LEAST_SEED),
            "D": positive("D", self.D, finite=False),
            "network": networks.check_name(self.network),
            "spike": positive("spike", self.spike, finite=False),
            "held_out": check_share(self.held_out),
        }
        for check, names in (
            (integer, "steps checkpoint_every batch_size warmup width depth threads M"),
            (integer, "accumulation"),
            (_count, "references classes"),
            (finite, "log_sigma_mean low high"),
            (positive, "T sigma tau sigma_data log_sigma_std learning_rate clip_norm ema_halflife"),
            (non_negative, "gamma ema_rampup"),
        ):
            checked |= {name: check(name, getattr(self, name)) for name in names.split()}
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        for name, known in (
            ("predicts", networks.PREDICTIONS),
            ("method", METHODS),
            ("targets", TARGETS),
            ("device", DEVICES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} expects one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if self.predicts == "mean" and self.network != "perceptron":
            raise ValueError(f"predicts=mean expects network=perceptron, got {self.network}")
        check_method(self)

    @classmethod
    def for_data(cls, data: DataSet, **changes: Any) -> TrainConfig:
        """The defaults for a data set: M, gamma and T by `constants`, noise levels of pfgmpp by its
        standard deviation; PFGM with a perceptron, and PFGM++ with the small U-Net for images that
        it fits; what is held out and flipped as it was loaded. ``conditional=True`` takes the
        data's classes. Raises ValueError where it has none.
        """
        images = data.is_image and _suits_unet(data.event_shape)
        network = changes.get("network", "unet" if images else "perceptron")
        method = changes.get("method", "pfgm" if network == "perceptron" else "pfgmpp")
        D = changes.get("D", 128.0 if method == "pfgmpp" else 1.0)
        noise = {name: changes[name] for name in ("sigma", "tau") if name in changes}
        rule = constants(data.references, D=D, **noise)
        spread = changes.get("sigma_data") or data.moments.spread or 0.5
        known: dict[str, Any] = {
            "data": data.name,
            "event_shape": data.event_shape,
            "images": data.is_image,
            "low": data.low,
            "high": data.high,
            "network": network,
            "predicts": _prediction(method, network),
            "method": method,
            "D": D,
            "sigma_data": spread,
            "log_sigma_mean": math.log(2 * spread) - 1.2,
            "held_out": data.share,
            "flips": data.flips,
        }
        known |= {name: getattr(rule, name) for name in ("M", "gamma", "T")}
        if changes.pop("conditional", False):
            known["classes"] = count_classes(data)
        if network != "perceptron":
            known["threads"] = torch.get_num_threads()
        if method == "unnormalized":
            known["spike"] = math.inf  # its losses are spikes
        return cls(**known | changes)

    @property
    def of_network(self) -> dict[str, Any]:
        """The arguments of `networks.build` that a run has."""
        names = "network event_shape predicts width depth gamma D sigma_data"
        return {name: getattr(self, name) for name in names.split()} | {"num_classes": self.classes}

    def load_data(self, progress: Callable[[float], None] | None = None) -> DataSet:
        """The data set of the run, with the same rows held out; raises as `data.load` does."""
        return data_sets.load(
            self.data, held_out=self.held_out, flips=self.flips, progress=progress
        )

    def model(
        self, data: DataSet | None = None, network: torch.nn.Module | None = None
    ) -> torch.nn.Module:
        """A new model, its weights drawn by the seed, normalised for ``data`` if given; around
        ``network`` where that is given from Python.
        """
        known: dict[str, Any] = {}
        if data is not None:
            moments = data.moments
            known = {"center": moments.center, "spread": moments.spread}
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(self.seed)
            return networks.build(**self.of_network, given=network, **known)

    def write(self, folder: Path) -> None:
        values = {"versions": settings.versions()} | asdict(self)
        write_bytes(folder / CONFIG, settings.dump(values))

    @classmethod
    def read(cls, folder: Path) -> TrainConfig:
        """Raises FileNotFoundError or ValueError, naming a file that is missing, damaged or of a
        version that wrote other keys.
        """
        path = folder / CONFIG
        if not path.is_file():
            if (folder / "config.json").is_file():
                raise ValueError(
                    f"{folder} holds a run of an older version, with a config.json: expected "
                    f"{CONFIG}; this version reads none of it, so train anew in another folder"
                )
            raise FileNotFoundError(f"{folder} holds no run: expected {path}; it does not exist")
        values = settings.load(path)
        versions = values.pop("versions", None)
        version = versions.get("pfgm_kernels") if isinstance(versions, dict) else None
        checkpoint.match_keys(path, {field.name for field in fields(cls)}, values.keys(), version)
        try:
            return cls(**settings.typed(cls, values, "settings"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"damaged file {path}: {error}") from error


def _count(name: str, value: object) -> int:
    return integer(name, value, 0)


def _suits_unet(event_shape: tuple[int, ...]) -> bool:
    return min(event_shape[-2:]) > 8 and not any(side % 4 for side in event_shape[-2:])


def _prediction(method: str, network: str) -> str:
    if method != "unnormalized" and network == "perceptron":
        return "mean"
    return "denoiser" if method == "pfgmpp" else "field"
