# SPDX-License-Identifier: Apache-2.0
"""Does every hint name a command that installs what is missing, as the README installs?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
EXTRAS = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
HINTS = [
    pytest.param(line.strip(), id=f"{file.relative_to(ROOT)}:{number}")
    for folder in ("pfgm_kernels", "benchmarks")
    for file in sorted((ROOT / folder).rglob("*.py"))
    for number, line in enumerate(file.read_text().splitlines(), 1)
    if "pip install" in line
]


@pytest.mark.parametrize("line", HINTS)
def test_hints_install_as_the_readme_does(line: str) -> None:
    """No name of the project that an index could not know, and no extra that there is not."""
    if "pip install pykeops" in line:  # of another project, by its own name
        return
    found = re.search(r"pip install -e '\.\[(\w+)\]'", line)
    assert found, line
    assert f"\n{found[1]} = [" in EXTRAS
    assert "pip install -e '.[train]'" in README


def test_there_are_hints() -> None:
    assert len(HINTS) >= 4
