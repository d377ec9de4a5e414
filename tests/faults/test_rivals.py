"""Writers in threads and processes, in each other's way: nothing is lost, doubled, or shown out of order."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from statistics import median
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql

from hindsight_fast import ANY, AppendResult, ConcurrencyConflict, EventStore, StreamWrite, VersionMismatch
from hindsight_fast.embedded import EmbeddedServer
from ledger import Ledger, acknowledged, begun, event, failed
from rivals import (
    BY_LENT,
    BY_STORE,
    Follower,
    NaiveFollower,
    RolledBack,
    Stop,
    Threads,
    Writer,
    WriterProcess,
    streams_of,
    wait_until,
    waiting_for_locks,
)

SOAK_MINUTES = int(os.environ.get("HINDSIGHT_SOAK", "0"))

REGISTERED = """
    SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock' AND objsubid = 1
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


@pytest.mark.essential
def test_followers_miss_nothing_while_one_without_the_barrier_does(database: str, store: EventStore) -> None:
    ledger, streams = Ledger(), streams_of(12)
    followers = [Follower(store) for _ in range(3)]
    control = NaiveFollower(store, database)

    def write(name: str, ways: tuple[str, ...]) -> None:
        writer = Writer(store, ledger.take, name=name, streams=streams, ways=ways, database=database)
        while not stop_writing:
            writer.step()
        writer.close()

    processes = [
        WriterProcess(database, ledger, name=name, streams=len(streams), ways=ways)
        for name, ways in (("p", BY_STORE), ("q", BY_STORE + BY_LENT))
    ]
    with Stop() as stop, Threads(*(lambda each=each: each.follow(stop) for each in (*followers, control))), stop:
        with Stop() as stop_writing:
            lent = [lambda n=n: write(f"lent {n}", BY_LENT) for n in range(2)]
            grouped = [lambda n=n: write(f"grouped {n}", BY_STORE) for n in range(4)]
            with Threads(*lent, *grouped), stop_writing:
                wait_until(lambda: all(each.begun.is_set() for each in processes), what="processes write")
                wait_until(
                    lambda: ledger.count("acknowledged") > 1_500 + 6_000 * SOAK_MINUTES and control.missed(),
                    what="enough was written, and the control has missed something",
                    deadline_s=30 + SOAK_MINUTES * 120,
                )
                for process in processes:
                    process.stop()
    rows = ledger.check(database)
    for follower in followers:
        follower.check(rows)
    assert control.missed() > 0, "a reader without the barrier missed nothing: this run shows nothing"
    assert ledger.errors().keys() <= {"ConcurrencyConflict", "RolledBack"}, ledger.messages()
    assert ledger.errors()["ConcurrencyConflict"] > 0
    assert ledger.errors()["RolledBack"] > 0


IN_THE_WAY = {
    "a table in this database": "CREATE TABLE somebodys_own AS SELECT 1 AS n",
    "a table in another database": "CREATE TABLE somebodys_own AS SELECT 1 AS n",
    "a temporary table": "CREATE TEMPORARY TABLE somebodys_own AS SELECT 1 AS n",
    "a row that is locked": "SELECT FROM hindsight.stream_heads FOR UPDATE",
}


@pytest.mark.parametrize(("what", "statement"), IN_THE_WAY.items(), ids=IN_THE_WAY)
def test_an_unrelated_writer_idle_in_its_transaction_holds_nobody_up(
    database: str, server: EmbeddedServer, store: EventStore, what: str, statement: str
) -> None:
    ledger, follower = Ledger(), Follower(store)
    append(store, ledger, "first")
    elsewhere = server.conninfo_for("postgres") if "another" in what else database
    with psycopg.connect(elsewhere) as idle:
        idle.execute(statement.encode())
        follower.look()
        looks_s = []
        for n in range(20):
            append(store, ledger, f"{n}")
            began = time.monotonic()
            assert follower.look() == 1
            looks_s.append(time.monotonic() - began)
        # The median: a pause of the machine strikes one of them. Who waits for the idle one waits to the end.
        assert median(looks_s) < 1.0
        # The control: below the oldest transaction under way, which is where a barrier of transaction ids would stand.
        with psycopg.connect(database) as control:
            row = control.execute(
                "SELECT count(*) FROM hindsight.events"
                " WHERE xmin::text::bigint < pg_snapshot_xmin(pg_current_snapshot())::text::bigint"
            ).fetchone()
        assert row == (1,)
        idle.rollback()
    follower.check(ledger.check(database))


