"""A reader that follows the log beside a running import, and what may be missing from its reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Final, NamedTuple, Self
from uuid import UUID

import psycopg

from hindsight_fast import Cursor, EventStore
from killed_imports import Told

POLL_S: Final = 0.02
SLACK_S: Final = 5.0
"""What a machine that stands still may add; a registration that stays is there for half a minute."""
DEADLINE_S: Final = 60.0


class Read(NamedTuple):
    """One look at the log: when it began and ended (monotonic clock), and how many events the reader then had."""

    began_s: float
    ended_s: float
    event_count: int


class LogFollower:
    """Reads on behind what it has, every 20 ms, in a thread of its own; over the server's crashes, too.

    Use it in a ``with`` statement. ``events`` is what it was given, in that order; ``reads`` are its looks at the log.
    """

    def __init__(self, conninfo: str) -> None:
        self.events: list[tuple[Cursor, UUID]] = []
        self.reads: list[Read] = []
        self.interruptions = 0
        self._conninfo = conninfo
        self._failure: BaseException | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="log-follower", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(DEADLINE_S)

    def finish(self) -> None:
        """Let it look at the log once more, then end it. Raises what it met, AssertionError if it came to no look."""
        now_s = time.monotonic()
        while not (self.reads and self.reads[-1].began_s > now_s) and self._thread.is_alive():
            assert time.monotonic() < now_s + DEADLINE_S, "the reader stands still"
            time.sleep(POLL_S)
        self._stopping.set()
        self._thread.join(DEADLINE_S)
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    self._follow()
                except psycopg.OperationalError:
                    self.interruptions += 1
                    self._stopping.wait(POLL_S)
        except BaseException as error:  # noqa: BLE001 - raised in the test's own thread
            self._failure = error

    def _follow(self) -> None:
        with EventStore(self._conninfo, timeout=5.0) as store:
            while not self._stopping.is_set():
                began_s = time.monotonic()
                after = self.events[-1][0] if self.events else Cursor.BEGINNING
                for batch in store.read_batches(after=after):
                    self.events += [(event.cursor, event.event_id) for event in batch]
                self.reads.append(Read(began_s, time.monotonic(), len(self.events)))
                self._stopping.wait(POLL_S)


def lags_of(told: Iterable[Told], reads: Iterable[Read]) -> list[float]:
    """Return for each chunk how long after its commit was told the reader had it, in seconds."""
    lags = []
    looks = iter(reads)
    read = next(looks)
    for each in told:
        while read.event_count < each.events:
            read = next(looks)
        lags.append(max(read.ended_s - each.at_s, 0.0))
    return lags


def missing_of(told: Iterable[Told], reads: Iterable[Read], patience_s: float) -> list[tuple[Told, Read]]:
    """Return each chunk with a read that lacks it, although it began *patience_s* after the commit had been told."""
    chunks = sorted(told, key=lambda each: each.at_s)
    found = []
    position, needed = 0, None
    for read in reads:
        while position < len(chunks) and chunks[position].at_s + patience_s <= read.began_s:
            needed = chunks[position]
            position += 1
        if needed is not None and read.event_count < needed.events:
            found.append((needed, read))
    return found
