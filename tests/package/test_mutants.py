# SPDX-License-Identifier: Apache-2.0
"""Can each deliberate mistake still be made: is the text there, once, that it changes?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_mistakes_in_the_python_layers():
    command = [sys.executable, "tests/mutants", "python", "--list"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) > 300
