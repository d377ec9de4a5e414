"""Maintenance of other tables, long under way in the same database, while appends and readers go on."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import psycopg
import pytest

from hindsight_fast import ANY, EventStore, StreamWrite
from ledger import Ledger, event
from rivals import Follower, Threads, Writer, streams_of, wait_until

ELSEWHERE = """
    CREATE TABLE elsewhere AS SELECT n FROM generate_series(1, 100) AS n;
    CREATE FUNCTION slow(n integer) RETURNS integer LANGUAGE plpgsql IMMUTABLE AS $$
    BEGIN
        PERFORM pg_advisory_lock_shared(1);
        PERFORM pg_advisory_unlock_shared(1);
        RETURN n;
    END $$;
    CREATE INDEX elsewhere_slow ON elsewhere (slow(n))
"""
"""A table whose index takes as long as somebody holds advisory lock 1."""

MAINTENANCE = ["CREATE INDEX ON elsewhere (slow(n))", "VACUUM FULL elsewhere", "REINDEX TABLE elsewhere"]


@contextmanager
def under_way(database: str, statement: str) -> Iterator[None]:
    """*statement* has begun, and does not end within the block."""
    with psycopg.connect(database, autocommit=True) as gate, psycopg.connect(database, autocommit=True) as admin:
        admin.execute(ELSEWHERE)
        gate.execute("SELECT pg_advisory_lock(1)")

        def waits() -> bool:
            query = "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Lock'"
            return gate.execute(query, (admin.info.backend_pid,)).fetchone() is not None

        with Threads(lambda: admin.execute(statement.encode())):
            wait_until(waits, what="the maintenance is under way")
            try:
                yield
                assert waits(), "the maintenance has ended before its time: this run shows nothing"
            finally:
                gate.execute("SELECT pg_advisory_unlock(1)")


def lags_s(store: EventStore, ledger: Ledger, follower: Follower, name: str) -> list[float]:
    """For each of 50 appends beside a busy writer: from its acknowledgement until the follower had read up to it."""
    lags: list[float] = []
    stop = threading.Event()
    beside = Writer(store, ledger.take, name=f"beside {name}", streams=streams_of(4), ways=["one", "several", "multi"])

    def keep_writing() -> None:
        while not stop.is_set():
            beside.step()

    with Threads(keep_writing):
        try:
            for n in range(50):
                write = StreamWrite(uuid4(), [event(f"{name}/{n}")], ANY)
                result = ledger.carry_out(f"{name}/{n}", [write], lambda write=write: store.transact([write]))  # type: ignore[misc]
                began = time.monotonic()
                assert result.cursor is not None
                while not follower.seen or follower.seen[-1][0] < result.cursor:
                    assert time.monotonic() - began < 20, "the reader waits for the maintenance"
                    follower.look()
                lags.append(time.monotonic() - began)
        finally:
            stop.set()
    return lags


@pytest.mark.essential
@pytest.mark.parametrize("statement", MAINTENANCE)
def test_maintenance_of_another_table_delays_neither_appends_nor_readers(
    database: str, store: EventStore, statement: str
) -> None:
    ledger, follower = Ledger(), Follower(store)
    before = lags_s(store, ledger, follower, "before")
    with under_way(database, statement):
        during = lags_s(store, ledger, follower, "during")
        # The control: below the oldest transaction under way, which is where a barrier of transaction ids would stand.
        with psycopg.connect(database) as control:
            row = control.execute(
                "SELECT count(*) FROM hindsight.events WHERE payload ->> 'token' LIKE 'during/%'"
                " AND xmin::text::bigint < pg_snapshot_xmin(pg_current_snapshot())::text::bigint"
            ).fetchone()
        assert row == (0,), "the maintenance is in no barrier's way: this run shows nothing"
    assert statistics.median(during) < 2 * statistics.median(before) + 0.02
    assert max(during) < 1.0
    assert not ledger.errors()
    follower.look()
    follower.check(ledger.check(database))
