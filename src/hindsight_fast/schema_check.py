"""Reading stored events through the application's types before the application does: which of them fail, and where."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ._core import Cursor
from .errors import EventParseError
from .reading import LogReader, PageReader, PlacesReader, check_count
from .statements import TABLE_FILE

if TYPE_CHECKING:
    from .store import EventStore

PROGRESS_S: Final = 0.1
FIRST_BLOCKS: Final = 64
"""Of the table, looked at by the first statement: of a kind that was not met yet it answers with every event."""
MOST_BLOCKS: Final = 4096
"""Looked at by one statement, and so under one snapshot: 32 MB, in 0.1 s where they lie in memory."""

Kind = tuple[str, int]


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
    that has ended. With *sample* so many events of each name and version are decoded (all, where there are fewer),
    drawn from the whole log and the same ones each time, and the others are only counted; their places are remembered,
    at up to 200 bytes each. Sees the log up to its head as it was, page by page, and holds no snapshot beyond a page.
    *progress* is called with a number that rises to the number of events, and by the sample's size beyond. Raises
    TypeError or ValueError for a sample of none.
    """

    def __init__(
        self, store: EventStore, *, sample: int | None = None, progress: Callable[[int], object] | None = None
    ) -> None:
        self._store = store
        self._sample = None if sample is None else check_count(sample, "sample", least=1)
        self._progress = progress
        self._told_at = time.monotonic()
        self._events: Counter[Kind] = Counter()
        self._checked: Counter[Kind] = Counter()
        self._failed: Counter[Kind] = Counter()

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
        reader: PageReader
        if self._sample is None:
            reader = LogReader(self._store._statements, after=Cursor.BEGINNING)
        else:
            reader = PlacesReader(self._store._statements, self._count_and_draw(self._sample))
        passed = sum(self._events.values())
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
        if self._sample is None:
            self._events.update(self._checked)
        self._tell(passed, last=True)

    def _count_and_draw(self, sample: int) -> list[tuple[int, int]]:
        """Count all events; return the places of *sample* of each kind, in the order of the log."""
        store = self._store
        with store._connection() as connection:
            bound = store._bound(connection)[0]
        while True:
            self._events.clear()
            drawn: dict[Kind, Lots] = {}
            file, block_count = self._table_file()
            begin, size = 0, FIRST_BLOCKS
            while begin < block_count:
                full = [(*kind, lots.highest) for kind, lots in drawn.items() if lots.highest is not None]
                limits = [list(column) for column in zip(*full, strict=True)] or [[], [], []]
                span = (f"({begin},0)", f"({begin + size},0)")
                with store._connection() as connection:
                    rows = store._ask(connection, store._statements.count_kinds, (*limits, *span, bound)).fetchall()
                for name, version, count, *low in rows:
                    self._events[name, version] += count
                    if low[0] is not None:
                        drawn.setdefault((name, version), Lots(sample)).add(*low)
                self._tell(sum(self._events.values()))
                begin, size = begin + size, min(size * 4, MOST_BLOCKS)
            # Rewritten meanwhile, by VACUUM FULL say, rows changed their blocks: some were counted twice, some never.
            if self._table_file()[0] == file:
                return sorted(place for lots in drawn.values() for place in lots.places())

    def _table_file(self) -> tuple[int, int]:
        """Which file the events lie in, and in how many blocks."""
        store = self._store
        with store._connection() as connection:
            table = f"{store._statements.quoted_schema}.events"
            file, block_count = store._ask(connection, TABLE_FILE, (table,)).fetchone() or (0, 0)
        return file, block_count

    def _tell(self, passed: int, *, last: bool = False) -> None:
        if self._progress is not None and (last or time.monotonic() - self._told_at >= PROGRESS_S):
            self._told_at = time.monotonic()
            self._progress(passed)


class Lots:
    """The lowest *most* lots of a kind, and the places of their events; so the order in which they come is all one."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lots: list[int] = []  # lot and place in one number, half as large as a tuple
        self.highest: int | None = None
        """A higher lot need not be added any more."""

    def add(self, lots: list[int], transaction_nos: list[int], sequence_nos: list[int]) -> None:
        for lot, transaction_no, sequence_no in zip(lots, transaction_nos, sequence_nos, strict=True):
            self._lots.append(lot << 96 | transaction_no << 32 | sequence_no)
        if len(self._lots) >= 2 * self._most:
            self._keep_lowest()
            self.highest = self._lots[-1] >> 96

    def places(self) -> list[tuple[int, int]]:
        self._keep_lowest()
        return [(lot >> 32 & 2**64 - 1, lot & 2**32 - 1) for lot in self._lots]

    def _keep_lowest(self) -> None:
        self._lots.sort()
        del self._lots[self._most :]
