# SPDX-License-Identifier: Apache-2.0
"""The command line `pfgm`, a module a command.

Bad input ends with one sentence on the standard error and exit code 2; a run that was interrupted
ends with exit code 130, and one whose output nobody reads any more as SIGPIPE ends it.
"""

from __future__ import annotations

import signal

from pfgm_kernels.cli.app import app

# In the order in which `pfgm --help` lists them.
from pfgm_kernels.cli import report, train, sample, evaluate  # isort: skip  # noqa: F401
from pfgm_kernels.cli import likelihood, interpolate, export, pictures  # isort: skip  # noqa: F401

__all__ = ["app", "main"]


def main() -> None:
    # Who closes a pipe early (`pfgm report | head -1`) ends us as any other command: quietly, by
    # SIGPIPE, which a shell shows as 141. No socket is written to that the signal could hit.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    app()
