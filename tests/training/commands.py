# SPDX-License-Identifier: Apache-2.0
"""The command line as tests call it."""

from __future__ import annotations

from click.testing import Result
from typer.testing import CliRunner

from pfgm_kernels.cli import app


def pfgm(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_refused(result: Result, *expected: str) -> None:
    """Exit code 2, and one sentence on the standard error that says what is expected."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("pfgm: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    for words in expected:
        assert words in result.stderr