@pytest.mark.essential
@pytest.mark.parametrize("end", ["COMMIT PREPARED", "ROLLBACK PREPARED"])
def test_a_prepared_transaction_holds_readers_until_its_fate_is_known(
    database: str, store: EventStore, end: str
) -> None:
    ledger, follower = Ledger(), Follower(store)
    name = f"append {uuid4()}"
    writes = [StreamWrite(uuid4(), [event("prepared")], ANY)]
    ledger.take(begun("prepared", writes))
    with psycopg.connect(database) as lent:
        result = store.transact(writes, connection=lent)
        lent.execute(sql.SQL("PREPARE TRANSACTION {}").format(name))
    count = 0
    try:
        until = time.monotonic() + (10.0 if SOAK_MINUTES else 0.0)
        while count < 50 or time.monotonic() < until:
            append(store, ledger, f"{count}")
            count += 1
            assert follower.look() == 0, "the prepared append was overtaken"
    finally:
        with psycopg.connect(database, autocommit=True) as admin:
            admin.execute(sql.SQL("{} {}").format(sql.SQL(end), name))
    committed = end == "COMMIT PREPARED"
    ledger.take(acknowledged("prepared", result) if committed else failed("prepared", RolledBack()))
    assert follower.look() == count + committed
    follower.check(ledger.check(database))


@pytest.mark.parametrize("level", ["READ COMMITTED", "READ UNCOMMITTED"])
def test_streams_and_the_log_agree_on_who_came_first_however_old_a_transaction_is(
    database: str, store: EventStore, level: str
) -> None:
    """The lent transaction has an older id than the rival's append that it follows, and wrote before it."""
    ledger, follower, stream = Ledger(), Follower(store), uuid4()
    with psycopg.connect(database) as lent:
        lent.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
        lent.execute("CREATE TABLE somebodys_own AS SELECT pg_current_xact_id()")
        append(store, ledger, "rival", stream)
        append(store, ledger, "lent", stream, connection=lent)
        waiting = threading.Thread(target=lambda: append(store, ledger, "third", stream))
        waiting.start()
        wait_until(lambda: waiting_for_locks(database), what="the third append waits for the stream")
        assert follower.look() == 1
        lent.commit()
        waiting.join(20)
    rows = ledger.check(database)
    assert [row.token for row in rows] == ["rival", "lent", "third"]
    follower.look()
    follower.check(rows)


@pytest.mark.essential
@pytest.mark.parametrize("group_commit", [True, False])
def test_opposite_orders_of_streams_never_deadlock(database: str, group_commit: bool) -> None:
    """Not even one that a retry would hide: the server counts them."""
    ledger, streams = Ledger(), streams_of(8)
    # Unsorted, a hundred rounds meet dozens.
    rounds = 500 if SOAK_MINUTES else 150
    notice_deadlocks_soon(database)
    with EventStore(database, group_commit=group_commit) as store:
        store.create_schema()

        def write(name: str, order: Sequence[UUID]) -> None:
            for n in range(rounds):
                writes = [StreamWrite(stream, [event(f"{name}/{n}/{stream}")], ANY) for stream in order]
                ledger.carry_out(f"{name}/{n}", writes, lambda writes=writes: store.transact(writes))

        orders = {"up": streams, "down": streams[::-1], "some": streams[5:2:-1], "others": streams[::3]}
        with Threads(*(lambda each=each: write(*each) for each in orders.items())):
            pass
    assert ledger.count("acknowledged") == rounds * 4
    ledger.check(database)
    assert deadlocks(database) == 0


