"""Progress of something long: a rich bar at a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

PATIENCE_SECONDS = 2.0
"""Nothing is drawn before: what is over sooner needs no bar."""
LINE_SECONDS = 5.0


class Progress:
    """A bar with rate and time left. `advance` may be called as often as one likes; it draws at its own pace."""

    def __init__(
        self, label: str, *, total: float | None = None, unit: str = "", silent: bool = False, begun: float = 0
    ) -> None:
        """`begun` was done before, by another process, and says nothing about the rate of this one."""
        self._label, self._total, self._unit, self._silent = label, total, unit, silent
        self._done = self._begun = float(begun)
        self._note = ""
        self._started = self._spoken = time.monotonic()
        self._bar: RichProgress | None = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._started = self._spoken = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._refresh()
            self._bar.stop()
        elif self._spoken > self._started and not self._silent:
            self._line()

    def advance(self, amount: float = 1, *, note: str | None = None) -> None:
        """Moves on by `amount` and shows `note` ("loss 2.10") beside the bar."""
        self.update(self._done + amount, note=note)

    def update(self, done: float, *, total: float | None = None, note: str | None = None) -> None:
        """Sets how much is done, and the total when it has become known."""
        self._done = done
        self._total = total if total is not None else self._total
        self._note = note if note is not None else self._note
        now = time.monotonic()
        if self._silent or now - self._started < PATIENCE_SECONDS:
            return
        if sys.stderr.isatty():
            if now - self._spoken >= 0.1:
                self._refresh()
                self._spoken = now
        elif now - self._spoken >= LINE_SECONDS:
            self._line()
            self._spoken = now

    def _rate(self) -> float:
        return (self._done - self._begun) / max(time.monotonic() - self._started, 1e-9)

    def _left(self) -> str:
        if not self._total or self._done <= self._begun:
            return ""
        return clock(max(self._total - self._done, 0) / max(self._rate(), 1e-9)) + " left"

    def _notes(self) -> str:
        rate = f"{amount_text(self._rate(), self._unit)}/s"
        return "  ".join(part for part in (rate, self._left(), self._note) if part)

    def _line(self) -> None:
        done = amount_text(self._done, self._unit)
        if self._total:
            done = f"{done} of {amount_text(self._total, self._unit)} ({self._done / self._total:.0%})"
        print(f"{self._label}: {done}  {self._notes()}", file=sys.stderr, flush=True)

    def _refresh(self) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichProgress

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[notes]}"))
            self._bar = RichProgress(*columns, console=Console(stderr=True), auto_refresh=False)
            self._task = self._bar.add_task(self._label, total=self._total, notes="")
            self._bar.start()
        self._bar.update(self._task, completed=self._done, total=self._total, notes=self._notes(), refresh=True)


def amount_text(amount: float, unit: str) -> str:
    """An amount with its unit: bytes as MiB ('B' is the unit), counts as k and M."""
    if unit == "B":
        for prefix in ("B", "KiB", "MiB"):
            if amount < 1024:
                return f"{amount:.0f} {prefix}"
            amount /= 1024
        return f"{amount:.2f} GiB"
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if amount >= limit:
            return f"{amount / (1e3 if suffix == 'k' else limit):.3g}{suffix} {unit}".rstrip()
    return f"{amount:.3g} {unit}".rstrip() if amount < 10 and amount != int(amount) else f"{amount:.0f} {unit}".rstrip()


def clock(seconds: float) -> str:
    """A time left: '0:42', '3:20', '2:05:00'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
