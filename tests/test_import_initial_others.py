"""mode="initial" and everybody else: what readers and would-be writers meet with until the switch, and at it."""

from __future__ import annotations

import threading
from typing import Any

import psycopg
import pytest

from hindsight_fast import Cursor, EventStore, ImportFailed, SchemaError
from hindsight_fast.statements import Statements
from initial_imports import Background, Connection, Paused, lines, state_of, stop_at, tables_of, wait_until


def following(store: EventStore, stop: threading.Event, seen: list[Any]) -> None:
    """Read on from the last event seen, again and again, to one last time after *stop*."""
    position = Cursor.BEGINNING
    while True:
        last_time = stop.is_set()
        for event in store.read(after=position):
            assert event.cursor > position
            position = event.cursor
            seen.append(event)
        if last_time:
            return


@pytest.mark.essential
def test_readers_who_poll_all_the_way_see_all_events_once_in_order(store: EventStore, database: str) -> None:
    stop = threading.Event()
    seen: list[list[Any]] = [[] for _ in range(3)]
    readers = [Background(lambda each=each: following(store, stop, each)) for each in seen]
    with psycopg.connect(database, autocommit=True, prepare_threshold=0) as other:
        # A statement that was prepared for the empty table must not answer from it afterwards.
        counts = [other.execute("SELECT count(*) FROM hindsight.events").fetchone()]
        store.import_events(lines(3_000), import_id="a", mode="initial", chunk_size=100)
        counts.append(other.execute("SELECT count(*) FROM hindsight.events").fetchone())
    assert counts == [(0,), (3_000,)]
    store.import_events(lines(20), import_id="b", chunk_size=5)
    stop.set()
    for reader in readers:
        reader.result()
    for each in seen:
        assert [event.payload["n"] for event in each] == [*range(3_000), *range(20)]


class TrustsTheBarrier:
    """A reader that goes from bound to bound: what lies below one is visible, or never will be."""

    def __init__(self, database: str) -> None:
        self._connection = psycopg.connect(database, autocommit=True)
        self._statements = Statements("hindsight")
        self._passed = 0
        self.seen: list[int] = []

    def read(self) -> None:
        bound, *_ = self._connection.execute(self._statements.read_barrier).fetchone() or (0,)
        rows = self._connection.execute(
            "SELECT payload ->> 'n' FROM hindsight.events WHERE transaction_no >= %s AND transaction_no < %s"
            " ORDER BY transaction_no, sequence_no",
            (self._passed, bound),
        )
        self.seen += [int(n) for (n,) in rows]
        self._passed = bound

    def close(self) -> None:
        self._connection.close()


def load_and_hold_the_switch(store: EventStore, database: str, connection: Connection) -> tuple[Background, Connection]:
    """Start an import that gets as far as its switch, and waits there for a reader of the empty table."""
    holder = psycopg.connect(database)
    holder.execute("SELECT count(*) FROM hindsight.events")
    running = Background(lambda: store.import_events(lines(50), import_id="a", mode="initial", chunk_size=20))
    wait_until(
        lambda: connection.execute(
            "SELECT 1 FROM pg_locks WHERE relation = 'hindsight.events'::regclass AND NOT granted"
        ).fetchone()
    )
    return running, holder


def test_what_lies_below_a_readers_bound_never_appears_later(
    store: EventStore, database: str, connection: Connection
) -> None:
    reader = TrustsTheBarrier(database)
    reader.read()
    running, holder = load_and_hold_the_switch(store, database, connection)
    reader.read()
    holder.close()
    assert running.result().events == 50
    reader.read()
    assert reader.seen == list(range(50))
    reader.close()


def test_numbers_that_readers_have_passed_would_lose_events(
    store: EventStore, database: str, connection: Connection
) -> None:
    """The control of the test above: drawn by nextval as they were loaded, these numbers lie below a reader's bound."""
    reader = TrustsTheBarrier(database)
    running, holder = load_and_hold_the_switch(store, database, connection)
    connection.execute("UPDATE hindsight.events_import SET transaction_no = nextval('hindsight.transaction_no')")
    reader.read()
    holder.close()
    running.result()
    reader.read()
    assert reader.seen != list(range(50))
    reader.close()


def test_a_switch_that_is_undone_has_moved_nothing(store: EventStore, database: str, connection: Connection) -> None:
    """setval would stay: readers would pass the numbers, and the next try would bring events below their bounds."""
    stop_at(store, "switch")
    reader = TrustsTheBarrier(database)
    with psycopg.connect(database) as other:
        other.execute("SELECT hindsight.switch_initial_v1('a')")
        other.rollback()
    reader.read()
    assert store.import_events(lines(30), import_id="a", mode="initial").skipped_events == 30
    reader.read()
    assert reader.seen == list(range(30))
    reader.close()