@pytest.mark.essential
def test_many_writers_who_take_any_version_of_one_stream_all_succeed(database: str, store: EventStore) -> None:
    ledger, (stream,) = Ledger(), streams_of(1)
    processes = [
        WriterProcess(database, ledger, name=f"p{n}", streams=1, ways=["one", "several"], count=50) for n in range(2)
    ]

    def write(name: str) -> None:
        for n in range(25):
            append(store, ledger, f"{name}/{n}", stream)

    with Threads(*(lambda n=n: write(f"t{n}") for n in range(28))):
        pass
    for process in processes:
        process.end()
    assert ledger.count("acknowledged") == 28 * 25 + 2 * 2 * 50
    assert not ledger.errors()
    ledger.check(database)


@pytest.mark.parametrize("group_commit", [True, False])
def test_of_many_writers_who_expect_the_same_version_one_wins(database: str, group_commit: bool) -> None:
    ledger, stream = Ledger(), uuid4()
    with EventStore(database, group_commit=group_commit) as store:
        store.create_schema()
        append(store, ledger, "first", stream)
        together = threading.Barrier(32)
        conflicts: list[ConcurrencyConflict] = []
        won: list[AppendResult] = []

        def write(name: str) -> None:
            together.wait(20)
            try:
                won.append(append(store, ledger, name, stream, expected=0))
            except ConcurrencyConflict as conflict:
                conflicts.append(conflict)

        with Threads(*(lambda n=n: write(f"{n}") for n in range(32))):
            pass
    assert (len(won), len(conflicts)) == (1, 31)
    expected = VersionMismatch(stream, 0, 1, won[0].cursor)
    assert {conflict.mismatches for conflict in conflicts} == {(expected,)}
    ledger.check(database)


def test_a_savepoint_takes_its_append_back_and_the_rest_stays(database: str, store: EventStore) -> None:
    ledger, follower, stream = Ledger(), Follower(store), uuid4()
    append(store, ledger, "before", stream)
    with psycopg.connect(database) as lent, psycopg.connect(database, autocommit=True) as watcher:
        for n in range(3):
            lent.execute("SAVEPOINT here")
            store.append(stream, [event(f"undone {n}")], expected=ANY, connection=lent)
            assert watcher.execute(REGISTERED).fetchone() == (1,)
            lent.execute("ROLLBACK TO here")
            assert watcher.execute(REGISTERED).fetchone() == (0,), "the registration outlived its savepoint"
            append(store, ledger, f"beside {n}", uuid4())
            assert follower.look() == 1 + (n == 0), "a reader waits for an append that was taken back"
        append(store, ledger, "kept", stream, connection=lent)
        lent.execute("SAVEPOINT here")
        store.append(stream, [event("undone at last")], expected=1, connection=lent)
        lent.execute("ROLLBACK TO here")
        append(store, ledger, "kept too", stream, expected=1, connection=lent)
        assert watcher.execute(REGISTERED).fetchone() == (1,)
        lent.commit()
    follower.look()
    rows = ledger.check(database)
    follower.check(rows)
    assert [row.token for row in rows if row.stream_id == stream] == ["before", "kept", "kept too"]


def test_a_thousand_appends_in_one_transaction_register_once(database: str, store: EventStore) -> None:
    ledger, streams = Ledger(), streams_of(10)
    with psycopg.connect(database) as lent, psycopg.connect(database, autocommit=True) as watcher:
        for n in range(1_000):
            append(store, ledger, f"{n}", streams[n % 10], connection=lent)
        assert watcher.execute(REGISTERED).fetchone() == (1,)
        assert Follower(store).look() == 0
        lent.commit()
    follower = Follower(store)
    assert follower.look() == 1_000
    follower.check(ledger.check(database))


