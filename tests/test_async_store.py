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
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from async_stores import (
    COUNT,
    PAGE,
    PATIENCE_S,
    Locked,
    all_are_back,
    by_pages,
    check_whole,
    lines,
    own_tasks,
    run,
    until,
)
from hindsight_fast import (
    AsyncEventStore,
    EventStore,
    HindsightError,
    StoreClosed,
    read_ahead,
    reading,
    stream_uuid,
)
from hindsight_fast.async_store import READ_AHEAD_PATIENCE_S
from hindsight_fast.embedded import EmbeddedServer
from hindsight_fast.installations import Installation


@pytest.fixture
def always_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "WORTHWHILE", -1.0)


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
        async with AsyncEventStore(filled, pool_size=1) as store:
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
                assert READ_AHEAD_PATIENCE_S <= time.monotonic() - began < READ_AHEAD_PATIENCE_S + 20  # not the 30 s
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


def test_payloads_are_plain_json_and_ids_are_uuids(filled: str) -> None:
    async def main() -> None:
        async with AsyncEventStore(filled) as store:
            (event,) = [each async for each in store.read(limit=1)]
            assert json.loads(event.data) == event.payload == {"n": 0}
            assert isinstance(event.event_id, uuid.UUID)
            assert "password" not in repr(AsyncEventStore("postgresql://u:password@h/d"))
            assert repr(store).startswith("<AsyncEventStore 'hindsight' at ")

    run(main)
