# SPDX-License-Identifier: Apache-2.0
"""Progress of long work, with the speed and the time left, on a terminal or in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LOG_INTERVAL = 15.0
PATIENCE = 2.0
"""Seconds of reading of which nobody needs to be told."""


@contextmanager
def progress_bar(
    console: Console, description: str, total: float, start: int = 0, after: float = 0.0
) -> Iterator[Callable[[float, str], None]]:
    """A bar from ``start`` to ``total``; call what it yields with (done, text to show beside it).

    It appears once ``after`` seconds have gone by. Where the console is no terminal a line is
    printed now and then instead.
    """
    if not console.is_terminal:
        yield _log_lines(console, description, total, start)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %  {task.fields[text]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    progress, began = Progress(*columns, console=console), time.monotonic()
    task = progress.add_task(description, total=total, text="")
    with ExitStack() as shown:

        def update(done: float, text: str) -> None:
            progress.update(task, completed=done, text=text)
            if not progress.live.is_started and time.monotonic() - began >= after:
                shown.enter_context(progress)

        update(start, "")
        yield update


@contextmanager
def reading(console: Console) -> Iterator[Callable[[float], None]]:
    """For `data.load`: shows which part is read, of what takes longer than a moment."""
    with progress_bar(console, "Reading", 1.0, after=PATIENCE) as update:
        yield lambda fraction: update(fraction, "")


def _log_lines(
    console: Console, description: str, total: float, start: float
) -> Callable[[float, str], None]:
    began = printed = time.monotonic()

    def update(done: float, text: str) -> None:
        nonlocal printed
        now = time.monotonic()
        if now - printed < LOG_INTERVAL or done <= start:
            return
        printed = now
        left = (now - began) / (done - start) * (total - done)
        console.print(
            f"{description}: {done / total:.0%}  {text}  {left:.0f} s left", soft_wrap=True
        )

    return update
