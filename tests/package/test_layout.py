# SPDX-License-Identifier: Apache-2.0
"""Does the source keep to the rules of the house?"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pfgm_kernels"
FOLDERS = ("pfgm_kernels", "csrc", "tests", "benchmarks")
SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h"}
SOURCES = sorted(
    f for folder in FOLDERS for f in (ROOT / folder).rglob("*") if f.suffix in SUFFIXES
)
MODULES = sorted(PACKAGE.rglob("*.py"))

# Imports run from higher layers to lower ones; within a layer, between modules of one package only.
LAYERS = [
    ("_C", "_checks", "files", "on_disk", "roll_call"),
    ("backends._native", "backends._shapes", "backends._values", "classes", "cuts", "outputs"),
    ("backends._sketch",),
    ("edits", "nearby", "rows"),
    ("backends._rows",),
    ("backends.eager", "backends.cpu", "backends.triton", "backends.cuda"),
    ("backends", "merge"),
    ("shards",),
    ("chunks", "problems"),
    ("loops",),
    ("proof", "trace"),
    ("choice",),
    ("ops", "references"),
    ("autograd", "_traced"),
    ("field",),
    ("density",),
    ("",),
    ("flow",),
    ("training", "memory"),
    ("figures",),
    ("demo",),
    ("cli",),
]
EXTRAS = [
    "diffusers",
    "matplotlib",
    "omegaconf",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "tensorboard",
    "triton",
    "typer",
]


def name_of(file: Path) -> str:
    """backends.cpu for pfgm_kernels/backends/cpu.py, "" for pfgm_kernels/__init__.py."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int:
    while True:
        for layer, names in enumerate(LAYERS):
            if module in names:
                return layer
        assert module, "every module has a layer"
        module = module.rpartition(".")[0]


def package_of(module: str) -> str:
    """The package within which imports run both ways. Backends never import one another."""
    return ".".join(module.split(".")[: 2 if module.startswith("backends.") else 1])


NAMES = {name_of(file) for file in MODULES} | {"_C"}


def imports(file: Path) -> Iterator[str]:
    """The package's modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: imports are absolute"
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        else:
            continue
        for path in dotted:
            package, _, module = path.partition(".")
            while package == "pfgm_kernels" and module not in NAMES:
                module = module.rpartition(".")[0]
            if package == "pfgm_kernels":
                yield module


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_imports_run_one_way(file):
    importer = name_of(file)
    assert any(importer.split(".")[0] in names or importer in names for names in LAYERS)
    for imported in imports(file):
        same_package = package_of(importer) == package_of(imported) != "backends"
        assert layer_of(imported) < layer_of(importer) or (
            same_package and layer_of(imported) == layer_of(importer)
        ), f"{importer} imports {imported}"


def test_the_import_rule_sees_the_imports():
    assert {"backends.cpu", "backends.eager"} <= set(imports(PACKAGE / "backends/__init__.py"))
    assert {"autograd", "references"} <= set(imports(PACKAGE / "field.py"))
    assert "" in set(imports(PACKAGE / "training/data/dataset.py"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files(file):
    lines = file.read_text().splitlines()
    assert len(lines) <= 400
    if lines:
        assert lines[0].lstrip("#/ ") == "SPDX-License-Identifier: Apache-2.0"


def test_setup_stays_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 80
    assert "torch" not in {
        name.name
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Import)
        for name in node.names
    }


def test_an_empty_variable_of_the_environment_counts_as_not_set():
    for file in [ROOT / "setup.py", *(f for f in SOURCES if f.suffix == ".py")]:
        told_apart = re.search(
            r"""environ\.get\(["']\w+["'], |["'] (not )?in os\.environ""", file.read_text()
        )
        assert not told_apart, f"{file}: {told_apart}"


def test_pointers_are_taken_in_one_place():
    takers = [name_of(file) for file in MODULES if "data_ptr(" in file.read_text()]
    assert takers == ["backends._native"]


def test_the_extension_does_not_link_torch():
    extension = pytest.importorskip("pfgm_kernels._C", reason="the extension is not built")
    content = Path(extension.__file__).read_bytes()
    assert b"libtorch" not in content
    assert b"libc10" not in content


def run_python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_it_works_without_the_extension_and_triton():
    output = run_python(
        "import sys; sys.modules['triton'] = sys.modules['pfgm_kernels._C'] = None\n"
        "import torch, pfgm_kernels as p\n"
        "x0 = torch.tensor([[3.0, 0.0]], requires_grad=True)\n"
        "field = p.poisson_field(torch.zeros(1, 2), 4.0, x0); field.sum().backward()\n"
        "print(field.tolist(), x0.grad.shape, p.report())"
    )
    assert "0.6" in output
    assert "-0.8" in output
    assert "cpu        the extension is not built" in output
    assert "eager      available" in output


def test_importing_it_imports_no_extra():
    output = run_python(
        "import sys, torch; before = set(sys.modules); import pfgm_kernels\n"
        f"print([name for name in {EXTRAS} if name in set(sys.modules) - before])"
    )
    assert output.strip() == "[]"
