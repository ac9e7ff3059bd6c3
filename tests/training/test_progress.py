# SPDX-License-Identifier: Apache-2.0
"""Does the progress of long work say how much is done and what is left?"""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pfgm_kernels.training import progress


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_has_a_line_now_and_then(clock: Clock) -> None:
    """Of a run that goes on at 200 of 1,000 and does five a second: what is left is of the rest."""
    text = io.StringIO()
    with progress.progress_bar(Console(file=text, width=200), "Training", 1000, 200) as update:
        update(200, "nothing yet")
        for seconds in (0.2, 10, 16, 20, 40):
            clock.now = 100 + seconds
            update(200 + 5 * seconds, f"after {seconds}")
    assert text.getvalue().splitlines() == [
        "Training: 28%  after 16  144 s left",
        "Training: 40%  after 40  120 s left",
    ]


def test_a_bar_begins_where_the_work_does() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=200)
    with progress.progress_bar(console, "Training", 1000, 250) as update:
        first = text.getvalue()
        update(1000, "the end")
    assert " 25 %" in first
    assert "100 %  the end" in text.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_reading_is_told_of_once_it_takes_long(clock: Clock, terminal: bool) -> None:
    """On a terminal after a moment, in a log after a while; what is quick leaves no trace."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=200)
    with progress.reading(console) as update:
        clock.now += progress.PATIENCE / 2
        update(0.25)
    assert text.getvalue() == ""
    with progress.reading(console) as update:
        clock.now += progress.PATIENCE if terminal else progress.LOG_INTERVAL
        update(0.25)
        assert "Reading" in text.getvalue()
        assert ("25 %" if terminal else "25%") in text.getvalue()


def test_what_cannot_be_read_is_told_of_below_the_bar(clock: Clock) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=200)

    def read() -> None:
        with progress.reading(console) as update:
            clock.now += progress.PATIENCE
            update(0.5)
            raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        read()
    assert text.getvalue().count("50 %")
    assert text.getvalue().endswith("\n\x1b[?25h"), "the cursor is shown again, on a new line"
