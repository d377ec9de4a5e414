"""How a read goes page by page: what to ask next, and what an answer means. No I/O: the stores do the asking.

A read of the log first asks for the bound (statement READ_BARRIER) and then, in statements of their own, for pages
below it. Reading one stream needs no bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, LiteralString, NamedTuple
from uuid import UUID

from ._core import Cursor, RecordedEvent
from .results import events_of
from .statements import BEHIND_CURSOR, BELOW_BOUND

if TYPE_CHECKING:
    from datetime import datetime

    from psycopg.pq.abc import PGresult

    from .statements import Statements

PAGE_ROWS = 5_000
"""Rows of a full page. Larger ones were no faster, and hold more memory."""
PAGE_BYTES = 8 * 1024 * 1024
"""What a page of large events should not exceed: the next page's rows follow from the size of the last one's."""
FIRST_PAGE_ROWS = 500
"""Before anything is known of the events' size."""
SCAN_ROWS = 20_000
"""Rows that one statement of a filtered read looks at."""

BOUND_EXPIRED = "HS003"


class Request(NamedTuple):
    """A statement to run, its parameters, and whether it answers with events or with plain values."""

    statement: bytes
    parameters: tuple[Any, ...]
    answers: Literal["events", "values"]


class Bound(NamedTuple):
    """Every event with a lower number is visible or never will be; good only on the server started at that time."""

    number: int
    server_started: datetime


