"""What both stores decide: what may be asked for, which statements that takes, what an answer or an error means.

EventStore and AsyncEventStore differ in how they wait, and in nothing else. A conversation with the server is a
generator: it yields what to ask, is sent the answer (or thrown the server's error), and returns what was wanted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar
from uuid import UUID

import psycopg
from psycopg import errors
from psycopg.pq import TransactionStatus

from ._core import Cursor, RecordedEvent
from .append_call import check_lent
from .append_request import AppendRequest
from .connecting import check_encodings, find_conninfo, shown_conninfo
from .errors import SchemaError, StoreClosed
from .event_registry import EventRegistry
from .events import EventType
from .importer import MOST_JOBS, ImportOptions, ImportProgress, check_import_id
from .read_ahead import Pace
from .reading import (
    MAX_HOLD_S,
    LogReader,
    PageReader,
    Request,
    StreamLogReader,
    StreamReader,
    check_after,
    check_correlation_id,
    check_count,
    check_stream_id,
    check_until,
    tell_of_stalled,
)
from .schema import LAYOUT, StoreMeta, check_layout, check_schema_name, refusal_of, schema_sql
from .statements import FOUND_TABLE, Statements

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

    from .writes import StreamWrite

T = TypeVar("T")

READ_AHEAD_PATIENCE_S = 0.05
"""How long to wait for a connection before a page is rather fetched when it is due."""


class Answer(NamedTuple):
    """What the server answered: its rows where a Request asks for values, and in any case psycopg's result."""

    rows: list[tuple[Any, ...]]
    result: PGresult | None


Talk = Generator[Request, Answer, T]
"""A conversation over one connection, which ends with a T."""


