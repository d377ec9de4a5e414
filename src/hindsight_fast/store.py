"""EventStore: the synchronous face. It asks and waits; what to ask and what an answer means is decided elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self
from uuid import UUID

import psycopg
from psycopg import errors
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from psycopg_pool import ConnectionPool

from ._core import Cursor, RecordedEvent
from .append_request import AppendRequest
from .appending import Appender
from .connecting import check_encodings, connection_conninfo, find_conninfo, shown_conninfo
from .errors import ConcurrencyConflict, SchemaError, StoreClosed
from .event_registry import EventRegistry
from .events import EventType
from .export_target import ExportTarget
from .exporter import ExportProgress, run_export
from .import_initial import abandon_initial
from .import_source import ImportSource
from .importer import MOST_JOBS, ImportOptions, ImportProgress, ImportReport, check_import_id, run_import
from .read_ahead import Pace, PageAhead
from .reading import (
    MAX_HOLD_S,
    PAGE_ROWS,
    LogReader,
    PageReader,
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
from .statements import FOUND_TABLE, SESSION_SETTINGS, Statements
from .writes import NO_STREAM, AppendResult, Expected, StreamHistory, StreamWrite, Transaction

if TYPE_CHECKING:
    from .reading import Request

Connection = psycopg.Connection[Any]

READ_AHEAD_PATIENCE_S = 0.05
"""How long to wait for a connection before a page is rather fetched when it is due."""


class EventStore:
    """An event store in one schema of a PostgreSQL database.

    *conninfo* is a libpq connection string or URL; empty, the environment names the server (``HINDSIGHT_DATABASE_URL``,
    ``DATABASE_URL``, libpq's ``PG*``). *event_types* say what the payloads of events are, by their names; an event of
    another name reads as plain JSON. *pool* is used instead of one of the store's own and never closed. *timeout* is
    how many seconds to wait for a free connection, and for locks that others hold. With *group_commit* appends that
    threads make at the same time share transactions; each has its own result all the same. Open it with ``with``, or by
    ``open()`` and ``close()``; threads may share it.
    """

    def __init__(
        self,
        conninfo: str = "",
        *,
        event_types: Iterable[EventType[Any]] = (),
        schema: str = "hindsight",
        pool: ConnectionPool[Any] | None = None,
        pool_size: int = 10,
        timeout: float = 30.0,
        group_commit: bool = True,
    ) -> None:
        check_count(pool_size, "pool_size", least=1)
        self.schema = check_schema_name(schema)
        self._registry = EventRegistry(event_types)
        self._statements = Statements(schema)
        self._pool_size = pool_size
        self._timeout = timeout
        self._given_pool = pool
        self._pool = pool
        if pool is None:
            self.conninfo = find_conninfo(conninfo)
        else:
            self.conninfo = pool.conninfo if isinstance(pool.conninfo, str) else ""
        self._most_connections = pool_size if pool is None else pool.max_size
        self._open = False
        self._appender = Appender(
            self._connection,
            lambda connection: self._prepare_to_write(connection).generation,
            self._statements,
            timeout_s=timeout,
            group_commit=group_commit,
            most_connections=self._most_connections,
        )

    def __repr__(self) -> str:
        return f"<EventStore {self.schema!r} at {shown_conninfo(self.conninfo) or 'the environment'}>"

    @property
    def event_names(self) -> frozenset[str]:
        """The names of the event types that the store was opened with."""
        return self._registry.known_names

    @property
    def pool(self) -> ConnectionPool[Any]:
        """The connection pool, for statements of your own. Raises StoreClosed before ``open()``."""
        if self._pool is None:
            raise StoreClosed(f"{self!r} is not open: use it in a with statement, or call open()")
        return self._pool

    def open(self) -> Self:
        """Connect, and check the schema if there is one. Raises SchemaError, or psycopg's own errors."""
        if self._open:
            return self
        if self._given_pool is None:
            settings = connection_conninfo(self.conninfo)
            # One connection made at once, outside the pool: a pool would only say that none came in time, not why.
            with psycopg.connect(settings, autocommit=True) as connection:
                self._check_store(connection)
            self._pool = ConnectionPool(
                settings,
                kwargs={"autocommit": True},
                min_size=0,
                max_size=self._pool_size,
                timeout=self._timeout,
                configure=_configure,
                # An idle connection may not have survived its server: one round trip tells.
                check=ConnectionPool.check_connection,
                open=True,
                name="hindsight_fast",
            )
            self._open = True
            return self
        self._open = True
        try:
            with self._connection() as connection:
                self._check_store(connection)
        except BaseException:
            self._open = False
            raise
        return self

    def close(self) -> None:
        """Close the store's own pool; harmless when already closed."""
        self._open = False
        if self._given_pool is None and self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def create_schema(self) -> None:
        """Make the tables and functions if they are not there; harmless to repeat, from any number of processes.

        Raises SchemaError if the schema was made by a newer version of this library.
        """
        with self._connection() as connection:
            layout = self._found_layout(connection)
            if layout is not None and layout >= LAYOUT:
                check_layout(self.schema, layout)
                return
            try:
                connection.execute(schema_sql(self.schema).encode())
            except psycopg.Error:
                # The script holds its own BEGIN; without this the connection goes back inside a failed transaction.
                connection.rollback()
                raise

    # Appending

    def append(
        self,
        stream_id: UUID,
        events: Iterable[Any],
        *,
        expected: Expected,
        correlation_id: UUID | None = None,
        connection: Connection | None = None,
    ) -> AppendResult:
        """Append *events*, objects of registered event types or NewEvents, to a stream: all of them or none.

        *expected* is ANY, NO_STREAM, STREAM_EXISTS, the stream's exact version, or the cursor of its last event. With
        *connection*, a psycopg connection of the caller's, all happens within its transaction, and commit and rollback
        stay the caller's. The rest is as for ``transact``.
        """
        write = StreamWrite(check_stream_id(stream_id), events, expected)  # type: ignore[arg-type]
        return self._append((write,), correlation_id, connection)

    def transact(
        self,
        writes: Transaction | Iterable[StreamWrite],
        *,
        correlation_id: UUID | None = None,
        connection: Connection | None = None,
    ) -> AppendResult:
        """Append *writes*, one for each stream, together: all of them or none.

        Their events stand in the log one behind the other, in the order in which they are listed. A write without
        events has its expectation checked and does nothing else. Event ids are drawn unless given; events whose ids are
        known already are not appended again: the same append gives its first result once more, as ``duplicate``.

        Raises ConcurrencyConflict, which tells of all streams that are not as expected; IdempotencyConflict for ids
        that are known from another append; AppendOutcomeUnknown if the connection was lost and nobody could be asked in
        time what became of it; and before anything is sent TypeError, ValueError or EventEncodeError for what cannot be
        appended. Nothing is written then, but for AppendOutcomeUnknown, where that is not known.
        """
        given = writes.writes if isinstance(writes, Transaction) else Transaction(writes).writes
        return self._append(given, correlation_id, connection)

    def update_stream(
        self,
        stream_id: UUID,
        decide: Callable[[Sequence[RecordedEvent]], Iterable[Any]],
        *,
        attempts: int = 5,
        correlation_id: UUID | None = None,
    ) -> AppendResult:
        """Load a stream, have ``decide(events)`` say which events follow, and append those if nobody came in between.

        If somebody did, all is done again, *attempts* times at most; then the last ConcurrencyConflict is raised.
        ``decide`` may be called several times, so it should do nothing but decide.
        """
        check_count(attempts, "attempts", least=1)
        for attempt in range(attempts):
            history = self.load_stream(stream_id)
            try:
                return self.append(
                    stream_id, decide(history.events), expected=history.expected, correlation_id=correlation_id
                )
            except ConcurrencyConflict:
                if attempt == attempts - 1:
                    raise
        raise AssertionError  # the last attempt returns or raises

    def load_stream(self, stream_id: UUID) -> StreamHistory:
        """Return all events of a stream, its version, and what to expect when appending to it: for aggregates."""
        events = tuple(self.read_stream(stream_id))
        version = events[-1].stream_version if events else None
        return StreamHistory(events, version, NO_STREAM if version is None else version)

    def _append(
        self, writes: Sequence[StreamWrite], correlation_id: UUID | None, connection: Connection | None
    ) -> AppendResult:
        request = AppendRequest(writes, self._registry.new_event, check_correlation_id(correlation_id))
        if connection is None:
            return self._appender.append(request)
        return self._appender.append_on(connection, request)

    # Reading

    def read(
        self,
        *,
        after: Cursor = Cursor.BEGINNING,
        event_types: Iterable[EventType[Any] | str] | None = None,
        stream_id: UUID | None = None,
        correlation_id: UUID | None = None,
        limit: int | None = None,
    ) -> Iterator[RecordedEvent]:
        """Iterate over the events behind *after* in the total order of the log, up to its head as of the first step.

        Constant memory, whatever the length: events are fetched page by page, and no connection is held between
        pages. *event_types* are EventTypes or names. Raises SchemaError without a schema.
        """
        return _one_by_one(self._selected_pages(after, None, event_types, stream_id, correlation_id, limit))

    def read_batches(
        self,
        *,
        after: Cursor = Cursor.BEGINNING,
        event_types: Iterable[EventType[Any] | str] | None = None,
        batch_size: int = PAGE_ROWS,
    ) -> Iterator[Sequence[RecordedEvent]]:
        """Iterate as ``read`` does, by batches of 1 to *batch_size* events: the fast lane.

        Batches are smaller at first, and where events are so large that *batch_size* of them exceed 8 MB. A batch
        decodes an event when it is asked for and keeps none: go through it once, or make a list of it.
        """
        reader = LogReader(
            self._statements,
            after=check_after(after),
            event_names=self._registry.names(event_types),
            page_rows=check_count(batch_size, "batch_size", least=1),
        )
        return self._pages(reader)

    def read_stream(
        self,
        stream_id: UUID,
        *,
        from_version: int = 0,
        to_version: int | None = None,
        backwards: bool = False,
        limit: int | None = None,
    ) -> Iterator[RecordedEvent]:
        """Iterate over one stream's events with versions *from_version* to *to_version*, both included.

        Sees what was committed before each page is fetched, the caller's own writes included. A stream without events
        gives none. Their cursors are no checkpoints for reading the log: it may still have gaps before them.
        """
        reader = StreamReader(
            self._statements,
            stream_id=check_stream_id(stream_id),
            from_version=check_count(from_version, "from_version"),
            to_version=None if to_version is None else check_count(to_version, "to_version"),
            backwards=backwards,
            limit=None if limit is None else check_count(limit, "limit"),
        )
        return _one_by_one(self._pages(reader))

    def stream_version(self, stream_id: UUID) -> int | None:
        """Return the version of the stream's last event (0 for the first), or None if it has none.

        Reads the head row, without the global barrier: a writer sees its own append at once.
        """
        with self._connection() as connection:
            row = self._ask(connection, self._statements.stream_version, (check_stream_id(stream_id),)).fetchone()
        return None if row is None else row[0]

    def head(self) -> Cursor | None:
        """Return the place of the last event that every reader may see, or None in an empty store."""
        with self._connection() as connection:
            bound = self._bound(connection)
            row = self._ask(connection, self._statements.head, bound[:2]).fetchone()
        return None if row is None else Cursor(*row)

    # Importing

    def import_events(
        self,
        source: ImportSource,
        *,
        import_id: str,
        mode: Literal["append", "initial"] = "append",
        jobs: int = 1,
        chunk_size: int | None = None,
        on_error: Literal["stop"] | str | os.PathLike[str] = "stop",
        max_errors: int | None = None,
        max_rate: float | None = None,
        dry_run: bool = False,
        progress: Callable[[ImportProgress], object] | None = None,
    ) -> ImportReport:
        """Append the events of *source*, one JSON object a line, in their order; see the README for the format.

        *source* is a path (gzip is recognised), ``"-"`` for standard input, a binary file object, or an iterable of
        lines as bytes; it is read ahead in a thread of its own. Each chunk of *chunk_size* events (None: about 250 ms
        of work) commits together with its checkpoint, so an import that was killed goes on where it stopped when it is
        called again with the same source and *import_id*. Events whose ids are stored already, with the same content,
        are passed over: whatever is done twice, each is there once.

        With *jobs* > 1 as many connections store at a time, and only the order within each stream is kept; a resumed
        import needs the same number. *on_error* is ``"stop"`` or a path: bad lines then go there, with the reasons in
        ``PATH.reasons``, and more than *max_errors* of them end the import. *max_rate* is in events a second. A
        *dry_run* checks everything, as far as the server itself goes, writes nothing to the store, and projects the
        time. *progress* is called after each chunk.

        *mode* ``"initial"`` fills an empty store faster: events gather beside the log, indexes are built when all are
        there, and one transaction puts them in place. Until then the store refuses appends, and readers find it empty.
        An id that comes twice ends it with ImportFailed, which lists the lines, and leaves the store empty and open.
        Interrupted, it is gone on with by the same call, or given up by ``abandon_import``. It remembers how many
        events each stream has, at up to 160 bytes a stream.

        Raises ImportFailed for a bad line, before anything of its chunk is stored; for a source that differs from
        what was imported under this id before; and for a rival that runs the same import. SchemaError where an initial
        import finds events, an attached projection, or what would not survive that its tables are exchanged.
        """
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
        options = ImportOptions(
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
        with self._connection() as connection:
            generation = self._prepare_to_write(connection).generation
        return run_import(self._connection, self._statements, source, options, generation)

    def abandon_import(self, import_id: str) -> None:
        """Give up an initial import that is not finished: what it loaded is dropped, and the store is empty and open.

        Raises SchemaError while it is running, and where there is no such import: what an import in append mode has
        stored stays, and needs no abandoning.
        """
        with self._connection() as connection:
            self._prepare_to_write(connection)
            abandon_initial(connection, self._statements, check_import_id(import_id))

    # Exporting

    def export_events(
        self,
        target: ExportTarget,
        *,
        after: Cursor = Cursor.BEGINNING,
        until: Cursor | None = None,
        event_types: Iterable[EventType[Any] | str] | None = None,
        stream_id: UUID | None = None,
        correlation_id: UUID | None = None,
        limit: int | None = None,
        overwrite: bool = False,
        progress: Callable[[ExportProgress], object] | None = None,
    ) -> int:
        """Write events to *target* in the order of the log, as lines that ``import_events`` takes; return how many.

        Those behind *after*, up to and including *until*, of the given names, stream and cause, at most *limit*; in
        any case only up to the head of the log as it was at the start. Memory is constant, whatever the length, and no
        connection is held between pages. *progress* is called after each page.

        *target* is a path (compressed where it ends with ``.gz``), ``"-"`` for standard output, or a binary file
        object, which is flushed and stays open. A path gets its name when all is written and on disk; until then, and
        if the process is killed, there is only ``<name>.<random letters>.part`` beside it. A path that exists already
        is replaced, in one step, only with *overwrite*; otherwise it is a FileExistsError. A device or a named pipe is
        written to as it is.

        Imported into an empty store, the lines of a whole log make the same events in the same order: stream, stream
        version, name, version, id, time, correlation id, data and metadata, all but the cursor. ``data`` is written
        byte for byte, but for white space that a line cannot hold: line breaks between tokens become spaces, and what
        stands around the whole value goes. Metadata that is JSON's null comes back as none.

        Raises OSError where the target cannot be written (BrokenPipeError for a reader that went away), SchemaError
        without a schema, and MalformedRow for a time outside the years 1 to 9999, which nothing of this library stores.
        """
        pages = self._selected_pages(after, until, event_types, stream_id, correlation_id, limit)
        return run_export(pages, target, overwrite=overwrite, progress=progress)

    # How the store asks

    @contextmanager
    def _connection(self, timeout: float | None = None) -> Generator[Connection, None, None]:
        """Lend a connection in autocommit mode, whatever the mode of the pool it comes from."""
        if not self._open:
            raise StoreClosed(f"{self!r} is not open: use it in a with statement, or call open()")
        with self.pool.connection(self._timeout if timeout is None else timeout) as connection:
            check_encodings(connection.info)
            if connection.autocommit:
                yield connection
                return
            try:
                connection.autocommit = True
                yield connection
            finally:
                # An interrupt can leave a statement under way. Such a connection is not given back: the pool makes
                # another, and what was raised is what the caller sees.
                if connection.info.transaction_status == TransactionStatus.IDLE:
                    connection.autocommit = False
                else:
                    connection.close()

    def _ask(self, connection: Connection, statement: bytes, parameters: Sequence[Any] = ()) -> psycopg.Cursor[Any]:
        """Run a statement in binary format. Raises SchemaError where the tables are missing."""
        # A cursor of our own making: a connection may bring another class, and another row factory.
        cursor = psycopg.Cursor(connection, row_factory=tuple_row)
        try:
            # Unprepared: a plan that was cached while the table was small serves a large one badly, and planning
            # costs 0.1 ms of the 8 that a page takes.
            return cursor.execute(statement, parameters, binary=True, prepare=False)
        except (errors.UndefinedTable, errors.InvalidSchemaName, errors.UndefinedFunction) as error:
            if connection.info.transaction_status == TransactionStatus.IDLE:
                check_layout(self.schema, self._found_layout(connection))
            raise SchemaError(f"schema {self.schema!r} is not complete: {error}", schema=self.schema) from error
        except psycopg.Error as error:
            if (refusal := refusal_of(error, self.schema)) is not None:
                raise refusal from error
            raise

    def _check_store(self, connection: Connection) -> None:
        check_encodings(connection.info)
        layout = self._found_layout(connection)
        if layout is not None:
            check_layout(self.schema, layout)
            with suppress(errors.InsufficientPrivilege, errors.ReadOnlySqlTransaction):
                # Who may only read leaves it to the first who writes; where it matters to readers they are refused.
                self._prepare_to_write(connection)

    def _found_layout(self, connection: Connection) -> int | None:
        cursor = psycopg.Cursor(connection, row_factory=tuple_row)
        row = cursor.execute(FOUND_TABLE, (f"{self._statements.quoted_schema}.store_meta",)).fetchone()
        if row is None or row[0] is None:
            return None
        row = cursor.execute(self._statements.found_layout, ()).fetchone()
        return None if row is None else int(row[0])

    def _prepare_to_write(self, connection: Connection) -> StoreMeta:
        """Return what the store says of itself, with a sequence that lags or changed hands moved on first."""
        row = self._ask(connection, self._statements.store_meta).fetchone()
        if row is None:
            raise SchemaError(f"schema {self.schema!r} has lost its row of store_meta", schema=self.schema)
        meta = StoreMeta(*row)
        if meta.sequence_lags or not meta.same_server:
            self._ask(connection, self._statements.advance_sequence)
        return meta

    def _selected_pages(
        self,
        after: Cursor,
        until: Cursor | None,
        event_types: Iterable[EventType[Any] | str] | None,
        stream_id: UUID | None,
        correlation_id: UUID | None,
        limit: int | None,
    ) -> Iterator[Sequence[RecordedEvent]]:
        """Check what was asked for, and return its pages; nothing is asked of the server before the first."""
        check_after(after)
        check_until(until)
        names = self._registry.names(event_types)
        check_correlation_id(correlation_id)
        limit = None if limit is None else check_count(limit, "limit")
        reader: PageReader
        if stream_id is None:
            reader = LogReader(
                self._statements,
                after=after,
                until=until,
                event_names=names,
                correlation_id=correlation_id,
                limit=limit,
            )
        else:
            reader = StreamLogReader(
                self._statements,
                stream_id=check_stream_id(stream_id),
                after=after,
                until=until,
                event_names=names,
                correlation_id=correlation_id,
                limit=limit,
            )
        return self._pages(reader)

    def _pages(self, reader: PageReader) -> Iterator[Sequence[RecordedEvent]]:
        ahead: PageAhead | None = None
        pace = Pace()
        while (request := reader.request()) is not None:
            # A page that could not be had ahead is asked for once more, so that what is wrong with it shows here.
            result = ahead.result() if ahead is not None else None
            ahead = None
            if result is not None:
                events = reader.take(None, result, self._registry.decode_payload)
            else:
                began = time.monotonic()
                try:
                    with self._connection() as connection:
                        events = self._answer(connection, reader, request)
                except psycopg.Error as error:
                    if not reader.renew(error.sqlstate):
                        raise
                    continue
                if events:
                    pace.fetched(len(events), time.monotonic() - began)
            if events:
                if pace.fetch_ahead:
                    ahead = self._page_ahead(reader)
                pace.give(len(events))
                yield events
                pace.come_back()

    def _page_ahead(self, reader: PageReader) -> PageAhead | None:
        """Ask for the next page of events now, if that is what comes next and a connection is free."""
        request = reader.request() if reader.fixed else None
        if request is None or request.answers != "events":
            return None
        with ExitStack() as stack:
            try:
                connection = stack.enter_context(self._connection(timeout=READ_AHEAD_PATIENCE_S))
            except (psycopg.OperationalError, StoreClosed):
                return None
            return PageAhead(request, connection, stack.pop_all())

    def _bound(self, connection: Connection) -> tuple[Any, ...]:
        """What READ_BARRIER answers, once what stands still and blocks it has been ended."""
        (bound,) = self._ask(connection, self._statements.read_barrier)
        blocked = bound[3]
        if blocked and tell_of_stalled(self._ask(connection, self._statements.end_stalled, (MAX_HOLD_S,)).fetchall()):
            (bound,) = self._ask(connection, self._statements.read_barrier)
        return tuple(bound)

    def _answer(self, connection: Connection, reader: PageReader, request: Request) -> Sequence[RecordedEvent]:
        cursor = self._ask(connection, request.statement, request.parameters)
        result = cursor.pgresult
        assert result is not None
        rows = None if request.answers == "events" else cursor.fetchall()
        return reader.take(rows, result, self._registry.decode_payload)


def _configure(connection: Connection) -> None:
    connection.execute(SESSION_SETTINGS)


def _one_by_one(pages: Iterator[Sequence[RecordedEvent]]) -> Iterator[RecordedEvent]:
    for page in pages:
        yield from page
