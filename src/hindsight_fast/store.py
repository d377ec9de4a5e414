"""EventStore: the synchronous face. It asks and waits; what to ask and what an answer means is decided elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from uuid import UUID

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout

from ._core import Cursor, RecordedEvent
from .append_call import AppendCall
from .appending import Appender
from .connecting import RECONNECT_S, check_encodings, connection_conninfo
from .errors import ConcurrencyConflict, StoreClosed
from .events import EventType
from .export_target import ExportTarget
from .exporter import ExportProgress, run_export
from .idle_check import server_has_gone
from .import_initial import abandon_initial
from .import_source import ImportSource
from .importer import ImportOptions, ImportProgress, ImportReport, check_import_id, run_import
from .read_ahead import PageAhead
from .reading import PAGE_ROWS, PageReader, Request, check_correlation_id, check_count, check_stream_id
from .schema import StoreMeta
from .statements import SESSION_SETTINGS
from .store_base import READ_AHEAD_PATIENCE_S, Answer, PageWalk, StoreBase, Talk
from .writes import AppendResult, Expected, StreamHistory, StreamWrite, Transaction, history_of

Connection = psycopg.Connection[Any]
T = TypeVar("T")


class EventStore(StoreBase):
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
        if pool is not None:
            if not isinstance(pool, ConnectionPool):
                raise TypeError(f"pool must be a psycopg_pool.ConnectionPool, not {type(pool).__name__}")
            conninfo = pool.conninfo if isinstance(pool.conninfo, str) else ""
        super().__init__(
            conninfo,
            event_types=event_types,
            schema=schema,
            given_pool=pool is not None,
            most_connections=pool_size if pool is None else pool.max_size,
            timeout=timeout,
        )
        self._given_pool = pool
        self._pool = pool
        self._appender = Appender(
            self._connection,
            lambda connection: self._prepare_to_write(connection).generation,
            AppendCall(self._statements),
            timeout_s=timeout,
            group_commit=group_commit,
            most_connections=self._most_connections,
        )

    @property
    def pool(self) -> ConnectionPool[Any]:
        """The connection pool, for statements of your own. Raises StoreClosed before ``open()``."""
        if self._pool is None:
            raise self._not_open()
        return self._pool

    def open(self) -> Self:
        """Connect, and check the schema if there is one. Raises SchemaError, or psycopg's own errors."""
        if self._open:
            return self
        if self._given_pool is None:
            settings = connection_conninfo(self.conninfo)
            # One connection made at once, outside the pool: a pool would only say that none came in time, not why.
            with psycopg.connect(settings, autocommit=True) as connection:
                self._talk(connection, self._checking_store(connection.info))
            self._pool = ConnectionPool(
                settings,
                kwargs={"autocommit": True},
                min_size=0,
                max_size=self._most_connections,
                timeout=self._timeout,
                configure=_configure,
                reconnect_timeout=RECONNECT_S,
                reconnect_failed=_connect_for_who_waits,
                open=True,
                name="hindsight_fast",
            )
            self._open = True
            return self
        self._open = True
        try:
            with self._connection() as connection:
                self._talk(connection, self._checking_store(connection.info))
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
            self._talk(connection, self._creating_schema(connection.info))

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
        check_correlation_id(correlation_id)
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
        return history_of(list(self.read_stream(stream_id)))

    def _append(
        self, writes: Sequence[StreamWrite], correlation_id: UUID | None, connection: Connection | None
    ) -> AppendResult:
        request = self._append_request(writes, correlation_id, connection, psycopg.Connection)
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
        reader = self._selection(after, None, event_types, stream_id, correlation_id, limit)
        return _one_by_one(self._pages(reader))

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
        return self._pages(self._batches(after, event_types, batch_size))

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
        reader = self._stream(stream_id, from_version, to_version, backwards, limit)
        return _one_by_one(self._pages(reader))

    def stream_version(self, stream_id: UUID) -> int | None:
        """Return the version of the stream's last event (0 for the first), or None if it has none.

        Reads the head row, without the global barrier: a writer sees its own append at once.
        """
        check_stream_id(stream_id)
        with self._connection() as connection:
            return self._talk(connection, self._finding_version(connection.info, stream_id))

    def head(self) -> Cursor | None:
        """Return the place of the last event that every reader may see, or None in an empty store."""
        with self._connection() as connection:
            return self._talk(connection, self._finding_head(connection.info))

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
        options = self._import_options(
            import_id, mode, jobs, chunk_size, on_error, max_errors, max_rate, dry_run, progress
        )
        return self._run_import(source, options)

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
        reader = self._selection(after, until, event_types, stream_id, correlation_id, limit)
        return run_export(self._pages(reader), target, overwrite=overwrite, progress=progress)

    # How the store asks

    @contextmanager
    def _connection(self, timeout: float | None = None) -> Generator[Connection, None, None]:
        """Lend a connection in autocommit mode, whatever the mode of the pool it comes from."""
        if not self._open:
            raise self._not_open()
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        while True:
            with self.pool.connection(deadline - time.monotonic()) as connection:
                if server_has_gone(connection):
                    # Not by close(), which may only hand it back: the pool makes another, and we take the next one.
                    connection.pgconn.finish()
                    continue
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
                        connection.pgconn.finish()
                return

    def _talk(self, connection: Connection, talk: Talk[T], cursor: psycopg.Cursor[Any] | None = None) -> T:
        """Hold a conversation to its end, and return what it came to."""
        # A cursor of our own making: a connection may bring another class, and another row factory.
        cursor = psycopg.Cursor(connection, row_factory=tuple_row) if cursor is None else cursor
        try:
            request = next(talk)
            while True:
                try:
                    answer = self._answer(cursor, request)
                except psycopg.Error as error:
                    request = talk.throw(error)
                else:
                    request = talk.send(answer)
        except StopIteration as end:
            found: T = end.value
            return found

    def _answer(self, cursor: psycopg.Cursor[Any], request: Request) -> Answer:
        if request.answers == "nothing":
            cursor.execute(request.statement)
            return Answer([], None)
        # Unprepared: a plan that was cached while the table was small serves a large one badly, and planning
        # costs 0.1 ms of the 8 that a page takes.
        cursor.execute(request.statement, request.parameters, binary=True, prepare=False)
        return Answer(cursor.fetchall() if request.answers == "values" else [], cursor.pgresult)

    def _ask(self, connection: Connection, statement: bytes, parameters: Sequence[Any] = ()) -> psycopg.Cursor[Any]:
        """Run one statement, for its rows. Raises SchemaError where the tables are missing."""
        cursor = psycopg.Cursor(connection, row_factory=tuple_row)
        # "events": whatever the rows are, they stay with the cursor.
        self._talk(connection, self._asking(connection.info, Request(statement, tuple(parameters), "events")), cursor)
        return cursor

    def _bound(self, connection: Connection) -> tuple[Any, ...]:
        return self._talk(connection, self._finding_bound(connection.info))

    def _prepare_to_write(self, connection: Connection) -> StoreMeta:
        return self._talk(connection, self._preparing_to_write(connection.info))

    def _run_import(self, source: ImportSource, options: ImportOptions) -> ImportReport:
        with self._connection() as connection:
            generation = self._prepare_to_write(connection).generation
        return run_import(self._connection, self._statements, source, options, generation)

    def _pages(self, reader: PageReader) -> Iterator[Sequence[RecordedEvent]]:
        walk = PageWalk(reader, self._registry.decode_payload)
        ahead: PageAhead | None = None
        while (request := walk.due()) is not None:
            # A page that could not be had ahead is asked for once more, so that what is wrong with it shows here.
            result = ahead.result() if ahead is not None else None
            ahead = None
            if result is not None:
                events = walk.take(Answer([], result), ahead=True)
            else:
                try:
                    with self._connection() as connection:
                        answer = self._talk(connection, self._asking(connection.info, request))
                except psycopg.Error as error:
                    walk.renew(error)
                    continue
                events = walk.take(answer, ahead=False)
            if events:
                following = walk.following()
                ahead = self._page_ahead(following) if following is not None else None
                walk.give(events)
                yield events
                walk.come_back()

    def _page_ahead(self, request: Request) -> PageAhead | None:
        """Ask for a page now, if a connection is free."""
        with ExitStack() as stack:
            try:
                connection = stack.enter_context(self._connection(timeout=READ_AHEAD_PATIENCE_S))
            except (psycopg.OperationalError, StoreClosed):
                return None
            return PageAhead(request, connection, stack.pop_all())


def _connect_for_who_waits(pool: ConnectionPool[Any]) -> None:
    if pool.get_stats().get("requests_waiting"):
        # Whoever asks makes the pool try, and whoever has asked already waits for that.
        with suppress(PoolTimeout, PoolClosed):
            pool.putconn(pool.getconn(timeout=0.001))


def _configure(connection: Connection) -> None:
    connection.execute(SESSION_SETTINGS)


def _one_by_one(pages: Iterator[Sequence[RecordedEvent]]) -> Iterator[RecordedEvent]:
    for page in pages:
        yield from page