def test_numbers_that_were_overtaken_meanwhile_are_not_used(store: EventStore, connection: Connection) -> None:
    """A standby that is promoted, or a dump that is restored, moves the sequence as far as these numbers."""
    stop_at(store, "switch")
    connection.execute("UPDATE hindsight.store_meta SET timeline = timeline + 1")
    with EventStore(store.conninfo) as elsewhere:
        with pytest.raises(SchemaError, match="moved to another server"):
            elsewhere.import_events(lines(30), import_id="a", mode="initial")
        elsewhere.abandon_import("a")
        assert elsewhere.import_events(lines(30), import_id="a", mode="initial").events == 30
        assert len(list(elsewhere.read())) == 30


@pytest.mark.essential
def test_a_snapshot_from_between_two_chunks_never_shows_half_of_the_events(
    store: EventStore, database: str, connection: Connection
) -> None:
    source = Paused(lines(40), lines(40))
    running = Background(lambda: store.import_events(source, import_id="a", mode="initial", chunk_size=10))
    wait_until(
        lambda: (
            "events_import" in tables_of(connection)
            and connection.execute("SELECT 1 FROM hindsight.events_import").fetchone() is not None
        )
    )
    with psycopg.connect(database) as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT 1")  # takes the snapshot, and touches no table of the store
        source.gate.set()
        wait_until(
            lambda: (
                len(tables_of(connection) & {"stream_heads_import"}) == 1
                and connection.execute(
                    "SELECT 1 FROM hindsight.initial_indexes_v1() AS i WHERE i.beside IS NULL"
                ).fetchone()
                is None
            )
        )
        # It looks for snapshots like this one, again and again: so it has come to the switch, and waits.
        wait_until(
            lambda: connection.execute(
                "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%virtualxid%' AND pid <> pg_backend_pid()"
                " AND datname = current_database() AND state = 'idle'"
            ).fetchone()
        )
        assert reader.execute("SELECT count(*) FROM hindsight.events").fetchone() == (0,)
    assert running.result().events == 80
    assert len(list(store.read())) == 80


@pytest.mark.essential
def test_would_be_writers_are_refused_by_name_until_the_switch(
    store: EventStore, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hindsight_fast.import_initial.RIVAL_PATIENCE_S", 0.3)
    source = Paused(lines(20), lines(20))
    running = Background(lambda: store.import_events(source, import_id="it's mine", mode="initial", chunk_size=10))
    wait_until(lambda: state_of(connection) != "open")
    refusals = []
    for mode in ("append", "initial"):
        with pytest.raises((SchemaError, ImportFailed)) as caught:
            store.import_events(lines(3), import_id="other", mode=mode)  # type: ignore[arg-type]
        refusals.append(str(caught.value))
    assert "initial import 'it''s mine' is not finished" in refusals[0]
    assert "--abandon 'it''s mine'" in refusals[0]
    assert "another process runs an initial import" in refusals[1]
    assert list(store.read()) == []
    source.gate.set()
    assert running.result().events == 40
    assert store.import_events(lines(3), import_id="other").events == 3


def test_a_writer_from_before_the_import_has_to_open_the_store_again(store: EventStore, connection: Connection) -> None:
    def refusal(generation: int) -> str:
        with pytest.raises(psycopg.Error) as caught:
            connection.execute("SELECT hindsight.check_writable_v1(1, %s)", (generation,))
        return str(caught.value)

    def generation() -> int:
        (found,) = connection.execute("SELECT generation FROM hindsight.store_meta").fetchone() or (None,)
        return int(str(found))

    before = generation()
    store.import_events(lines(3), import_id="a", mode="initial")
    assert "Open the store again" in refusal(before)
    connection.execute("SELECT hindsight.check_writable_v1(1, %s)", (generation(),))


def test_an_append_under_way_is_waited_for_and_then_the_store_is_not_empty(store: EventStore, database: str) -> None:
    with psycopg.connect(database) as writer:
        writer.execute("SELECT hindsight.advance_heads_v1(ARRAY[gen_random_uuid()], ARRAY[1::bigint])")
        running = Background(lambda: store.import_events(lines(3), import_id="a", mode="initial"))
        with psycopg.connect(database, autocommit=True) as connection:
            wait_until(
                lambda: connection.execute(
                    "SELECT 1 FROM pg_locks WHERE relation = 'hindsight.append_gate'::regclass AND NOT granted"
                ).fetchone()
            )
            assert state_of(connection) == "open"
    with pytest.raises(SchemaError, match="empty store"):
        running.result()
