"""What the tests of AsyncEventStore share: a loop in which nothing goes wrong unheard, a pool to be found whole."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import psycopg

from hindsight_fast import AsyncEventStore

COUNT = 3_000
PAGE = 100
PATIENCE_S = 20


def lines(count: int = COUNT) -> Iterator[bytes]:
    return (b'{"stream":"s%d","type":"t","data":{"n":%d}}' % (n % 9, n) for n in range(count))


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
