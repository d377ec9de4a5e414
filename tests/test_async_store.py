"""What only AsyncEventStore has: its loop, its tasks, cancellation. What it shares is tested over both stores."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from hindsight_fast import (
    AsyncEventStore,
    EventStore,
    HindsightError,
    ImportFailed,
    ImportProgress,
    StoreClosed,
    read_ahead,
    reading,
    stream_uuid,
)
from hindsight_fast.async_store import READ_AHEAD_PATIENCE_S
from hindsight_fast.embedded import EmbeddedServer
from hindsight_fast.installations import Installation

COUNT = 3_000
PAGE = 100
PATIENCE_S = 20


def lines(count: int = COUNT) -> Iterator[bytes]:
    return (b'{"stream":"s%d","type":"t","data":{"n":%d}}' % (n % 9, n) for n in range(count))


@pytest.fixture
def filled(database: str) -> str:
    with EventStore(database) as store:
        store.create_schema()
        store.import_events(lines(), import_id="x")
    return database


@pytest.fixture
def always_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "WORTHWHILE", -1.0)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run *main* in a loop of its own, in which nothing may go wrong unheard: no lost task, no unretrieved error."""
    complaints: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
        await main()

    asyncio.run(asyncio.wait_for(watched(), 100))
    gc.collect()
    assert complaints == []


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


def own_tasks() -> list[str]:
    """The tasks that a store has begun and not ended."""
    return [name for task in asyncio.all_tasks() if (name := task.get_name()).startswith("hindsight-")]


def all_are_back(store: AsyncEventStore) -> bool:
    stats = store.pool.get_stats()
    return stats["pool_available"] == stats["pool_size"] and not stats.get("requests_waiting")


async def check_whole(store: AsyncEventStore, connections: int) -> None:
    """The pool has all its connections, and each of them works."""
    await until(lambda: not own_tasks())
    await until(lambda: all_are_back(store))
    heads = await asyncio.gather(*(store.head() for _ in range(connections * 3)))
    assert None not in heads
    assert len(set(heads)) == 1
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(connections):
            connection = await stack.enter_async_context(store.pool.connection(timeout=PATIENCE_S))
            assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
            assert connection.autocommit


async def by_pages(store: AsyncEventStore) -> AsyncIterator[int]:
    async for batch in store.read_batches(batch_size=PAGE):
        for event in batch:
            yield event.payload["n"]


