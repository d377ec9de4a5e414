"""Pages fetched ahead: the same events, no connection kept, and nothing lost when the fetch ahead fails."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg_pool import ConnectionPool

from hindsight_fast import EventStore, RecordedEvent, read_ahead
from hindsight_fast.statements import Statements, numbered
from hindsight_fast.store import READ_AHEAD_PATIENCE_S

COUNT = 3_000
PAGE = 100


@pytest.fixture
def store(database: str) -> Iterator[EventStore]:
    with EventStore(database, pool_size=1) as store:
        store.create_schema()
        store.import_events(
            (b'{"stream":"s%d","type":"t","data":{"n":%d}}' % (n % 9, n) for n in range(COUNT)), import_id="x"
        )
        yield store


@pytest.fixture
def always_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "WORTHWHILE", -1.0)


@pytest.fixture
def fetched_ahead(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each page that was asked for ahead could be had."""
    seen: list[bool] = []

    class Watched(read_ahead.PageAhead):
        def result(self):  # type: ignore[no-untyped-def]
            result = super().result()
            seen.append(result is not None)
            return result

    monkeypatch.setattr("hindsight_fast.store.PageAhead", Watched)
    return seen


def numbers(events: Iterator[RecordedEvent]) -> list[int]:
    return [event.payload["n"] for event in events]


def by_pages(store: EventStore, handle: Callable[[], object] = lambda: None) -> Iterator[RecordedEvent]:
    for batch in store.read_batches(batch_size=PAGE):
        handle()
        yield from batch


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def ahead_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hindsight-read-ahead"]


def free_connections(store: EventStore) -> int:
    return store.pool.get_stats()["pool_available"]


@pytest.mark.essential
def test_a_caller_who_takes_time_gets_pages_fetched_ahead(
    store: EventStore, fetched_ahead: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A pool of one: the page under way and the caller's own question take turns. (However long a turn is.)
    monkeypatch.setattr("hindsight_fast.store.READ_AHEAD_PATIENCE_S", 20.0)
    assert numbers(by_pages(store, store.head)) == list(range(COUNT))
    # All but the first few; a pause of the machine while a page is fetched makes the caller look quick.
    assert fetched_ahead.count(True) >= COUNT // PAGE // 2


def test_a_caller_who_takes_no_time_fetches_for_himself(store: EventStore, fetched_ahead: list[bool]) -> None:
    assert sum(len(batch) for batch in store.read_batches(batch_size=PAGE)) == COUNT
    # None; but pauses of the machine may look like a caller's.
    assert len(fetched_ahead) <= COUNT // PAGE // 2


def test_filtered_reads_and_limits_are_the_same_ahead(store: EventStore, always_ahead: None) -> None:
    for limit in (None, 0, 1, 499, 500, 501, 2_999):
        assert numbers(store.read(limit=limit)) == list(range(COUNT))[:limit]
        assert numbers(store.read(event_types=["t"], limit=limit)) == list(range(COUNT))[:limit]
    in_stream = [event for event in by_pages(store) if event.payload["n"] % 9 == 4]
    assert list(store.read(stream_id=in_stream[0].stream_id)) == in_stream
    assert list(store.read_stream(in_stream[0].stream_id)) == in_stream


def test_no_connection_is_kept_between_pages(store: EventStore, always_ahead: None) -> None:
    events = by_pages(store)
    first = next(events)
    wait_for(lambda: not ahead_threads())
    wait_for(lambda: free_connections(store) == 1)
    assert [first.payload["n"], *numbers(events)] == list(range(COUNT))


def test_an_abandoned_read_leaves_nothing(store: EventStore, always_ahead: None) -> None:
    events = by_pages(store)
    next(events)
    del events
    wait_for(lambda: not ahead_threads())
    wait_for(lambda: free_connections(store) == 1)


def test_a_busy_pool_delays_the_caller_little(store: EventStore, always_ahead: None, fetched_ahead: list[bool]) -> None:
    events = by_pages(store)
    seen = [next(events).payload["n"]]
    wait_for(lambda: not ahead_threads())
    with store.pool.connection():  # the only one
        began = time.monotonic()
        seen += [next(events).payload["n"] for _ in range(PAGE)]
        assert READ_AHEAD_PATIENCE_S <= time.monotonic() - began < READ_AHEAD_PATIENCE_S + 20  # not the store's 30 s
    assert fetched_ahead == [True]
    seen += numbers(events)
    assert seen == list(range(COUNT))


@pytest.mark.essential
def test_a_connection_lost_under_a_fetch_ahead_costs_nothing(
    database: str, store: EventStore, always_ahead: None, fetched_ahead: list[bool]
) -> None:
    events = by_pages(store)
    seen = [next(events).payload["n"]]
    with psycopg.connect(database, autocommit=True) as admin, psycopg.connect(database) as blocker:
        # The page ahead was had before; the one after it waits for the table.
        wait_for(lambda: not ahead_threads())
        blocker.execute("LOCK TABLE hindsight.events IN ACCESS EXCLUSIVE MODE")
        seen += [next(events).payload["n"] for _ in range(PAGE)]
        waiting = "FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        wait_for(lambda: bool(admin.execute(f"SELECT 1 {waiting}").fetchall()))
        admin.execute(f"SELECT pg_terminate_backend(pid) {waiting}")
        wait_for(lambda: not ahead_threads())
        blocker.rollback()
    seen += numbers(events)
    assert seen == list(range(COUNT))
    assert fetched_ahead[:2] == [True, False]


def test_an_interrupt_reaches_who_waits_for_a_page_ahead(database: str, store: EventStore, always_ahead: None) -> None:
    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    events = by_pages(store)
    next(events)
    with psycopg.connect(database) as blocker:
        wait_for(lambda: not ahead_threads())
        blocker.execute("LOCK TABLE hindsight.events IN ACCESS EXCLUSIVE MODE")
        for _ in range(PAGE):
            next(events)
        timer = threading.Timer(0.3, interrupt)
        began = time.monotonic()

        def read_on() -> None:
            timer.start()  # in here: elsewhere the interrupt would end the whole run
            numbers(events)

        with pytest.raises(KeyboardInterrupt):
            read_on()
        assert time.monotonic() - began < 20  # and not until the table is free, which is behind this block
        timer.join()
    wait_for(lambda: not ahead_threads())
    assert numbers(by_pages(store)) == list(range(COUNT))


def test_a_pool_that_is_lent_gets_its_connections_back_as_they_were(database: str, always_ahead: None) -> None:
    with ConnectionPool(database, min_size=1, max_size=1, open=True) as pool, EventStore(pool=pool) as store:
        store.create_schema()
        store.import_events((b'{"stream":"s","type":"t","data":{"n":%d}}' % n for n in range(COUNT)), import_id="x")
        assert numbers(by_pages(store)) == list(range(COUNT))
        with pool.connection() as connection:
            assert not connection.autocommit


@given(st.text(st.sampled_from('%s$1"a'), min_size=1, max_size=12))
def test_numbered_is_what_psycopg_makes_of_it(schema: str) -> None:
    from psycopg._queries import PostgresQuery
    from psycopg.adapt import Transformer

    statements = Statements(schema)
    statement = statements.log_page(["e.a > %s", "e.b < %s"], 7, page_bytes=None)
    query = PostgresQuery(Transformer())
    query.convert(statement, (1, 2))
    assert numbered(statement) == query.query
