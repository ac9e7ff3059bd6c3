# SPDX-License-Identifier: Apache-2.0
"""Settings of a run: presets, YAML files and KEY=VALUE, checked against a typed dataclass."""

from __future__ import annotations

import difflib
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pfgm_kernels.training.checkpoint import VERSION

_FOLDER = Path(__file__).parent / "presets"
PRESETS = tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def typed(schema: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``values``, some of the fields of the dataclass ``schema``, each in its field's type.

    Raises ValueError, in one sentence that begins with ``where``, for a key that there is not, with
    the nearest one, and for a value of another type.
    """
    known = [field.name for field in fields(schema)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    config = OmegaConf.structured(schema)
    OmegaConf.set_readonly(config, False)
    for key, value in values.items():
        try:
            OmegaConf.update(config, key, value)
        except OmegaConfBaseException as error:
            what = str(error).splitlines()[0]
            raise ValueError(f"{where}: {key} is ill-typed: {what}") from error
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return {str(key): plain[key] for key in values}


def overrides(schema: type, words: Iterable[str]) -> dict[str, Any]:
    """What ``KEY=VALUE`` words of a command line set."""
    values: dict[str, Any] = {}
    for word in words:
        key, equals, _ = word.partition("=")
        if not (equals and key):
            raise ValueError(f"settings are KEY=VALUE, as in batch_size=64, got {word!r}")
        try:
            values |= _plain(OmegaConf.from_dotlist([word]))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ValueError(f"{word}: {_one_line(error)}") from error
    return typed(schema, values, "settings")


def read(schema: type, name: str) -> dict[str, Any]:
    """What a preset of the package or a YAML file sets. Raises ValueError or FileNotFoundError."""
    path = _FOLDER / f"{name}.yaml" if name in PRESETS else Path(name)
    if name not in PRESETS and path.suffix not in (".yaml", ".yml"):
        raise ValueError(
            f"--config expects one of {', '.join(PRESETS)} or a .yaml file, got {name}"
        )
    return typed(schema, load(path), str(name))


def load(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; raises ValueError, naming the file, where it has none."""
    if not path.is_file():
        raise FileNotFoundError(f"expected the settings {path}; it does not exist")
    try:
        content = OmegaConf.load(path)
        if isinstance(content, DictConfig):
            return _plain(content)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"damaged file {path}: expected YAML, got {_one_line(error)}") from error
    raise ValueError(f"damaged file {path}: expected keys with values, got none")


def dump(values: Mapping[str, Any]) -> bytes:
    return OmegaConf.to_yaml(OmegaConf.create(dict(values))).encode()


def versions() -> dict[str, str]:
    """Of what computes: this package, with its git revision, torch and Python."""
    return {
        "pfgm_kernels": VERSION,
        "git": _revision(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _revision() -> str:
    """Of the checkout that the package lies in, with a + where files of it were changed."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    try:
        head, changed = git("rev-parse", "HEAD"), git("diff", "--quiet", "HEAD")
    except OSError:
        return "none"
    if head.returncode:
        return "none"
    return head.stdout.strip() + ("+" if changed.returncode else "")


def _plain(config: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(config, resolve=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