class StoreBase:
    """The part of a store that does not wait. *given_pool* says whether its connections are somebody else's."""

    def __init__(
        self,
        conninfo: str,
        *,
        event_types: Iterable[EventType[Any]],
        schema: str,
        given_pool: bool,
        most_connections: int,
        timeout: float,
    ) -> None:
        self.schema = check_schema_name(schema)
        self.conninfo = conninfo if given_pool else find_conninfo(conninfo)
        self._registry = EventRegistry(event_types)
        self._statements = Statements(schema)
        self._most_connections = most_connections
        self._timeout = timeout
        self._open = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.schema!r} at {shown_conninfo(self.conninfo) or 'the environment'}>"

    @property
    def event_names(self) -> frozenset[str]:
        """The names of the event types that the store was opened with."""
        return self._registry.known_names

    def _not_open(self) -> StoreClosed:
        return StoreClosed(f"{self!r} is not open: use it in a with statement, or call open()")

    # Conversations. *info* is of the connection that they are held over.

    def _asking(self, info: psycopg.ConnectionInfo, request: Request) -> Talk[Answer]:
        """Ask one thing. Raises SchemaError where the tables are missing, or where the store refuses it."""
        try:
            return (yield request)
        except (errors.UndefinedTable, errors.InvalidSchemaName, errors.UndefinedFunction) as error:
            if info.transaction_status == TransactionStatus.IDLE:
                check_layout(self.schema, (yield from self._finding_layout()))
            raise SchemaError(f"schema {self.schema!r} is not complete: {error}", schema=self.schema) from error
        except psycopg.Error as error:
            if (refusal := refusal_of(error, self.schema)) is not None:
                raise refusal from error
            raise

    def _asking_values(
        self, info: psycopg.ConnectionInfo, statement: bytes, *parameters: Any
    ) -> Talk[list[tuple[Any, ...]]]:
        answer = yield from self._asking(info, Request(statement, parameters, "values"))
        return answer.rows

    def _finding_layout(self) -> Talk[int | None]:
        """The layout of the tables that are there; None without any."""
        table = f"{self._statements.quoted_schema}.store_meta"
        rows = (yield Request(FOUND_TABLE.encode(), (table,), "values")).rows
        if not rows or rows[0][0] is None:
            return None
        rows = (yield Request(self._statements.found_layout, (), "values")).rows
        return int(rows[0][0]) if rows else None

    def _checking_store(self, info: psycopg.ConnectionInfo) -> Talk[None]:
        """What opening finds out. Raises SchemaError or HindsightError for a store that cannot be used."""
        check_encodings(info)
        layout = yield from self._finding_layout()
        if layout is not None:
            check_layout(self.schema, layout)
            with suppress(errors.InsufficientPrivilege, errors.ReadOnlySqlTransaction):
                # Who may only read leaves it to the first who writes; where it matters to readers they are refused.
                yield from self._preparing_to_write(info)

    def _preparing_to_write(self, info: psycopg.ConnectionInfo) -> Talk[StoreMeta]:
        """What the store says of itself, with a sequence that lags or changed hands moved on first."""
        rows = yield from self._asking_values(info, self._statements.store_meta)
        if not rows:
            raise SchemaError(f"schema {self.schema!r} has lost its row of store_meta", schema=self.schema)
        meta = StoreMeta(*rows[0])
        if meta.sequence_lags or not meta.same_server:
            yield from self._asking_values(info, self._statements.advance_sequence)
        return meta

    def _creating_schema(self, info: psycopg.ConnectionInfo) -> Talk[None]:
        layout = yield from self._finding_layout()
        if layout is not None and layout >= LAYOUT:
            check_layout(self.schema, layout)
            return
        try:
            yield Request(schema_sql(self.schema).encode(), (), "nothing")
        except psycopg.Error:
            # The script holds its own BEGIN; without this the connection goes back inside a failed transaction.
            if info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
                yield Request(b"ROLLBACK", (), "nothing")
            raise

    def _finding_bound(self, info: psycopg.ConnectionInfo) -> Talk[tuple[Any, ...]]:
        """What READ_BARRIER answers, once what stands still and blocks it has been ended."""
        (bound,) = yield from self._asking_values(info, self._statements.read_barrier)
        blocked = bound[3]
        if blocked and tell_of_stalled(
            (yield from self._asking_values(info, self._statements.end_stalled, MAX_HOLD_S))
        ):
            (bound,) = yield from self._asking_values(info, self._statements.read_barrier)
        return bound

    def _finding_head(self, info: psycopg.ConnectionInfo) -> Talk[Cursor | None]:
        bound = yield from self._finding_bound(info)
        rows = yield from self._asking_values(info, self._statements.head, *bound[:2])
        return Cursor(*rows[0]) if rows else None

    def _finding_version(self, info: psycopg.ConnectionInfo, stream_id: UUID) -> Talk[int | None]:
        rows = yield from self._asking_values(info, self._statements.stream_version, stream_id)
        return rows[0][0] if rows else None

    # What may be asked for, checked before anything is sent

    def _append_request(
        self, writes: Sequence[StreamWrite], correlation_id: UUID | None, connection: Any, kind: type[Any]
    ) -> AppendRequest:
        """The append that is asked for, over a *connection* of the caller's, if one is given, of this *kind*."""
        request = AppendRequest(writes, self._registry.new_event, check_correlation_id(correlation_id))
        if connection is not None:
            check_lent(connection, kind)
        if not self._open:
            raise self._not_open()
        return request

    def _selection(
        self,
        after: Cursor,
        until: Cursor | None,
        event_types: Iterable[EventType[Any] | str] | None,
        stream_id: UUID | None,
        correlation_id: UUID | None,
        limit: int | None,
    ) -> PageReader:
        check_after(after)
        check_until(until)
        names = self._registry.names(event_types)
        check_correlation_id(correlation_id)
        limit = None if limit is None else check_count(limit, "limit")
        if stream_id is None:
            return LogReader(
                self._statements,
                after=after,
                until=until,
                event_names=names,
                correlation_id=correlation_id,
                limit=limit,
            )
        return StreamLogReader(
            self._statements,
            stream_id=check_stream_id(stream_id),
            after=after,
            until=until,
            event_names=names,
            correlation_id=correlation_id,
            limit=limit,
        )

    def _batches(
        self, after: Cursor, event_types: Iterable[EventType[Any] | str] | None, batch_size: int
    ) -> PageReader:
        return LogReader(
            self._statements,
            after=check_after(after),
            event_names=self._registry.names(event_types),
            page_rows=check_count(batch_size, "batch_size", least=1),
        )

    def _stream(
        self, stream_id: UUID, from_version: int, to_version: int | None, backwards: bool, limit: int | None
    ) -> PageReader:
        return StreamReader(
            self._statements,
            stream_id=check_stream_id(stream_id),
            from_version=check_count(from_version, "from_version"),
            to_version=None if to_version is None else check_count(to_version, "to_version"),
            backwards=backwards,
            limit=None if limit is None else check_count(limit, "limit"),
        )

    def _import_options(
        self,
        import_id: str,
        mode: Literal["append", "initial"],
        jobs: int,
        chunk_size: int | None,
        on_error: Literal["stop"] | str | os.PathLike[str],
        max_errors: int | None,
        max_rate: float | None,
        dry_run: bool,
        progress: Callable[[ImportProgress], object] | None,
    ) -> ImportOptions:
        check_import_id(import_id)
        if mode not in ("append", "initial"):
            raise ValueError(f"mode is 'append' or 'initial', not {mode!r}")
        if mode == "initial" and (jobs != 1 or dry_run):
            raise ValueError("mode='initial' goes with jobs=1, and not with dry_run")
        if on_error != "stop" and not isinstance(on_error, (str, os.PathLike)):
            raise TypeError(f'on_error is "stop" or a path, not {type(on_error).__name__}')
        if max_errors is not None and on_error == "stop":
            raise ValueError("max_errors goes with on_error=PATH")
        if max_rate is not None and not (isinstance(max_rate, (int, float)) and 0 < max_rate < float("inf")):
            raise ValueError(f"max_rate must be a positive number of events a second, not {max_rate!r}")
        return ImportOptions(
            import_id,
            initial=mode == "initial",
            jobs=check_count(jobs, "jobs", least=1, most=min(MOST_JOBS, self._most_connections)),
            chunk_size=None if chunk_size is None else check_count(chunk_size, "chunk_size", least=1),
            reject_path=None if on_error == "stop" else on_error,
            max_errors=None if max_errors is None else check_count(max_errors, "max_errors"),
            max_rate=max_rate,
            dry_run=dry_run,
            progress=progress,
        )


