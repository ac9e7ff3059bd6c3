# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: safetensors files that are whole or not there at all.

A process killed at any moment leaves the old file or the new one. No pickle is ever written or
read.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Set
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pfgm_kernels.files import TEMPORARY, write_bytes

DIGITS = 64  # of a SHA-256 checksum
try:
    VERSION = version("pfgm_kernels")
except PackageNotFoundError:
    VERSION = "not installed"


def write(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes named tensors and a state of JSON values, with a checksum of both."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state)
    # One entry, as safetensors writes several in any order: equal contents, equal files.
    metadata = {"pfgm_kernels": checksum(tensors, text) + text}
    write_bytes(path, save(tensors, metadata))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what ``write`` wrote: the tensors, on the CPU, and the state.

    Raises FileNotFoundError where there is no file and ValueError, naming the file, for one that is
    truncated, altered or not a checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected the checkpoint {path}; it does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(
            f"damaged checkpoint {path}: expected a whole safetensors file, "
            f"got one of {size} bytes ({error})"
        ) from error
    if (entry := metadata.get("pfgm_kernels")) is None:
        raise ValueError(f"{path} is no checkpoint: expected the entry 'pfgm_kernels', got none")
    expected, text = entry[:DIGITS], entry[DIGITS:]
    found = checksum(tensors, text)
    if found != expected:
        raise ValueError(f"damaged checkpoint {path}: expected checksum {expected}, got {found}")
    return tensors, json.loads(text)


def match(
    path: Path,
    expected: Mapping[str, Tensor],
    got: Mapping[str, Tensor],
    written_by: str | None = None,
) -> None:
    """Raises ValueError unless the tensors ``got`` from ``path`` fit the ``expected`` ones."""
    for name in sorted(expected.keys() | got.keys()):
        wanted, found = _describe(expected.get(name)), _describe(got.get(name))
        if wanted != found:
            raise ValueError(
                f"checkpoint {path} is of another network: expected {name} {wanted}, got {found} "
                f"(written by {_writer(written_by)}, this is {VERSION})"
            )


def match_keys(path: Path, expected: Set[str], got: Set[str], written_by: str | None) -> None:
    """Raises ValueError unless the keys ``got`` from ``path`` are the ``expected`` ones.

    What a whole file holds, its writer meant: the error says which version that was, None where the
    file does not tell.
    """
    missing, unknown = sorted(expected - got), sorted(got - expected)
    if missing or unknown:
        raise ValueError(
            f"{path} was written by {_writer(written_by)}, this is {VERSION}: expected the keys "
            f"{sorted(expected)}, missing {missing}, unknown {unknown}"
        )


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of tensors on the CPU by name, and of a text."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Checkpoints:
    """The newest checkpoints of one run, in files ``step_00001234.safetensors`` of a folder."""

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """All checkpoints, the newest first."""
        return sorted(self.folder.glob("step_*.safetensors"), reverse=True)

    def path(self, step: int) -> Path:
        """Of the checkpoint of ``step``, which there may not be."""
        return self.folder / f"step_{step:08d}.safetensors"

    def steps(self) -> list[int]:
        """Those that there are checkpoints of, the last one first."""
        return [int(path.stem.removeprefix("step_")) for path in self.paths()]

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Writes the checkpoint of ``step``, then removes what is no longer kept."""
        path = self.path(step)
        write(path, tensors, state)
        for old in [*self.paths()[self.keep :], *self.folder.glob(f"*{TEMPORARY}")]:
            old.unlink(missing_ok=True)
        return path

    def newest(self) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint that reads well, or None where there is no checkpoint at all.

        Warns of each damaged one that it passes over; raises ValueError where all are damaged.
        """
        damage = None
        for path in self.paths():
            try:
                return path, *read(path)
            except ValueError as error:
                damage = error
                warnings.warn(f"{error}; trying the one before it", stacklevel=2)
        if damage is not None:
            raise damage
        return None


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[Any]]:
    """The state of an optimizer as named tensors and its parameter groups as JSON values."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    return tensors, state["param_groups"]


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[Any]
) -> None:
    """Puts back what ``flatten_optimizer`` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with ``prefix``, by the rest of their names."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _writer(version: str | None) -> str:
    return f"pfgm_kernels {version or 'of an older version, which files did not name'}"


def _describe(tensor: Tensor | None) -> str:
    if tensor is None:
        return "nothing"
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