class Locked:
    """The log's table is locked: whoever reads it waits."""

    def __init__(self, database: str) -> None:
        self.blocker = psycopg.connect(database)
        self.admin = psycopg.connect(database, autocommit=True)

    def __enter__(self) -> Locked:
        self.blocker.execute("LOCK TABLE hindsight.events IN ACCESS EXCLUSIVE MODE")
        return self

    def __exit__(self, *_: object) -> None:
        self.blocker.close()
        self.admin.close()

    def waiting(self) -> list[int]:
        rows = self.admin.execute(
            "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        return [pid for (pid,) in rows]


# The loop and the pool


@pytest.mark.essential
def test_tasks_share_a_store(filled: str) -> None:
    async def main() -> None:
        async with AsyncEventStore(filled, pool_size=3) as store:

            async def read() -> list[int]:
                return [event.payload["n"] async for event in store.read()]

            assert await asyncio.gather(*(read() for _ in range(8))) == [list(range(COUNT))] * 8
            await check_whole(store, 3)

    run(main)


def test_a_pool_of_the_other_kind_is_refused_at_once(database: str) -> None:
    with ConnectionPool(database, open=False) as pool:
        with pytest.raises(TypeError, match="AsyncConnectionPool, not ConnectionPool"):
            AsyncEventStore(pool=pool)  # type: ignore[arg-type]

    async def main() -> None:
        async with AsyncConnectionPool(database, open=False) as pool:
            with pytest.raises(TypeError, match="ConnectionPool, not AsyncConnectionPool"):
                EventStore(pool=pool)  # type: ignore[arg-type]

    run(main)


@pytest.mark.parametrize("autocommit", [False, True])
def test_a_given_pool_is_used_and_left_open(filled: str, tmp_path: Path, autocommit: bool) -> None:
    async def main() -> None:
        settings = {"autocommit": autocommit, "application_name": "lent"}
        async with AsyncConnectionPool(filled, kwargs=settings, min_size=1, open=False) as pool:
            async with AsyncEventStore(pool=pool) as lent:
                assert lent.pool is pool
                assert [event.payload["n"] async for event in lent.read()] == list(range(COUNT))
                report = await lent.import_events(lines(10), import_id="y", chunk_size=3)
                assert report.events == 10
                assert await lent.export_events(tmp_path / "all.ndjson") == COUNT + 10
            async with pool.connection() as connection:
                assert connection.autocommit is autocommit

    run(main)


def test_a_store_is_opened_in_a_loop_and_used_in_that_loop(filled: str) -> None:
    store = AsyncEventStore(filled)
    with pytest.raises(StoreClosed, match="not open"):
        store.pool  # noqa: B018 - raises

    async def use() -> None:
        await store.head()

    with pytest.raises(StoreClosed, match="not open"):
        asyncio.run(use())
    with asyncio.Runner() as runner:
        runner.run(store.open())
        failures: list[BaseException] = []

        def elsewhere() -> None:
            for call in (store.head, store.open, store.close, lambda: store.import_events([], import_id="z")):

                async def main(call: Callable[[], Awaitable[object]] = call) -> None:
                    await call()

                try:
                    asyncio.run(main())
                except HindsightError as error:
                    failures.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert ["another event loop" in str(error) for error in failures] == [True] * 4
        assert runner.run(store.head()) is not None
        runner.run(store.close())
    # Closed, it can be opened in another.
    with asyncio.Runner() as runner:
        runner.run(store.open())
        assert runner.run(store.head()) is not None
        runner.run(store.close())
        runner.run(store.close())


def test_two_tasks_may_open_a_store_at_once(filled: str) -> None:
    async def main() -> None:
        store = AsyncEventStore(filled, pool_size=2)
        await asyncio.gather(*(store.open() for _ in range(5)))
        await check_whole(store, 2)
        await store.close()

    run(main)


def test_no_connection_is_held_between_pages_and_the_next_is_fetched_meanwhile(filled: str, always_ahead: None) -> None:
    async def main() -> None:
        async with AsyncEventStore(filled, pool_size=1, timeout=5) as store:
            pages = [store.read_batches(batch_size=PAGE) for _ in range(3)]
            firsts = []
            for each in pages:
                firsts.append(await anext(each))
                assert "hindsight-read-ahead" in own_tasks()
            await until(lambda: not own_tasks())
            assert await store.head() is not None  # with the only connection
            for first, each in zip(firsts, pages, strict=True):
                rest = [event async for batch in each for event in batch]
                assert [event.payload["n"] for event in [*first, *rest]] == list(range(COUNT))

    run(main)


def test_a_busy_pool_delays_the_reader_little(filled: str, always_ahead: None) -> None:
    async def main() -> None:
        async with AsyncEventStore(filled, pool_size=1) as store:
            events = by_pages(store)
            seen = [await anext(events)]
            await until(lambda: not own_tasks())
            async with store.pool.connection():  # the only one
                began = time.monotonic()
                seen += [await anext(events) for _ in range(PAGE)]
                await until(lambda: not own_tasks())
                assert READ_AHEAD_PATIENCE_S <= time.monotonic() - began < READ_AHEAD_PATIENCE_S + 5
            seen += [n async for n in events]
            assert seen == list(range(COUNT))

    run(main)


# Nothing outlives its iterator


@pytest.mark.parametrize("how", ["aclose", "dropped", "cancelled", "cancelled while closing", "loop ends"])
def test_a_read_that_is_left_leaves_no_task_and_no_connection_out(filled: str, always_ahead: None, how: str) -> None:
    async def main() -> None:
        store = await AsyncEventStore(filled, pool_size=2).open()
        pages = store.read_batches(batch_size=PAGE)
        await anext(pages)
        await until(lambda: not own_tasks())
        with Locked(filled) as locked:
            await anext(pages)  # at hand; the one behind it waits for the lock
            await until(lambda: len(locked.waiting()) == 1)
            assert own_tasks() == ["hindsight-read-ahead"]
            if how == "aclose":
                await pages.aclose()
                assert own_tasks() == []
            elif how == "cancelled while closing":
                closing = asyncio.create_task(pages.aclose())
                await asyncio.sleep(0)
                closing.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await closing
                assert own_tasks() == []
            elif how == "dropped":
                del pages
                gc.collect()
            elif how == "cancelled":
                waiting = asyncio.create_task(anext(pages))  # type: ignore[arg-type]
                await asyncio.sleep(0.01)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                assert own_tasks() == []
            else:
                return  # the loop is shut down around all of it
            await until(lambda: not locked.waiting())
            await until(lambda: not own_tasks())
            await until(lambda: all_are_back(store))
        await check_whole(store, 2)
        await store.close()

    run(main)


def test_closing_a_read_of_single_events_closes_its_pages_at_once(
    filled: str, always_ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "FIRST_PAGE_ROWS", 10)

    async def main() -> None:
        async with AsyncEventStore(filled, pool_size=1) as store:
            async with contextlib.aclosing(store.read()) as events:
                seen = [(await anext(events)).payload["n"]]
                await until(lambda: not own_tasks())
                with Locked(filled) as locked:
                    seen += [(await anext(events)).payload["n"] for _ in range(10)]
                    await until(lambda: len(locked.waiting()) == 1)
                    await events.aclose()
                    assert own_tasks() == []
            assert seen == list(range(11))
            await check_whole(store, 1)

    run(main)


@pytest.mark.parametrize("seed", range(40 if os.environ.get("HINDSIGHT_SOAK") else 2))
def test_calls_that_are_cancelled_anywhere_leave_the_pool_whole(filled: str, always_ahead: None, seed: int) -> None:
    chance = random.Random(seed)

    async def main() -> None:
        async with AsyncEventStore(filled, pool_size=3) as store:

            async def read() -> None:
                async for _ in store.read_batches(batch_size=PAGE):
                    await asyncio.sleep(0)

            async def read_a_part() -> None:
                async for event in store.read(event_types=["t"]):
                    if event.payload["n"] == 700:
                        break

            async def read_stream() -> None:
                async for _ in store.read_stream(stream_uuid("s1"), backwards=True):
                    pass

            async def ask() -> None:
                await store.head()
                await store.stream_version(stream_uuid("s1"))

            calls = [read, read_a_part, read_stream, ask, ask]
            cancelled = 0
            for _ in range(60):
                tasks = [asyncio.create_task(chance.choice(calls)()) for _ in range(chance.randint(1, 8))]
                for task in tasks:
                    # Some before they begin, some in the first steps of the loop, some later, some twice.
                    for _ in range(chance.choice([0, 1, 2, 3, 5, 8, 20])):
                        await asyncio.sleep(0)
                    if chance.random() < 0.5:
                        await asyncio.sleep(chance.uniform(0, 0.01))
                    task.cancel()
                    if chance.random() < 0.3:
                        await asyncio.sleep(0)
                        task.cancel()
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    assert result is None or isinstance(result, asyncio.CancelledError)
                    cancelled += result is not None
            assert cancelled > 60
            gc.collect()
            await check_whole(store, 3)
            assert [event.payload["n"] async for event in store.read()] == list(range(COUNT))

    run(main)


@pytest.mark.essential
@pytest.mark.parametrize("ahead", [False, True])
def test_a_connection_lost_while_reading(filled: str, monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    monkeypatch.setattr(read_ahead, "WORTHWHILE", -1.0 if ahead else 1e9)

    async def main() -> None:
        async with AsyncEventStore(filled, pool_size=1) as store:
            pages = store.read_batches(batch_size=PAGE)
            seen = [*await anext(pages)]
            await until(lambda: not own_tasks())
            with Locked(filled) as locked:
                if ahead:
                    seen += await anext(pages)
                page = None if ahead else asyncio.create_task(anext(pages))  # type: ignore[arg-type]
                await until(lambda: len(locked.waiting()) == 1)
                locked.admin.execute("SELECT pg_terminate_backend(%s)", locked.waiting())
                await until(lambda: not locked.waiting())
            if page is not None:
                with pytest.raises(psycopg.errors.AdminShutdown):
                    await page
            else:
                # The page that was fetched ahead is asked for once more.
                seen += [event async for batch in pages for event in batch]
                assert [event.payload["n"] for event in seen] == list(range(COUNT))
            await check_whole(store, 1)

    run(main)


# A server that was restarted between two calls


@pytest.fixture
def own_server(installation: Installation) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(installation=installation, settings={"fsync": "off"}) as server:
        yield server


@pytest.mark.essential
def test_a_server_restarted_between_two_calls_costs_nobody_an_error(
    own_server: EmbeddedServer, store_class: type[EventStore]
) -> None:
    with store_class(own_server.conninfo, pool_size=6, timeout=PATIENCE_S) as store:
        store.create_schema()
        store.import_events(lines(10), import_id="x")
        head = store.head()
        use_connections(store, 6, "SELECT 1")  # then six are idle, and all of them will be gone
        own_server.restart()
        began = time.monotonic()
        assert store.head() == head
        assert len(list(store.read())) == 10
        # By the pool's own check each further connection that is found gone would be waited for twice as long: 63 s in
        # all, and an error when the store's patience ends.
        assert time.monotonic() - began < PATIENCE_S - 5


def test_an_idle_connection_that_was_told_something_is_kept(store_class: type[EventStore], database: str) -> None:
    with store_class(database, pool_size=1) as store, psycopg.connect(database, autocommit=True) as admin:
        store.create_schema()
        use_connections(store, 1, "LISTEN news")
        (listener,) = backends(admin)
        admin.execute("NOTIFY news, 'x'")
        for _ in range(3):
            assert store.head() is None
        assert backends(admin) == [listener]


def use_connections(store: Any, count: int, statement: str) -> None:
    """Have *count* connections at once, of either kind of store, run a statement on each, and give them back."""
    if isinstance(store, EventStore):
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                stack.enter_context(store.pool.connection()).execute(statement)
        return

    async def use() -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(count):
                await (await stack.enter_async_context(store.pool.connection())).execute(statement)

    store.runner.run(use())


def backends(admin: psycopg.Connection[Any]) -> list[int]:
    rows = admin.execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    return [pid for (pid,) in rows]


# Imports and exports, in a thread


def test_a_cancelled_import_stops_and_is_gone_on_with(database: str) -> None:
    async def main() -> None:
        async with AsyncEventStore(database, pool_size=2) as store:
            await store.create_schema()
            for jobs, count in ((1, 20_000), (2, 40_000)):
                name = f"with {jobs}"
                told: list[ImportProgress] = []
                chunks = asyncio.Event()

                def tell(progress: ImportProgress, told: Any = told, chunks: Any = chunks) -> None:
                    assert asyncio.get_running_loop()  # called in the loop
                    told.append(progress)
                    if len(told) == 5:
                        chunks.set()

                task = asyncio.create_task(
                    store.import_events(lines(20_000), import_id=name, chunk_size=100, jobs=jobs, progress=tell)
                )
                await chunks.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert not [each for each in threading.enumerate() if each.name.startswith("hindsight-import")]
                found = [event async for event in store.read()]
                stored = len(found) - (count - 20_000)
                assert 400 <= stored < 20_000
                assert stored % 100 == 0 or jobs == 2  # whole chunks
                report = await store.import_events(lines(20_000), import_id=name, jobs=jobs)
                assert report.skipped_events == stored
                assert report.events == 20_000 - stored
                found = [event async for event in store.read()]
                assert sorted(event.payload["n"] for event in found[count - 20_000 :]) == list(range(20_000))

    run(main)


@pytest.mark.parametrize("waits_for", ["its source", "its rate", "its turn"])
def test_an_import_that_waits_is_cancelled_soon(database: str, waits_for: str) -> None:
    async def main() -> None:
        async with AsyncEventStore(database) as store:
            await store.create_schema()
            release, begun = threading.Event(), threading.Event()

            def source() -> Iterator[bytes]:
                yield from lines(10)
                begun.set()
                if waits_for == "its source":
                    release.wait(PATIENCE_S)
                yield from lines(10)

            rate = 0.1 if waits_for == "its rate" else None
            task = asyncio.create_task(store.import_events(source(), import_id="slow", max_rate=rate, chunk_size=10))
            if waits_for != "its turn":
                await until(begun.is_set)
            await asyncio.sleep(0.1 if waits_for != "its turn" else 0)
            began = time.monotonic()
            task.cancel()
            try:
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert time.monotonic() - began < PATIENCE_S - 5  # its source and its rate keep it for longer
            finally:
                release.set()
            assert await store.import_events(lines(10), import_id="after") is not None

    run(main)


def test_what_progress_raises_ends_the_import_and_reaches_the_caller(database: str) -> None:
    class Enough(Exception):
        pass

    def enough(_: object) -> None:
        raise Enough

    async def main() -> None:
        async with AsyncEventStore(database) as store:
            await store.create_schema()
            with pytest.raises(Enough):
                await store.import_events(lines(), import_id="x", chunk_size=500, progress=enough)
            assert len([event async for event in store.read()]) == 500
            with pytest.raises(ImportFailed, match="malformed"):
                await store.import_events([b"bad"], import_id="bad")
            with pytest.raises(ValueError, match="jobs"):
                await store.import_events([], import_id="x", jobs=0)

    run(main)


def test_an_initial_import_is_abandoned(database: str) -> None:
    def broken() -> Iterator[bytes]:
        yield from lines(1000)
        raise RuntimeError("the source broke")

    async def main() -> None:
        async with AsyncEventStore(database) as store:
            await store.create_schema()
            with pytest.raises(RuntimeError, match="broke"):
                await store.import_events(broken(), import_id="x", mode="initial", chunk_size=100)
            await store.abandon_import("x")
            report = await store.import_events(lines(), import_id="x", mode="initial")
            assert report.events == COUNT

    run(main)


def test_an_export_writes_what_the_synchronous_one_does(filled: str, tmp_path: Path) -> None:
    with EventStore(filled) as sync_store:
        sync_store.export_events(tmp_path / "sync.ndjson", event_types=["t"])

    async def main() -> None:
        async with AsyncEventStore(filled, pool_size=1) as store:
            told: list[int] = []
            target = tmp_path / "async.ndjson"
            count = await store.export_events(
                target, event_types=["t"], progress=lambda progress: told.append(progress.events)
            )
            assert count == COUNT == told[-1]
            assert target.read_bytes() == (tmp_path / "sync.ndjson").read_bytes()
            with pytest.raises(FileExistsError):
                await store.export_events(target)
            with pytest.raises(TypeError, match="target"):
                await store.export_events(7)  # type: ignore[arg-type]
            await check_whole(store, 1)

    run(main)


def test_a_cancelled_export_leaves_no_file_and_no_query(filled: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncEventStore(filled, pool_size=1) as store:
            with Locked(filled) as locked:
                task = asyncio.create_task(store.export_events(tmp_path / "all.ndjson"))
                await until(lambda: len(locked.waiting()) == 1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await until(lambda: not locked.waiting())
            assert list(tmp_path.iterdir()) == []
            await check_whole(store, 1)

    run(main)


def test_payloads_are_plain_json_and_ids_are_uuids(filled: str) -> None:
    async def main() -> None:
        async with AsyncEventStore(filled) as store:
            (event,) = [each async for each in store.read(limit=1)]
            assert json.loads(event.data) == event.payload == {"n": 0}
            assert isinstance(event.event_id, uuid.UUID)
            assert "password" not in repr(AsyncEventStore("postgresql://u:password@h/d"))
            assert repr(store).startswith("<AsyncEventStore 'hindsight' at ")

    run(main)