class PageWalk:
    """A read on its way from page to page: what is due, what to fetch ahead, and whether that pays for this caller.

    In turn: ``due()``, then ``take()`` with the answer or ``renew()`` with the error; for a page that holds events
    ``following()`` and ``give()`` before the caller has it, and ``come_back()`` when he wants another.
    """

    def __init__(self, reader: PageReader, decode_payload: Callable[[RecordedEvent], Any] | None) -> None:
        self._reader = reader
        self._decode_payload = decode_payload
        self._pace = Pace()
        self._due: Request | None = None
        self._asked_at = 0.0

    def due(self) -> Request | None:
        """Return what is to be asked now, None at the end of the read."""
        self._asked_at = time.monotonic()
        self._due = self._reader.request()
        return self._due

    def take(self, answer: Answer, *, ahead: bool) -> Sequence[RecordedEvent]:
        """Return the events of the answer, none if it was about something else; *ahead* says whether it was at hand."""
        assert self._due is not None
        assert answer.result is not None
        rows = None if self._due.answers == "events" else answer.rows
        events = self._reader.take(rows, answer.result, self._decode_payload)
        if events and not ahead:
            self._pace.fetched(len(events), time.monotonic() - self._asked_at)
        return events

    def renew(self, error: psycopg.Error) -> None:
        """Go on after *error*; raises it where that cannot be."""
        if not self._reader.renew(error.sqlstate):
            raise error

    def following(self) -> Request | None:
        """Return what to ask for ahead of the caller: a page of events, where it is settled already and pays."""
        request = self._reader.request() if self._reader.fixed and self._pace.fetch_ahead else None
        return request if request is not None and request.answers == "events" else None

    def give(self, events: Sequence[RecordedEvent]) -> None:
        """The caller has *events* now."""
        self._pace.give(len(events))

    def come_back(self) -> None:
        """The caller wants the next page."""
        self._pace.come_back()
