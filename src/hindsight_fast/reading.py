"""How a read goes page by page: what to ask next, and what an answer means. No I/O: the stores do the asking.

A read of the log first asks for the bound (statement READ_BARRIER) and then, in statements of their own, for pages
below it. Reading one stream needs no bound.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, LiteralString, NamedTuple
from uuid import UUID

from ._core import Cursor, RecordedEvent
from .results import events_of
from .statements import (
    BEHIND_CURSOR,
    BELOW_BOUND,
    CORRELATION_FILTER,
    NAMES_FILTER,
    STREAM_BELOW_BOUND,
    STREAM_SPAN,
    UP_TO_CURSOR,
)

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

    from ._core import EventBatch
    from .statements import Statements

PAGE_ROWS = 5_000
"""Rows of a full page: planning its statement takes 0.1 ms, fetching it about 7."""
PAGE_BYTES = 8 * 1024 * 1024
"""What a page of large events should not exceed. Of a single stream the next page's rows follow from the last one's."""
FIRST_PAGE_ROWS = 500
"""Before anything is known of the events' size."""
SCAN_ROWS = 20_000
"""Rows that one statement of a filtered read looks at."""

BOUND_EXPIRED = "HS003"

MAX_HOLD_S = 30.0
"""How long an append that stands still in the middle of its COPY may hold up readers, before a reader ends it. A chunk
of an import takes a quarter of a second."""

_log = logging.getLogger("hindsight_fast")


class Request(NamedTuple):
    """A statement to run, its parameters, and whether it answers with events, with plain values, or not at all.

    Of what answers with nothing there may be several in one text; it takes no parameters.
    """

    statement: bytes
    parameters: tuple[Any, ...]
    answers: Literal["events", "values", "nothing"]


class Bound(NamedTuple):
    """Every event with a lower number is visible or never will be; good only in that run of the server."""

    number: int
    server_run: str
    large_events: bool  # some below it are stored out of line, so pages are measured before they are sent
    blocked: bool  # an open append holds it down