class PageSize:
    """How many rows to ask for next, so that a page stays near PAGE_BYTES whatever its events weigh."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.rows = min(most, FIRST_PAGE_ROWS)

    def at_most(self, remaining: int | None) -> int:
        return self.rows if remaining is None else min(self.rows, remaining)

    def learn(self, events: list[RecordedEvent]) -> None:
        size = sum(len(event.data) for event in events)
        # Up to tenfold at a step: a few small events do not promise that all are small.
        self.rows = max(1, min(self.most, self.rows * 10, PAGE_BYTES * len(events) // (size + 1)))


class LogReader:
    """Reads the log in its total order, from behind *after* up to where it ended when the first answer came.

    ``request()`` gives what to ask next, or None at the end; ``take()`` what was answered. ``renew()`` after an error
    says whether the read can go on: a bound that has expired with its server is asked for anew.
    """

    def __init__(
        self,
        statements: Statements,
        *,
        after: Cursor,
        event_names: list[str] | None = None,
        stream_id: UUID | None = None,
        correlation_id: UUID | None = None,
        limit: int | None = None,
        page_rows: int = PAGE_ROWS,
    ) -> None:
        self.position = after
        self._statements = statements
        self._remaining = limit
        self._page = PageSize(page_rows)
        self._bound: Bound | None = None
        self._last_number: int | None = None  # of the first bound: the read ends there even under a later one
        self._page_end: Cursor | Literal["open"] | None = None
        self._done = limit == 0
        self._filters: list[LiteralString] = []
        self._filter_values: list[Any] = []
        self._stream_id = stream_id
        self._stream_version = -1  # of the last event read, if one stream is read
        if event_names is not None:
            self._filters.append("e.event_name = ANY(%s::text[])")
            self._filter_values.append(event_names)
        if stream_id is not None:
            self._filters.append("e.stream_id = %s::uuid")
            self._filter_values.append(stream_id)
        if correlation_id is not None:
            self._filters.append("e.correlation_id = %s::uuid")
            self._filter_values.append(correlation_id)
        # One stream's or one cause's events are found by an index of their own; only names make a read scan.
        self._scans = event_names is not None and stream_id is None and correlation_id is None

    def request(self) -> Request | None:
        if self._done:
            return None
        if self._bound is None:
            return Request(self._statements.read_barrier, (), "values")
        where: list[LiteralString] = [BEHIND_CURSOR, BELOW_BOUND]
        values: list[Any] = [self.position.transaction_no, self.position.sequence_no, *self._bound]
        if self._scans and self._page_end is None:
            return Request(self._statements.page_end(where, SCAN_ROWS - 1), tuple(values), "values")
        if isinstance(self._page_end, Cursor):
            where.append("(e.transaction_no, e.sequence_no) <= (%s::bigint, %s::integer)")
            values += [self._page_end.transaction_no, self._page_end.sequence_no]
        where += self._filters
        values += self._filter_values
        if self._stream_id is None:
            return Request(self._statements.log_page(where, self._wanted()), tuple(values), "events")
        where.append("e.stream_version > %s::bigint")
        values.append(self._stream_version)
        return Request(self._statements.stream_page(where, self._wanted(), backwards=False), tuple(values), "events")

    def take(self, rows: list[tuple[Any, ...]] | None, result: PGresult) -> list[RecordedEvent]:
        """Take the answer to the last request: plain *rows* or a *result* with events. Returns the events."""
        if self._bound is None:
            assert rows is not None
            number, server_started = rows[0]
            if self._last_number is None:
                self._last_number = number
            self._bound = Bound(min(number, self._last_number), server_started)
            return []
        if rows is not None:
            self._page_end = Cursor(*rows[0]) if rows else "open"
            return []
        wanted = self._wanted()
        events = events_of(result)
        if events:
            self.position = events[-1].cursor
            self._stream_version = events[-1].stream_version
            self._page.learn(events)
        if self._remaining is not None:
            self._remaining -= len(events)
        if self._remaining == 0:
            self._done = True
        elif len(events) < wanted:
            if isinstance(self._page_end, Cursor):
                # All that was scanned has been seen: go on behind it, whatever matched.
                self.position = self._page_end
            else:
                self._done = True
            self._page_end = None
        return events

    def renew(self, sqlstate: str | None) -> bool:
        """Whether to go on after an error with this SQLSTATE: yes, with a new bound, if only the bound has expired."""
        if sqlstate != BOUND_EXPIRED or self._bound is None:
            return False
        self._bound = None
        self._page_end = None
        return True

    def _wanted(self) -> int:
        return self._page.at_most(self._remaining)


class StreamReader:
    """Reads one stream in the order of its versions, or against it; ``request`` and ``take`` as in LogReader."""

    def __init__(
        self,
        statements: Statements,
        *,
        stream_id: UUID,
        from_version: int,
        to_version: int | None,
        backwards: bool,
        limit: int | None,
    ) -> None:
        self._statements = statements
        self._stream_id = stream_id
        self._from = from_version
        self._to = to_version
        self._backwards = backwards
        self._remaining = limit
        self._page = PageSize(PAGE_ROWS)
        self._done = limit == 0

    def request(self) -> Request | None:
        if self._done:
            return None
        where: list[LiteralString] = ["e.stream_id = %s::uuid", "e.stream_version >= %s::bigint"]
        values: list[Any] = [self._stream_id, self._from]
        if self._to is not None:
            where.append("e.stream_version <= %s::bigint")
            values.append(self._to)
        return Request(
            self._statements.stream_page(where, self._wanted(), backwards=self._backwards), tuple(values), "events"
        )

    def take(self, rows: list[tuple[Any, ...]] | None, result: PGresult) -> list[RecordedEvent]:
        wanted = self._wanted()
        events = events_of(result)
        if events:
            self._page.learn(events)
            if self._backwards:
                self._to = events[-1].stream_version - 1
            else:
                self._from = events[-1].stream_version + 1
        if self._remaining is not None:
            self._remaining -= len(events)
        self._done = len(events) < wanted or self._remaining == 0
        return events

    def renew(self, sqlstate: str | None) -> bool:
        return False

    def _wanted(self) -> int:
        return self._page.at_most(self._remaining)


def check_event_names(event_types: Iterable[str] | None) -> list[str] | None:
    """Return the names to filter by. Raises TypeError for a lone str, which would be taken for its letters."""
    if event_types is None:
        return None
    if isinstance(event_types, str):
        raise TypeError(f"event_types is a list of names: [{event_types!r}], not {event_types!r}")
    names = list(event_types)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"event_types holds names, not {type(name).__name__}")
        name.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
        if "\0" in name:
            raise ValueError(f"no event's name holds a NUL character: {name!r}")
    return names


def check_stream_id(stream_id: UUID) -> UUID:
    """Return *stream_id*. Raises TypeError unless it is a UUID."""
    if not isinstance(stream_id, UUID):
        raise TypeError(f"stream_id must be a UUID, not {type(stream_id).__name__}; names become one by stream_uuid()")
    return stream_id


def check_count(value: int, name: str, *, least: int = 0) -> int:
    """Return *value*. Raises TypeError unless it is an int (and no bool), ValueError below *least*."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return value
