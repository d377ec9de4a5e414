"""The connections that stay with the appends of a loop: what they carry, and when they go back to the pool."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool

from async_stores import all_are_back, run, until
from hindsight_fast import ANY, AsyncEventStore, NewEvent, kept_connections
from hindsight_fast.append_call import AppendCall
from hindsight_fast.append_request import AppendRequest
from hindsight_fast.group_commit import LANES

SMALL = NewEvent("t", {})


class Calls:
    """Which requests each call carried, and over which session."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[int] = []
        self.sessions: list[int] = []
        group = AppendCall.group

        def noted(
            call: AppendCall, connection: Any, requests: Sequence[AppendRequest], *more: Any, **options: Any
        ) -> Any:
            self.groups.append(len(requests))
            self.sessions.append(connection.info.backend_pid)
            return group(call, connection, requests, *more, **options)

        monkeypatch.setattr(AppendCall, "group", noted)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture
def kept_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_connections, "KEPT_IDLE_S", 60.0)


def lent(store: AsyncEventStore) -> int:
    stats = store.pool.get_stats()
    return stats["pool_size"] - stats["pool_available"]


async def append(store: AsyncEventStore, event: NewEvent = SMALL, stream_id: UUID | None = None) -> None:
    await store.append(stream_id or uuid4(), [event], expected=ANY)


def test_appends_one_after_the_other_go_over_one_connection(
    store: object, database: str, calls: Calls, kept_for_long: None
) -> None:
    async def main() -> None:
        async with AsyncEventStore(database) as store:
            for _ in range(5):
                await append(store)
            assert len(set(calls.sessions)) == 1
            assert lent(store) == 1

    run(main)


def test_it_goes_back_when_nobody_appends_any_more(store: object, database: str) -> None:
    async def main() -> None:
        async with AsyncEventStore(database) as store:
            await asyncio.gather(*(append(store) for _ in range(20)))
            await until(lambda: all_are_back(store))
            await append(store)
            await until(lambda: all_are_back(store))

    run(main)


def test_closing_gives_it_back(store: object, database: str, kept_for_long: None) -> None:
    async def main() -> None:
        async with AsyncConnectionPool(database, min_size=1, max_size=4, open=False) as pool:
            async with AsyncEventStore(pool=pool) as store:
                await append(store)
                assert lent(store) == 1
            stats = pool.get_stats()
            assert stats["pool_available"] == stats["pool_size"]
            async with pool.connection() as connection:
                assert not connection.autocommit, "it was not given back as it was lent"

    run(main)


def test_one_that_is_old_goes_back_also_while_there_is_work(
    store: object, database: str, calls: Calls, kept_for_long: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool replaces what has come of age when it is given back, and never else."""
    monkeypatch.setattr(kept_connections, "MOST_KEPT_S", -1.0)

    async def main() -> None:
        async with AsyncEventStore(database) as store:
            for _ in range(5):
                await append(store)
                await until(lambda: all_are_back(store))

    run(main)


def test_a_small_pool_keeps_none(store: object, database: str, kept_for_long: None) -> None:
    """Whoever reads would wait for it."""

    async def main() -> None:
        async with AsyncEventStore(database, pool_size=LANES, timeout=10) as store:
            for _ in range(3):
                await asyncio.gather(append(store), append(store))
                await asyncio.gather(store.head(), store.head())
            await until(lambda: all_are_back(store))

    run(main)


def test_callers_who_come_back_together_are_shared_out(
    store: object, database: str, calls: Calls, kept_for_long: None
) -> None:
    async def main() -> None:
        async with AsyncEventStore(database) as store:
            await append(store)
            calls.groups.clear()
            await asyncio.gather(*(append(store) for _ in range(64)))
            assert max(calls.groups) <= 32, "they left as one group: client and server take turns"
            assert sum(calls.groups) == 64

    run(main)


@pytest.mark.essential
def test_a_group_larger_than_what_the_kernel_takes_at_once(
    store: object, database: str, calls: Calls, kept_for_long: None
) -> None:
    large = NewEvent("t", {"filler": "x" * 1_000_000})
    streams = [uuid4() for _ in range(3)]

    async def main() -> None:
        async with AsyncEventStore(database) as store:
            await append(store)
            calls.groups.clear()
            await asyncio.gather(*(append(store, large, stream) for stream in streams), append(store))
            assert calls.groups == [4]
            for stream in streams:
                (event,) = (await store.load_stream(stream)).events
                assert event.payload == large.payload

    run(main)


@pytest.mark.essential
def test_a_kept_connection_that_the_server_ends_costs_nobody_an_append(
    store: object, database: str, calls: Calls, kept_for_long: None
) -> None:
    async def main() -> None:
        async with AsyncEventStore(database) as store:
            with psycopg.connect(database, autocommit=True) as admin:
                for _ in range(3):
                    await append(store)
                    admin.execute("SELECT pg_terminate_backend(%s, 10000)", (calls.sessions[-1],))
                    # Both ways to find out: the loop has told of it, or has not had the time to.
                    await append(store)
                    admin.execute("SELECT pg_terminate_backend(%s, 10000)", (calls.sessions[-1],))
                    await asyncio.sleep(0.01)
                row = admin.execute("SELECT count(*), count(DISTINCT stream_id) FROM hindsight.events").fetchone()
            assert row == (6, 6)
            assert calls.groups == [1] * 6, "an append was tried over a connection that had ended"
            assert len(set(calls.sessions)) == 6

    run(main)


@pytest.mark.essential
def test_a_server_process_that_stands_still_holds_its_group_up_and_nobody_else(
    store: object, database: str, calls: Calls, kept_for_long: None
) -> None:
    streams = [uuid4() for _ in range(3)]

    async def main() -> None:
        async with AsyncEventStore(database, timeout=1.0) as store:
            await append(store)
            stopped = calls.sessions[-1]
            os.kill(stopped, signal.SIGSTOP)
            try:
                held_up = asyncio.gather(*(append(store, SMALL, stream) for stream in streams))
                await until(lambda: sum(calls.groups) == 4)
                await append(store)
                assert not held_up.done()
                # They give up on it after their timeout, and go on over other connections.
                await asyncio.wait_for(held_up, 20)
                os.kill(stopped, signal.SIGCONT)
                with psycopg.connect(database, autocommit=True) as admin:
                    # It finds the same events stored, by others, and stores nothing.
                    query = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND state = 'active'"
                    await until(lambda: admin.execute(query, (stopped,)).fetchone() == (0,))
                    row = admin.execute("SELECT count(*), count(DISTINCT stream_id) FROM hindsight.events").fetchone()
                assert row == (5, 5)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(stopped, signal.SIGCONT)

    run(main)


def test_a_group_that_fails_gives_its_connection_back(
    store: object, database: str, calls: Calls, kept_for_long: None
) -> None:
    async def main() -> None:
        async with AsyncEventStore(database) as store:
            await append(store)
            with psycopg.connect(database, autocommit=True) as admin:
                admin.execute("ALTER TABLE hindsight.events ADD CONSTRAINT no_bad CHECK (event_name <> 'bad')")
            outcomes = await asyncio.gather(
                append(store, NewEvent("bad", {})), append(store), append(store), return_exceptions=True
            )
            assert [type(each) for each in outcomes] == [psycopg.errors.CheckViolation, type(None), type(None)]
            await until(lambda: lent(store) == 0)
            await append(store)
            assert lent(store) == 1

    run(main)