def test_only_who_appends_twice_in_one_transaction_may_meet_a_deadlock(database: str, store: EventStore) -> None:
    """Beside groups and an import that use the same streams, and never notice."""
    ledger, streams = Ledger(), streams_of(4)
    rounds, twice_done = 20, 0
    met: list[str] = []
    have_one_each = threading.Barrier(2)

    def twice(name: str, order: Sequence[UUID]) -> None:
        nonlocal twice_done
        with psycopg.connect(database) as lent:
            for n in range(rounds):
                keys = [f"{name}/{n}/{m}" for m in range(2)]
                results = []
                writes = [[StreamWrite(stream, [event(key)], ANY)] for key, stream in zip(keys, order, strict=True)]
                for key, each in zip(keys, writes, strict=True):
                    ledger.take(begun(key, each))
                try:
                    results = [store.transact(writes[0], connection=lent)]
                    if n == 0:
                        # This once they are sure to meet; later it is as it comes.
                        have_one_each.wait(20)
                    results.append(store.transact(writes[1], connection=lent))
                    lent.commit()
                except psycopg.errors.DeadlockDetected as deadlock:
                    lent.rollback()
                    met.append(name)
                    for key in keys:
                        ledger.take(failed(key, deadlock))
                else:
                    for key, result in zip(keys, results, strict=True):
                        ledger.take(acknowledged(key, result))
        twice_done += 1

    def group(name: str) -> None:
        writer = Writer(store, ledger.take, name=name, streams=streams, ways=["one", "multi"])
        while twice_done < 2:
            writer.step()

    def run_import() -> None:
        lines = []
        for n in range(400):
            token, stream = f"import/{n}", streams[n % 4]
            # Each line an append of its own to the ledger: they come in chunks, which may be cut anywhere.
            ledger.take(begun(token, [StreamWrite(stream, [event(token)], ANY)]))
            lines.append(json.dumps({"stream": str(stream), "type": "noted", "data": {"token": token}}).encode())
        assert store.import_events(iter(lines), import_id="beside", chunk_size=20).events == 400

    a, b = streams[:2]
    notice_deadlocks_soon(database)
    store.pool.drain()
    with Threads(
        lambda: twice("ab", (a, b)), lambda: twice("ba", (b, a)), lambda: group("c"), lambda: group("d"), run_import
    ):
        pass
    assert met, "nobody met a deadlock: this run shows nothing"
    assert set(ledger.errors()) <= {"DeadlockDetected"}
    assert ledger.errors()["DeadlockDetected"] == 2 * len(met)
    ledger.check(database)


def append(store: EventStore, ledger: Ledger, key: str, stream: UUID | None = None, **options: Any) -> AppendResult:
    """Append one event, whose token is *key*, to a stream or to one of its own."""
    stream = stream or uuid4()
    options.setdefault("expected", ANY)
    write = StreamWrite(stream, [event(key)], options["expected"])
    return ledger.carry_out(key, [write], lambda: store.append(stream, write.events, **options))


def notice_deadlocks_soon(database: str) -> None:
    """In connections that are made from now on: before an append's own patience ends."""
    with psycopg.connect(database, autocommit=True) as admin:
        name = sql.Identifier(admin.info.dbname)
        admin.execute(sql.SQL("ALTER DATABASE {} SET deadlock_timeout = '10ms'").format(name))


def deadlocks(database: str) -> int:
    """How many there were, once everybody else has gone: sessions report them at the latest when they end."""
    with psycopg.connect(database, autocommit=True) as connection:

        def ask(query: str) -> int:
            row = connection.execute(query.encode()).fetchone()
            assert row is not None
            return int(row[0])

        others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        wait_until(lambda: ask(others) == 0, what="all others have gone")
        return ask("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
