"""Reading stored events through the application's types before the application does: which of them fail, and where."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ._core import Cursor
from .errors import EventParseError
from .reading import LogReader

if TYPE_CHECKING:
    from .store import EventStore

PROGRESS_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class VersionCount:
    """The stored events of one name and version: how many there are, were checked, and failed.

    ``known`` is whether the application has a type of this name; events without one read as plain JSON.
    """

    name: str
    version: int
    known: bool
    events: int
    checked: int
    failed: int


class SchemaCheck:
    """Decodes and upcasts the events of an open *store* through the types that it was opened with.

    Iterate over it for the failures, an EventParseError each, in the order of the log; ``inventory`` is complete when
    that has ended. With *sample* about so many events of each name and version are decoded, spread over the log and the
    same ones each time, and the others are only counted. Reads as ``read`` does: in pages, up to the head as it was.
    *progress* is called with the number of events passed.
    """

    def __init__(
        self, store: EventStore, *, sample: int | None = None, progress: Callable[[int], object] | None = None
    ) -> None:
        self._store = store
        self._sample = sample
        self._progress = progress
        self._told_at = time.monotonic()
        self._events: Counter[tuple[str, int]] = Counter()
        self._checked: Counter[tuple[str, int]] = Counter()
        self._failed: Counter[tuple[str, int]] = Counter()

    @property
    def inventory(self) -> list[VersionCount]:
        """What is stored, by name and version."""
        known = self._store.event_names
        return [
            VersionCount(*kind, kind[0] in known, count, self._checked[kind], self._failed[kind])
            for kind, count in sorted(self._events.items())
        ]

    def __iter__(self) -> Iterator[EventParseError]:
        for counter in (self._events, self._checked, self._failed):
            counter.clear()
        every = self._count() if self._sample is not None else None
        passed = 0
        reader = LogReader(self._store._statements, after=Cursor.BEGINNING, sample=every)
        for batch in self._store._pages(reader):
            for event in batch:
                kind = (event.name, event.version)
                self._checked[kind] += 1
                try:
                    event.payload  # noqa: B018 - decodes it
                except EventParseError as error:
                    self._failed[kind] += 1
                    yield error
            passed += len(batch)
            self._tell(passed)
        if every is None:
            self._events.update(self._checked)

    def _count(self) -> dict[tuple[str, int], int]:
        """Count all events; returns of which number of each kind one is to be taken."""
        assert self._sample is not None
        store, position = self._store, Cursor.BEGINNING
        with store._connection() as connection:
            bound, server_run, *_ = store._bound(connection)
        while True:
            # A connection and a snapshot for each span only, however long the log is.
            with store._connection() as connection:
                place = (position.transaction_no, position.sequence_no, bound, server_run)
                rows = store._ask(connection, store._statements.count_kinds, place).fetchall()
            if not rows:
                break
            for name, version, count, transaction_no, sequence_no in rows:
                self._events[name, version] += count
                position = Cursor(transaction_no, sequence_no)
            self._tell(sum(self._events.values()))
        return {kind: max(1, count // self._sample) for kind, count in self._events.items()}

    def _tell(self, passed: int) -> None:
        if self._progress is not None and time.monotonic() - self._told_at >= PROGRESS_S:
            self._told_at = time.monotonic()
            self._progress(passed)
