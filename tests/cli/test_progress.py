"""Progress of something long."""

from __future__ import annotations

import io
import sys

import pytest

from workbench.cli import progress
from workbench.cli.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_away_from_a_terminal_a_line_comes_every_few_seconds_with_rate_and_time_left(clock, capsys):
    with Progress("copy", total=100, unit="steps") as bar:
        for second in range(1, 13):
            clock[0] = float(second)
            bar.advance(5, note="loss 2.1")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "copy: 25 steps of 100 steps (25%)  5 steps/s  0:15 left  loss 2.1"
    assert len(lines) == 3  # at 5 s, at 10 s, and at the end


def test_what_is_over_soon_says_nothing(clock, capsys):
    with Progress("copy", total=10) as bar:
        clock[0] = 1.0
        bar.advance(10)
    assert capsys.readouterr().err == ""


def test_a_silent_bar_says_nothing_however_long_it_takes(clock, capsys):
    with Progress("copy", total=10, silent=True) as bar:
        clock[0] = 100.0
        bar.advance(10)
    assert capsys.readouterr().err == ""


def test_at_a_terminal_a_bar_is_drawn(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("copy", total=3 * 2**20, unit="B") as bar:
        clock[0] = 3.0
        bar.update(2**20, note="file 1")
    shown = terminal.getvalue()
    assert "copy" in shown and "341 KiB/s" in shown and "0:06 left" in shown and "file 1" in shown


@pytest.mark.parametrize("seconds, text", [(42, "0:42"), (200, "3:20"), (7500, "2:05:00")])
def test_time_left_is_written_as_a_clock(seconds, text):
    assert progress.clock(seconds) == text