class PageSize:
    """How many rows to ask for next, so that a page stays near PAGE_BYTES whatever its events weigh."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.rows = min(most, FIRST_PAGE_ROWS)

    def at_most(self, remaining: int | None) -> int:
        return self.rows if remaining is None else min(self.rows, remaining)

    def learn(self, events: EventBatch) -> None:
        size = events.payload_bytes
        # Up to tenfold at a step: a few small events do not promise that all are small.
        self.rows = max(1, min(self.most, self.rows * 10, PAGE_BYTES * len(events) // (size + 1)))


class PageReader(ABC):
    """A read that goes page by page.

    ``request()`` gives what to ask next, or None at the end; ``take()`` what was answered. ``renew()`` after an error
    says whether the read can go on. ``fixed`` tells that its events are settled before the first page, so that fetching
    a page early changes nothing.
    """

    fixed = False

    def __init__(self, statements: Statements, limit: int | None, page_rows: int) -> None:
        self._statements = statements
        self._remaining = limit
        self._page = PageSize(page_rows)
        self._done = limit == 0

    def request(self) -> Request | None:
        """Return what to ask next, None when the read has ended."""
        return None if self._done else self._next_request()

    def take(
        self,
        rows: list[tuple[Any, ...]] | None,
        result: PGresult,
        decode_payload: Callable[[RecordedEvent], Any] | None = None,
    ) -> Sequence[RecordedEvent]:
        """Take the answer to the last request: plain *rows*, or a *result* with events. Returns the events."""
        if rows is not None:
            self._take_values(rows)
            return []
        wanted = self._wanted()
        events = events_of(result, decode_payload)
        if events:
            self._page.learn(events)
        if self._remaining is not None:
            self._remaining -= len(events)
        self._take_events(events, wanted)
        if self._remaining == 0:
            self._done = True
        return events

    def renew(self, sqlstate: str | None) -> bool:
        """Whether to go on after an error with this SQLSTATE."""
        return False

    @abstractmethod
    def _next_request(self) -> Request: ...

    def _take_values(self, rows: list[tuple[Any, ...]]) -> None:
        raise AssertionError("this reader asks for events only")

    @abstractmethod
    def _take_events(self, events: Sequence[RecordedEvent], wanted: int) -> None: ...

    def _wanted(self) -> int:
        return self._page.at_most(self._remaining)


class BoundedReader(PageReader):
    """A read of the log from behind *after* to where it ended when the first bound was had, or up to *until*.

    A bound that has expired with its server's run is asked for anew.
    """

    fixed = True

    def __init__(
        self,
        statements: Statements,
        *,
        after: Cursor,
        until: Cursor | None,
        event_names: list[str] | None,
        correlation_id: UUID | None,
        limit: int | None,
        page_rows: int,
    ) -> None:
        super().__init__(statements, limit, page_rows)
        self.position = after
        self.until = until
        self.bound: Bound | None = None
        self._last_number: int | None = None  # of the first bound: the read ends there even under a later one
        self._renewed_at: Cursor | None = None
        self._looked_for_stalled = False
        self._filters: list[LiteralString] = []
        self._filter_values: list[Any] = []
        if event_names is not None:
            self._filters.append(NAMES_FILTER)
            self._filter_values.append(event_names)
        if correlation_id is not None:
            self._filters.append(CORRELATION_FILTER)
            self._filter_values.append(correlation_id)

    def renew(self, sqlstate: str | None) -> bool:
        if sqlstate != BOUND_EXPIRED or self.bound is None or self._renewed_at == self.position:
            return False
        self._renewed_at = self.position  # once: a bound that expires again before it was of use is no accident
        self._forget_bound()
        return True

    def _next_request(self) -> Request:
        if self.bound is None:
            return Request(self._statements.read_barrier, (), "values")
        if self._looks_for_stalled:
            return Request(self._statements.end_stalled, (MAX_HOLD_S,), "values")
        return self._next_below(self.bound)

    def _take_values(self, rows: list[tuple[Any, ...]]) -> None:
        if self.bound is None:
            bound = Bound(*rows[0])
            self._last_number = bound.number if self._last_number is None else self._last_number
            self.bound = bound._replace(number=min(bound.number, self._last_number))
        elif self._looks_for_stalled:
            self._looked_for_stalled = True
            if tell_of_stalled(rows):
                # Nothing has been read yet: what the stalled append held up belongs to this read.
                self.bound = self._last_number = None
        else:
            self._take_place(rows)

    @property
    def _looks_for_stalled(self) -> bool:
        return self.bound is not None and self.bound.blocked and not self._looked_for_stalled

    @abstractmethod
    def _next_below(self, bound: Bound) -> Request: ...

    @abstractmethod
    def _take_place(self, rows: list[tuple[Any, ...]]) -> None: ...

    def _forget_bound(self) -> None:
        self.bound = None


class LogReader(BoundedReader):
    """Reads the whole log, or what passes its filters."""

    def __init__(
        self,
        statements: Statements,
        *,
        after: Cursor,
        until: Cursor | None = None,
        event_names: list[str] | None = None,
        correlation_id: UUID | None = None,
        limit: int | None = None,
        page_rows: int = PAGE_ROWS,
    ) -> None:
        super().__init__(
            statements,
            after=after,
            until=until,
            event_names=event_names,
            correlation_id=correlation_id,
            limit=limit,
            page_rows=page_rows,
        )
        self._page_end: Cursor | Literal["the end"] | None = None
        # One cause's events are found by an index of their own; names alone make a read scan.
        self._scans = event_names is not None and correlation_id is None

    def _next_below(self, bound: Bound) -> Request:
        where: list[LiteralString] = [BEHIND_CURSOR, BELOW_BOUND]
        values: list[Any] = [self.position.transaction_no, self.position.sequence_no, bound.number, bound.server_run]
        if self.until is not None:
            where.append(UP_TO_CURSOR)
            values += [self.until.transaction_no, self.until.sequence_no]
        if self._scans and self._page_end is None:
            return Request(self._statements.page_end(where, SCAN_ROWS - 1), tuple(values), "values")
        if isinstance(self._page_end, Cursor):
            where.append(UP_TO_CURSOR)
            values += [self._page_end.transaction_no, self._page_end.sequence_no]
        page_bytes = PAGE_BYTES if bound.large_events else None
        statement = self._statements.log_page([*where, *self._filters], self._wanted(), page_bytes=page_bytes)
        return Request(statement, (*values, *self._filter_values), "events")

    def _take_place(self, rows: list[tuple[Any, ...]]) -> None:
        self._page_end = Cursor(*rows[0]) if rows else "the end"

    def _take_events(self, events: Sequence[RecordedEvent], wanted: int) -> None:
        if events:
            self.position = events[-1].cursor
        # A page that was measured may be short for its bytes; only an empty one is the end then.
        if not events or (len(events) < wanted and self.bound is not None and not self.bound.large_events):
            if isinstance(self._page_end, Cursor):
                # All that was scanned has been seen: go on behind it, whatever matched.
                self.position = self._page_end
            else:
                self._done = True
            self._page_end = None

    def _forget_bound(self) -> None:
        super()._forget_bound()
        self._page_end = None


class StreamLogReader(BoundedReader):
    """Reads the part of the log that is one stream: by its versions, which have no holes, a span at a time."""

    def __init__(
        self,
        statements: Statements,
        *,
        stream_id: UUID,
        after: Cursor,
        until: Cursor | None = None,
        event_names: list[str] | None = None,
        correlation_id: UUID | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(
            statements,
            after=after,
            until=until,
            event_names=event_names,
            correlation_id=correlation_id,
            limit=limit,
            page_rows=PAGE_ROWS,
        )
        self._stream_id = stream_id
        self._next_version: int | None = None
        self._last_version = -1
        self._span_end = -1

    def _next_below(self, bound: Bound) -> Request:
        if self._next_version is None:
            at = (self._stream_id, self.position.transaction_no, self.position.sequence_no)
            if self.until is None:
                return Request(self._statements.stream_start, (*at, self._stream_id), "values")
            end = (self._stream_id, self.until.transaction_no, self.until.sequence_no, self._stream_id)
            return Request(self._statements.stream_range, (*at, *end), "values")
        span_rows = SCAN_ROWS if self._filters else self._wanted()
        self._span_end = min(self._next_version + span_rows - 1, self._last_version)
        statement = self._statements.stream_page(
            [STREAM_SPAN, STREAM_BELOW_BOUND, *self._filters], self._wanted(), backwards=False
        )
        span = (self._stream_id, self._next_version, self._span_end)
        return Request(statement, (*span, bound.number, bound.server_run, *self._filter_values), "events")

    def _take_place(self, rows: list[tuple[Any, ...]]) -> None:
        self._next_version, last_version = rows[0]
        if self._next_version is None or last_version is None:
            self._done = True
        else:
            self._last_version = last_version

    def _take_events(self, events: Sequence[RecordedEvent], wanted: int) -> None:
        if events:
            self.position = events[-1].cursor
        # A full page may have stopped inside its span.
        passed = events[-1].stream_version if len(events) == wanted else self._span_end
        self._next_version = passed + 1
        self._done = passed >= self._last_version

    def _forget_bound(self) -> None:
        super()._forget_bound()
        self._next_version = None


class StreamReader(PageReader):
    """Reads one stream in the order of its versions, or against it, with what was committed before each page."""

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
        super().__init__(statements, limit, PAGE_ROWS)
        self._stream_id = stream_id
        self._from = from_version
        self._to = to_version
        self._backwards = backwards

    def _next_request(self) -> Request:
        where: list[LiteralString] = ["e.stream_id = %s::uuid", "e.stream_version >= %s::bigint"]
        values: list[Any] = [self._stream_id, self._from]
        if self._to is not None:
            where.append("e.stream_version <= %s::bigint")
            values.append(self._to)
        statement = self._statements.stream_page(where, self._wanted(), backwards=self._backwards)
        return Request(statement, tuple(values), "events")

    def _take_events(self, events: Sequence[RecordedEvent], wanted: int) -> None:
        if events and self._backwards:
            self._to = events[-1].stream_version - 1
        elif events:
            self._from = events[-1].stream_version + 1
        self._done = len(events) < wanted


class PlacesReader(PageReader):
    """Reads the events at *places*, pairs of numbers in the order of the log.

    Somebody has seen an event at each of them, so no bound is needed.
    """

    fixed = True

    def __init__(self, statements: Statements, places: Sequence[tuple[int, int]]) -> None:
        super().__init__(statements, None, PAGE_ROWS)
        self._places = places
        self._passed = 0
        self._done = not places

    def _next_request(self) -> Request:
        page = self._places[self._passed : self._passed + self._wanted()]
        return Request(self._statements.events_at, ([each[0] for each in page], [each[1] for each in page]), "events")

    def _take_events(self, events: Sequence[RecordedEvent], wanted: int) -> None:
        self._passed += wanted
        self._done = self._passed >= len(self._places)


def tell_of_stalled(rows: list[tuple[Any, ...]]) -> bool:
    """Log what END_STALLED answered. Returns whether any append was ended."""
    for pid, application_name, held_s, ended in rows:
        done = "ended it" if ended else "no right to end it: ask its owner, or a superuser"
        _log.warning(
            "the append of process %d (%s) has waited for its client and held up readers for %.0f s; %s",
            pid, application_name, held_s, done,
        )  # fmt: skip
    return any(ended for *_, ended in rows)


def check_until(until: Cursor | None) -> Cursor | None:
    """Return *until*. Raises TypeError unless it is a Cursor or None."""
    if until is not None and not isinstance(until, Cursor):
        raise TypeError(f"until must be a Cursor, not {type(until).__name__}")
    return until


def check_after(after: Cursor) -> Cursor:
    """Return *after*. Raises TypeError unless it is a Cursor."""
    if not isinstance(after, Cursor):
        raise TypeError(f"after must be a Cursor, not {type(after).__name__}")
    return after


def check_correlation_id(correlation_id: UUID | None) -> UUID | None:
    """Return *correlation_id*. Raises TypeError unless it is a UUID or None."""
    if correlation_id is not None and not isinstance(correlation_id, UUID):
        raise TypeError(f"correlation_id must be a UUID, not {type(correlation_id).__name__}")
    return correlation_id


def check_stream_id(stream_id: UUID) -> UUID:
    """Return *stream_id*. Raises TypeError unless it is a UUID."""
    if not isinstance(stream_id, UUID):
        raise TypeError(f"stream_id must be a UUID, not {type(stream_id).__name__}; names become one by stream_uuid()")
    return stream_id


def check_count(value: int, name: str, *, least: int = 0, most: int = 2**63 - 1) -> int:
    """Return *value*. Raises TypeError unless it is an int (and no bool), ValueError below *least* or above *most*."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, not {value}")
    return value
