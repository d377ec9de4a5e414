"""AsyncEventStore: the face for asyncio. It asks and waits; what to ask, and what is meant, is decided elsewhere."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from uuid import UUID

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout

from ._core import Cursor, RecordedEvent
from .append_call import AppendCall
from .async_appending import AsyncAppender
from .connecting import RECONNECT_S, check_encodings, connection_conninfo
from .errors import ConcurrencyConflict, HindsightError
from .events import EventType
from .export_target import ExportTarget
from .exporter import ExportProgress, run_export
from .idle_check import server_has_gone
from .import_source import ImportSource
from .importer import ImportProgress, ImportReport, check_import_id
from .reading import PAGE_ROWS, PageReader, Request, check_correlation_id, check_count, check_stream_id
from .statements import SESSION_SETTINGS
from .store import EventStore
from .store_base import READ_AHEAD_PATIENCE_S, Answer, PageWalk, StoreBase, Talk
from .worker_call import WorkerCall, begin, until_done
from .writes import AppendResult, Expected, StreamHistory, StreamWrite, Transaction, history_of

AsyncConnection = psycopg.AsyncConnection[Any]
T = TypeVar("T")


class AsyncEventStore(StoreBase):
    """EventStore for asyncio: the same methods as coroutines, with the same meaning and the same errors.

    Takes what EventStore takes; *pool* is an AsyncConnectionPool. Open it with ``async with``, or by ``open()`` and
    ``close()``; the tasks of the event loop that it was opened in may share it. ``read``, ``read_batches`` and
    ``read_stream`` are gone through by ``async for``, without ``await``. A call that is cancelled gives its connection
    back.
    """

    def __init__(
        self,
        conninfo: str = "",
        *,
        event_types: Iterable[EventType[Any]] = (),
        schema: str = "hindsight",
        pool: AsyncConnectionPool[Any] | None = None,
        pool_size: int = 10,
        timeout: float = 30.0,
        group_commit: bool = True,
    ) -> None:
        check_count(pool_size, "pool_size", least=1)
        if pool is not None:
            if not isinstance(pool, AsyncConnectionPool):
                raise TypeError(f"pool must be a psycopg_pool.AsyncConnectionPool, not {type(pool).__name__}")
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
        self._loop: asyncio.AbstractEventLoop | None = None  # the one that the store was opened in
        self._group_commit = group_commit
        self._appender = self._new_appender()

    @property
    def pool(self) -> AsyncConnectionPool[Any]:
        """The connection pool, for statements of your own. Raises StoreClosed before ``open()``."""
        if self._pool is None:
            raise self._not_open()
        return self._pool

    async def open(self) -> Self:
        """Connect, and check the schema if there is one. Raises SchemaError, or psycopg's own errors."""
        if self._open:
            self._check_loop()
            return self
        if self._given_pool is None:
            settings = connection_conninfo(self.conninfo)
            # One connection made at once, outside the pool: a pool would only say that none came in time, not why.
            async with await psycopg.AsyncConnection.connect(settings, autocommit=True) as connection:
                await self._talk(connection, self._checking_store(connection.info))
            if self._pool is None:  # another task may have opened it meanwhile
                self._pool = AsyncConnectionPool(
                    settings,
                    kwargs={"autocommit": True},
                    min_size=0,
                    max_size=self._most_connections,
                    timeout=self._timeout,
                    configure=_configure,
                    reconnect_timeout=RECONNECT_S,
                    reconnect_failed=_connect_for_who_waits,
                    open=False,
                    name="hindsight_fast",
                )
            await self._pool.open()
            self._belong_to_loop()
            return self
        self._belong_to_loop()
        try:
            async with self._connection() as connection:
                await self._talk(connection, self._checking_store(connection.info))
        except BaseException:
            self._open = False
            raise
        return self

    async def close(self) -> None:
        """Close the store's own pool; harmless when already closed."""
        if self._open:
            self._check_loop()
            await self._appender.close()
        self._open = False
        if self._given_pool is None and self._pool is not None:
            pool, self._pool = self._pool, None
            closing = asyncio.create_task(pool.close(), name="hindsight-close")
            await until_done(closing)
            closing.result()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def create_schema(self) -> None:
        """Make the tables and functions if they are not there; harmless to repeat, from any number of processes.

        Raises SchemaError if the schema was made by a newer version of this library.
        """
        async with self._connection() as connection:
            await self._talk(connection, self._creating_schema(connection.info))

    # Appending

    async def append(
        self,
        stream_id: UUID,
        events: Iterable[Any],
        *,
        expected: Expected,
        correlation_id: UUID | None = None,
        connection: AsyncConnection | None = None,
    ) -> AppendResult:
        """Append *events* to a stream, all of them or none; see ``EventStore.append``.

        To cancel it takes the append back unless it is on its way already: then it may be carried out all the same.
        Give its events ids, and append them again, to know.
        """
        write = StreamWrite(check_stream_id(stream_id), events, expected)  # type: ignore[arg-type]
        return await self._append((write,), correlation_id, connection)

    async def transact(
        self,
        writes: Transaction | Iterable[StreamWrite],
        *,
        correlation_id: UUID | None = None,
        connection: AsyncConnection | None = None,
    ) -> AppendResult:
        """Append *writes*, one for each stream, together, all of them or none; see ``EventStore.transact``."""
        given = writes.writes if isinstance(writes, Transaction) else Transaction(writes).writes
        return await self._append(given, correlation_id, connection)

    async def update_stream(
        self,
        stream_id: UUID,
        decide: Callable[[Sequence[RecordedEvent]], Iterable[Any] | Awaitable[Iterable[Any]]],
        *,
        attempts: int = 5,
        correlation_id: UUID | None = None,
    ) -> AppendResult:
        """Load a stream, append what ``decide(events)`` says, again if somebody came in between.

        See ``EventStore.update_stream``. *decide* may be a coroutine function.
        """
        check_count(attempts, "attempts", least=1)
        check_correlation_id(correlation_id)
        for attempt in range(attempts):
            history = await self.load_stream(stream_id)
            decided = decide(history.events)
            events = await decided if isinstance(decided, Awaitable) else decided
            try:
                return await self.append(stream_id, events, expected=history.expected, correlation_id=correlation_id)
            except ConcurrencyConflict:
                if attempt == attempts - 1:
                    raise
        raise AssertionError  # the last attempt returns or raises

    async def load_stream(self, stream_id: UUID) -> StreamHistory:
        """Return all events of a stream, its version, and what to expect when appending to it: for aggregates."""
        async with aclosing(self.read_stream(stream_id)) as events:
            return history_of([event async for event in events])

    async def _append(
        self, writes: Sequence[StreamWrite], correlation_id: UUID | None, connection: AsyncConnection | None
    ) -> AppendResult:
        request = self._append_request(writes, correlation_id, connection, psycopg.AsyncConnection)
        if connection is None:
            return await self._appender.append(request)
        return await self._appender.append_on(connection, request)

    async def _generation(self, connection: AsyncConnection) -> int:
        return (await self._talk(connection, self._preparing_to_write(connection.info))).generation

    # Reading

    def read(
        self,
        *,
        after: Cursor = Cursor.BEGINNING,
        event_types: Iterable[EventType[Any] | str] | None = None,
        stream_id: UUID | None = None,
        correlation_id: UUID | None = None,
        limit: int | None = None,
    ) -> AsyncGenerator[RecordedEvent, None]:
        """Iterate over the events behind *after* in the total order of the log, up to its head as of the first step.

        As ``EventStore.read``. Left before its end, by ``break`` or a cancellation, the loop closes it soon after;
        ``contextlib.aclosing`` does it at once.
        """
        reader = self._selection(after, None, event_types, stream_id, correlation_id, limit)
        return _one_by_one(self._pages(reader))

    def read_batches(
        self,
        *,
        after: Cursor = Cursor.BEGINNING,
        event_types: Iterable[EventType[Any] | str] | None = None,
        batch_size: int = PAGE_ROWS,
    ) -> AsyncGenerator[Sequence[RecordedEvent], None]:
        """Iterate as ``read`` does, by batches of 1 to *batch_size* events: the fast lane.

        As ``EventStore.read_batches``.
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
    ) -> AsyncGenerator[RecordedEvent, None]:
        """Iterate over one stream's events with versions *from_version* to *to_version*, both included.

        As ``EventStore.read_stream``.
        """
        reader = self._stream(stream_id, from_version, to_version, backwards, limit)
        return _one_by_one(self._pages(reader))

    async def stream_version(self, stream_id: UUID) -> int | None:
        """Return the version of the stream's last event (0 for the first), or None if it has none.

        Reads the head row, without the global barrier: a writer sees its own append at once.
        """
        check_stream_id(stream_id)
        async with self._connection() as connection:
            return await self._talk(connection, self._finding_version(connection.info, stream_id))

    async def head(self) -> Cursor | None:
        """Return the place of the last event that every reader may see, or None in an empty store."""
        async with self._connection() as connection:
            return await self._talk(connection, self._finding_head(connection.info))

    # Importing

    async def import_events(
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
        """Append the events of *source*, one JSON object a line, in their order: ``EventStore.import_events``.

        That runs in a worker thread, over connections of its own to the same server (also where the store was given a
        pool), and reads *source* there. *progress*, an ordinary function, is called in the event loop. Cancelled, the
        import stops at its next chunk, and only then is the caller cancelled: what was stored has its checkpoint, and
        the same call goes on behind it.
        """
        options = self._import_options(
            import_id, mode, jobs, chunk_size, on_error, max_errors, max_rate, dry_run, progress
        )
        settings = await self._settings()
        worker = WorkerCall()
        told = None if progress is None else _in_loop(worker, progress)
        options = replace(options, progress=told, go_on=worker.go_on)

        def run() -> ImportReport:
            with self._synchronous(settings) as store:
                return store._run_import(source, options)

        return await worker.run(run)

    async def abandon_import(self, import_id: str) -> None:
        """Give up an initial import that is not finished: what it loaded is dropped, and the store is empty and open.

        As ``EventStore.abandon_import``, in a worker thread, over a connection of its own.
        """
        check_import_id(import_id)
        settings = await self._settings()

        def run() -> None:
            with self._synchronous(settings) as store:
                store.abandon_import(import_id)

        await WorkerCall().run(run)

    # Exporting

    async def export_events(
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

        As ``EventStore.export_events``. Lines are made and written in a worker thread; *progress*, an ordinary
        function, is called in the event loop. Cancelled, the export stops behind the page that is being written.
        """
        reader = self._selection(after, until, event_types, stream_id, correlation_id, limit)
        worker = WorkerCall()
        told = None if progress is None else _in_loop(worker, progress)
        async with aclosing(self._pages(reader)) as pages:

            async def next_page() -> Sequence[RecordedEvent] | None:
                return await anext(pages, None)

            def pages_of_the_loop() -> Iterator[Sequence[RecordedEvent]]:
                while (page := worker.ask(next_page)) is not None:
                    yield page

            return await worker.run(lambda: run_export(pages_of_the_loop(), target, overwrite=overwrite, progress=told))

    # How the store asks

    @asynccontextmanager
    async def _connection(self, timeout: float | None = None) -> AsyncGenerator[AsyncConnection, None]:
        """Lend a connection in autocommit mode, whatever the mode of the pool it comes from."""
        if not self._open:
            raise self._not_open()
        self._check_loop()
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        pool = self.pool
        while True:
            connection = await pool.getconn(deadline - time.monotonic())
            autocommit = connection.autocommit
            try:
                if not server_has_gone(connection):
                    check_encodings(connection.info)
                    if not autocommit:
                        await connection.set_autocommit(True)
                    yield connection
                    return
                # Not by close(), which may only hand it back: the pool makes another, and we take the next one.
                connection.pgconn.finish()
            finally:
                # A task of its own: a cancellation that met ``pool.connection()`` while it gave a connection back lost
                # the connection, and the pool counted it as lent for ever.
                await until_done(begin(_give_back(pool, connection, autocommit), name="hindsight-give-back"))

    async def _talk(self, connection: AsyncConnection, talk: Talk[T]) -> T:
        """Hold a conversation to its end, and return what it came to."""
        # A cursor of our own making: a connection may bring another class, and another row factory.
        cursor = psycopg.AsyncCursor(connection, row_factory=tuple_row)
        try:
            request = next(talk)
            while True:
                try:
                    answer = await self._answer(cursor, request)
                except psycopg.Error as error:
                    request = talk.throw(error)
                else:
                    request = talk.send(answer)
        except StopIteration as end:
            found: T = end.value
            return found

    async def _answer(self, cursor: psycopg.AsyncCursor[Any], request: Request) -> Answer:
        if request.answers == "nothing":
            await cursor.execute(request.statement)
            return Answer([], None)
        # Unprepared: a plan that was cached while the table was small serves a large one badly, and planning
        # costs 0.1 ms of the 8 that a page takes.
        await cursor.execute(request.statement, request.parameters, binary=True, prepare=False)
        return Answer(await cursor.fetchall() if request.answers == "values" else [], cursor.pgresult)

    async def _pages(self, reader: PageReader) -> AsyncGenerator[Sequence[RecordedEvent], None]:
        walk = PageWalk(reader, self._registry.decode_payload)
        ahead: asyncio.Task[Answer | None] | None = None
        try:
            while (request := walk.due()) is not None:
                # A page that could not be had ahead is asked for once more, so that what is wrong with it shows here.
                answer = await ahead if ahead is not None else None
                ahead = None
                if answer is not None:
                    events = walk.take(answer, ahead=True)
                else:
                    try:
                        async with self._connection() as connection:
                            answer = await self._talk(connection, self._asking(connection.info, request))
                    except psycopg.Error as error:
                        walk.renew(error)
                        continue
                    events = walk.take(answer, ahead=False)
                if events:
                    following = walk.following()
                    if following is not None:
                        ahead = asyncio.create_task(self._fetch_ahead(following), name="hindsight-read-ahead")
                        # The task's first step sends the question: the server works on it even while a busy caller
                        # does not wait. Of a caller who decodes everything that made 6 %, and without it nothing.
                        await asyncio.sleep(0)
                    walk.give(events)
                    yield events
                    walk.come_back()
        finally:
            if ahead is not None:
                ahead.cancel()
                await until_done(ahead)

    async def _fetch_ahead(self, request: Request) -> Answer | None:
        """Return the answer. None if it cannot be had, soon or at all; ask in the ordinary way then."""
        try:
            async with self._connection(timeout=READ_AHEAD_PATIENCE_S) as connection:
                return await self._talk(connection, self._asking(connection.info, request))
        except Exception:  # noqa: BLE001 - the same statement asked in the ordinary way tells what is wrong
            return None

    def _belong_to_loop(self) -> None:
        """Be open, in the running loop."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            # What waits in the former one belongs to it: a semaphore that was waited for there raised here.
            self._appender = self._new_appender()
        self._loop, self._open = loop, True

    def _new_appender(self) -> AsyncAppender:
        return AsyncAppender(
            self._connection,
            self._generation,
            AppendCall(self._statements),
            timeout_s=self._timeout,
            group_commit=self._group_commit,
            most_connections=self._most_connections,
        )

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise HindsightError(
                f"{self!r} was opened in another event loop: its connections belong to that one. Open a store in each"
            )

    # How imports run in a thread

    async def _settings(self) -> str:
        """What a connection of the same kind is made from."""
        if self._given_pool is None:
            if not self._open:
                raise self._not_open()
            self._check_loop()
            return self.conninfo
        # A pool may make up its settings as it goes; a connection knows what came of them.
        async with self._connection() as connection:
            return make_conninfo(connection.info.dsn, password=connection.info.password or None)

    def _synchronous(self, settings: str) -> EventStore:
        return EventStore(settings, schema=self.schema, pool_size=self._most_connections, timeout=self._timeout)


async def _give_back(pool: AsyncConnectionPool[Any], connection: AsyncConnection, autocommit: bool) -> None:
    if connection.info.transaction_status != TransactionStatus.IDLE:
        # A cancellation can leave a statement under way: the pool makes another connection.
        connection.pgconn.finish()
    elif connection.autocommit != autocommit:
        await connection.set_autocommit(autocommit)
    await pool.putconn(connection)


async def _connect_for_who_waits(pool: AsyncConnectionPool[Any]) -> None:
    if pool.get_stats().get("requests_waiting"):
        # Whoever asks makes the pool try, and whoever has asked already waits for that.
        with suppress(PoolTimeout, PoolClosed):
            await pool.putconn(await pool.getconn(timeout=0.001))


async def _configure(connection: AsyncConnection) -> None:
    await connection.execute(SESSION_SETTINGS)


def _in_loop(worker: WorkerCall, progress: Callable[[T], object]) -> Callable[[T], None]:
    def tell(how_far: T) -> None:
        async def call() -> None:
            progress(how_far)

        worker.ask(call)

    return tell


async def _one_by_one(pages: AsyncGenerator[Sequence[RecordedEvent], None]) -> AsyncGenerator[RecordedEvent, None]:
    async with aclosing(pages):
        async for page in pages:
            for event in page:
                yield event
