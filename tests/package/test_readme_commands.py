# SPDX-License-Identifier: Apache-2.0
"""Is every command of the README and docs/training.md one that there is, and does each run, small?

Commands are the lines of its blocks without a language, and what stands between backquotes and
begins with the name of a program. `make test` has them parsed; `make check` runs them.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from idx_files import write_mnist
from PIL import Image

from pfgm_kernels.cli import app
from pfgm_kernels.training import settings
from pfgm_kernels.training.config import TrainConfig

ROOT = Path(__file__).parents[2]
PROGRAMS = ("pfgm", "python", "torchrun", "make", "pip", "benchmarks/gpu.sh")
NOT_RUN = {
    "pip": "installs; the Makefile's setup does that",
    "python -m build": "builds a wheel; tests/package/test_build.py builds the extension",
    "benchmarks/gpu.sh": "needs a GPU; tests/benchmarks/test_gpu_stages.py goes through its stages",
    "make": "takes long; its tests are these",
}
# What is added to a command so that it takes seconds. The last one counts where an option is given
# twice. A command of the README that is not here is to be added.
SMALL = {
    "pfgm report": [],
    "pfgm train": ["steps=2", "batch_size=8"],
    "pfgm sample": ["--seeds", "0-2", "--steps", "2"],
    "pfgm likelihood": ["--count", "2"],
    "pfgm interpolate": ["--images", "0,1", "--columns", "3", "--rtol", "0.01"],
    "pfgm export": [],
    "pfgm evaluate": ["--seeds", "0-19", "--steps", "2", "--replace"],
    "pfgm figures": ["trajectories"],
    "torchrun": ["--data", "digits", "--out", "runs/ranks", "steps=2", "batch_size=8"],
    "python -m benchmarks.readme_loop": ["--steps", "2", "--out", "loop.png"],
    "python -m benchmarks.report": [],
    "python -m benchmarks.instruction_sets": [],
}
# What the README leaves to its reader, where it stands for a file.
MEANT = {
    "PATH": "photos.zip",
    "DIR": "drawn",
    "FILE": str(min((ROOT / "benchmarks" / "results").glob("*.json"))),
}


def commands(text: str) -> list[tuple[str, ...]]:
    """The words of each, once."""
    found: list[list[str]] = []
    language: str | None = None
    prose = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            language = line[3:].strip() if language is None else None
        elif language in ("", "sh", "bash"):
            found.append(shlex.split(line, comments=True))
        elif language is None:
            prose.append(line)
    spans = re.findall(r"`([^`]+)`", "\n".join(prose))
    found += [shlex.split(span) for span in spans if span.split()[0] in PROGRAMS]
    return [*dict.fromkeys(tuple(words) for words in found if words and words != ["pfgm"])]


README = commands(
    "\n".join((ROOT / name).read_text() for name in ("README.md", "docs/training.md"))
)


def kind(words: tuple[str, ...]) -> str:
    """What the tables above call it."""
    if words[:2] == ("python", "-m"):
        return " ".join(words[:3])
    return " ".join(words[:2]) if words[0] == "pfgm" else words[0]


def arguments(words: tuple[str, ...]) -> list[str]:
    """Of `pfgm`, after the command's name. Where the README but names a command, its help."""
    more = SMALL[kind(words)]
    if len(words) == 2 and more:
        return ["--help"]
    start = words.index("train") + 1 if words[0] == "torchrun" else 2
    return [*(MEANT.get(word, word) for word in words[start:] if word != "…"), *more]


def missing(words: tuple[str, ...]) -> str | None:
    """What a command needs and this machine has not."""
    if {"--check", "device=cuda"} & {*words} and not torch.cuda.is_available():
        return "no GPU"
    return NOT_RUN.get(kind(words))


def test_commands_are_found() -> None:
    text = (
        "`make demo` and `pfgm\nreport` of `pfgm`, not `x = 3`\n```\npfgm train --out x  # words\n"
        "\npfgm sample \\\n  --out y\n```\n```python\npfgm = 3\n```\n`pfgm report`"
    )
    assert commands(text) == [
        ("pfgm", "train", "--out", "x"),
        ("pfgm", "sample", "--out", "y"),
        ("make", "demo"),
        ("pfgm", "report"),
    ]
    assert {"pfgm", "python", "torchrun", "make", "pip"} <= {words[0] for words in README}
    assert len([words for words in README if words[0] == "pfgm"]) >= 8


@pytest.mark.parametrize("words", README, ids=" ".join)
def test_it_is_known_and_parses(words: tuple[str, ...]) -> None:
    """It has a line in one of the tables, and its program takes its options and settings."""
    known = kind(words)
    assert known in {**NOT_RUN, **SMALL}, f"add {known!r} to the tables of {__file__}"
    if words[0] in ("pfgm", "torchrun"):
        name = "train" if words[0] == "torchrun" else words[1]
        command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
        if (given := arguments(words)) != ["--help"]:
            parsed = command.make_context(name, given).params
            settings.overrides(TrainConfig, parsed.get("settings") or [])
    elif words[:2] == ("python", "-m") and known not in NOT_RUN:
        assert importlib.util.find_spec(words[2])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif "/" in words[0]:
        assert os.access(ROOT / words[0], os.X_OK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader is, with images of his own, and few that pass for MNIST."""
    folder = tmp_path_factory.mktemp("reader")
    write_mnist(folder, (200, 100))
    generator = np.random.default_rng(0)
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for index in range(20):
            image = io.BytesIO()
            pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(image, "PNG")
            archive.writestr(f"{index}.png", image.getvalue())
    return folder


@pytest.fixture(scope="module")
def done() -> set[tuple[str, ...]]:
    """Commands that have run in the folder."""
    return set()


def call(words: tuple[str, ...]) -> list[str]:
    """The command, reduced, as this Python runs it."""
    python = [sys.executable, "-m"]
    if words[0] == "pfgm":
        return [*python, "pfgm_kernels.cli", words[1], *arguments(words)]
    if words[0] == "torchrun":
        start = words.index("train") + 1
        return [
            *python,
            "torch.distributed.run",
            "--standalone",
            *words[1:start],
            *arguments(words),
        ]
    if words[2] == "benchmarks.instruction_sets":
        code = (
            "import sys; from benchmarks import instruction_sets as module\n"
            "module.shapes = lambda: [module.Shape(16, 64, 2, 'normal')]\n"
            "sys.exit(module.main())"
        )
        return [sys.executable, "-c", code]
    return [*python, words[2], *(MEANT.get(word, word) for word in words[3:]), *SMALL[kind(words)]]


def run(words: tuple[str, ...], folder: Path, elsewhere: Path, done: set[tuple[str, ...]]) -> None:
    """First what makes the runs that the command names, as the README says; each is made once.
    Commands that name none run elsewhere.
    """
    if words in done:
        return
    names = {word for word in words if word.startswith("runs/")}
    for name in names:
        makers = [other for other in README if other[:2] == ("pfgm", "train") and name in other]
        if words not in makers:
            run(makers[0], folder, elsewhere, done)
    paths = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    paths["PFGM_DATA"] = str(folder)
    result = subprocess.run(
        call(words),
        cwd=folder if names else elsewhere,
        env=os.environ | paths | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    done.add(words)


@pytest.mark.exhaustive
@pytest.mark.parametrize("words", README, ids=" ".join)
def test_it_runs(
    words: tuple[str, ...], folder: Path, tmp_path: Path, done: set[tuple[str, ...]]
) -> None:
    if reason := missing(words):
        pytest.skip(reason)
    run(words, folder, tmp_path, done)
