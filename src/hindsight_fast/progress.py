"""Progress on standard error: a live bar on a terminal, else a plain line now and then."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from types import TracebackType
from typing import Final, Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

PLAIN_EVERY_S: Final = 2.0
WINDOW_S: Final = 10.0
"""The rate and the time left follow from what was done this recently."""


class EventProgress:
    """Shows how much is done, how many events, how many a second, the time left and the time elapsed.

    *total* is what ``show()``'s *done* runs up to (bytes or events), None if that is not known or not yet; *events*
    were there before.
    """

    def __init__(self, label: str, total: int | None, *, events: int = 0) -> None:
        self._label = label
        self._other_label = label  # of work without events, the last that was told
        self._total = total
        self._events_before = self._events = events
        self._began = time.monotonic()
        self._samples: deque[tuple[float, int, int]] = deque()  # when, events, done
        self._next_line_at = 0.0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._samples.append((self._began, self._events, 0))
        if _is_live():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}", markup=False),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                refresh_per_second=5,
                expand=True,
            )
            self._task = self._bar.add_task(self._label, total=self._total, numbers="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            rate = (self._events - self._events_before) / max(time.monotonic() - self._began, 1e-6)
            numbers = f"{self._events:,} events  {rate:,.0f}/s"
            if self._bar is None:
                self._say(f"{numbers}  done")
            else:
                # A bar of unknown length is full when it is done.
                total = self._total or 1
                self._bar.update(
                    self._task, description=self._label, total=total, completed=total, numbers=numbers, refresh=True
                )
        if self._bar is not None:
            self._bar.stop()

    def show(self, events: int, done: int, total: int | None = None) -> None:
        """Tell that *events* are stored or read by now, and *done* of the total (of *total*, if it is known now)."""
        self._events = events
        self._total = total or self._total
        now = time.monotonic()
        if self._bar is None and now < self._next_line_at:
            return
        self._next_line_at = now + PLAIN_EVERY_S
        self._samples.append((now, events, done))
        while len(self._samples) > 2 and self._samples[0][0] < now - WINDOW_S:
            self._samples.popleft()
        numbers = self._numbers()
        if self._bar is None:
            self._say(numbers)
        else:
            self._bar.update(self._task, total=self._total, completed=done, numbers=numbers)

    def show_share(self, label: str, share: float | None) -> None:
        """Tell of work that has no events to count: how much of it is done (0 to 1), None if nobody can tell."""
        now = time.monotonic()
        if self._bar is None and now < self._next_line_at and label == self._other_label:
            return
        self._next_line_at = now + PLAIN_EVERY_S
        self._other_label = label
        numbers = "" if share is None else f"{share:.0%}  "
        if self._bar is None:
            click.echo(f"{label}  {numbers}{_clock(now - self._began)} elapsed", err=True)
        else:
            total = None if share is None else 1.0
            self._bar.update(self._task, description=label, total=total, completed=share or 0.0, numbers=numbers)

    def _numbers(self) -> str:
        (then, events_then, done_then), (now, events, done) = self._samples[0], self._samples[-1]
        seconds = max(now - then, 1e-6)
        parts = [f"{events:,} events", f"{(events - events_then) / seconds:,.0f}/s"]
        if self._total:
            share = min(done / self._total, 1.0)
            parts.insert(0, f"{share:.0%}")
            if done > done_then:
                left = max(self._total - done, 0) * seconds / (done - done_then)
                parts.append(f"{_clock(left)} left")
        return "  ".join(parts)

    def _say(self, numbers: str) -> None:
        click.echo(f"{self._label}  {numbers}  {_clock(time.monotonic() - self._began)} elapsed", err=True)


def _is_live() -> bool:
    return (
        sys.stderr is not None
        and sys.stderr.isatty()
        and os.environ.get("TERM", "") not in ("", "dumb", "unknown")  # what moves no cursor gets lines
    )


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"
